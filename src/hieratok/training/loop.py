"""What every training run shares: optimiser, schedule, EMA, logging, checkpoints, exact resume.

Randomness is stateless: the data order is a function of (seed, step), each image's augmentation of (seed, epoch,
image), and the noise of each micro-batch (posterior samples, stochastic depth) of (seed, step, micro-batch). A step
number is therefore all that a checkpoint needs besides weights and optimiser, and one process with two micro-batches
does what two processes with one each do.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from hieratok import checkpoint
from hieratok.data.images import ImageDataset, StepBatches, to_float, training_loader
from hieratok.errors import TrainingError

# (model, images (B, 3, H, W) in [-1, 1]) -> scalar loss, and scalars to log by name
ComputeLoss = Callable[[nn.Module, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are cut.

    Raises:
        ValueError: settings out of range.
    """

    path: str | None = None
    """Folder of images (class = sub-folder), WebDataset shards (folder, file or 'glob-*.tar'), or `bundled`."""
    val_path: str | None = None
    """Images never trained on, for the pictures during training. None: of `path`, centre-cropped."""
    crop: Literal["random-resized", "center"] = "random-resized"
    """Training crop; evaluation always takes the ADM centre crop."""
    min_area: float = 0.5
    """Smallest share of an image's area that a random-resized crop may keep."""
    flip: bool = True
    """Mirror half of the images."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at an unreadable image and name it, or go on without it and count."""
    num_workers: int = 8
    """Processes that decode images, for each training process; 0: none but the training process itself."""

    def __post_init__(self):
        if not 0 < self.min_area <= 1:
            raise ValueError(f"data.min_area must be in (0, 1], not {self.min_area}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must not be negative, it is {self.num_workers}")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, logging and checkpoints. Defaults: the paper's stage 1 (tables 8 and 9).

    Raises:
        ValueError: settings out of range.
    """

    steps: int = 500_456
    """Optimiser steps; the paper's 100 epochs of 1,281,167 images at batch 256."""
    batch_size: int = 256
    """Images per step over all processes."""
    micro_batch_size: int | None = None
    """Images per forward pass; gradients are accumulated over the rest. None: a process's whole share."""
    learning_rate: float = 1e-4
    """After warm-up. [ours]: the paper's value is lost."""
    min_learning_rate: float = 1e-6
    """At the end of the cosine. [ours]: the paper's value is lost."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.05
    """AdamW's weight decay, on matrices and convolutions; not on norms, biases, positions. [ours]"""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm. [ours]"""
    ema_decay: float = 0.9999
    """Decay per step of the averaged weights, which are what is saved as the model; lower in the first steps. [ours]"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast; norms, softmax and losses stay in float32."""
    seed: int = 0
    """Of weights, data order, augmentation and noise."""
    log_every: int = 50
    """Steps between lines in log.jsonl and TensorBoard."""
    save_every: int = 5_000
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints stay."""
    picture_every: int = 5_000
    """Steps between pictures of reconstructions; 0: none."""

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "batch_size", "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of train.micro_batch_size"
                f" {self.micro_batch_size}"
            )
        if not (0 <= self.warmup_ratio < 1 and 0 <= self.ema_decay < 1):
            raise ValueError("train.warmup_ratio and train.ema_decay must be in [0, 1)")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError("train.learning_rate and train.clip_norm must be positive")


# Settings that change what is written or how fast, never the weights: a run may resume with others.
HARMLESS = {
    "name",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.picture_every",
    "data.num_workers",
}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to `min_learning_rate` at the last step. `step` counts from 0."""
    warmup = round(config.warmup_ratio * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and convolutions alone."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_weight = parameter.ndim >= 2 and "positions" not in name and "embeddings" not in name
        (decayed if is_weight else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, config.learning_rate, betas, fused=device.type in ("cpu", "cuda"))


def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) model, with d = min(decay, (1 + step) / (10 + step)): early averages forget quickly."""
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average([p.detach() for p in ema.parameters()], [p.detach() for p in model.parameters()], step)


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class State:
    """Everything that a step changes."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Steps done."""
    bad_images: int = 0
    """Unreadable images passed over so far."""


class RunFolder:
    """A run on disk: config.yaml, log.jsonl, tensorboard/, pictures/, checkpoints/step-*/ and at the end the model.

    Args:
        path: made if need be.
        settings: the resolved config as plain values.

    Raises:
        ValueError: the folder holds a run with other settings; the message names them.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path = Path(path)
        self.settings = settings
        self.checkpoints = self.path / "checkpoints"
        self.log_file = self.path / "log.jsonl"
        config_file = self.path / "config.yaml"
        if config_file.is_file():
            before = flatten(yaml.safe_load(config_file.read_text()))
            now = flatten(settings)
            changed = [k for k in {**before, **now} if before.get(k) != now.get(k) and k not in HARMLESS]
            if changed:
                differences = ", ".join(f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in changed)
                raise ValueError(f"{path} holds a run with other settings ({differences}): choose another --out")

    def prepare(self) -> None:
        """Make the folder, note the settings, and clear what a killed run left half-written."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in [*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")]:
            _remove(leftover)
        with checkpoint.atomic_file(self.path / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(self.settings, sort_keys=False))

    def latest(self) -> Path | None:
        """The newest checkpoint's folder."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def save(self, state: State, keep: int) -> None:
        """Write a checkpoint whole or not at all, then drop the oldest ones."""
        with checkpoint.atomic_folder(self.checkpoints / f"step-{state.step:08d}") as folder:
            state.ema.save_pretrained(folder / "tokenizer")  # type: ignore[operator]
            checkpoint.save_tensors(state.model.state_dict(), folder / "training.safetensors")
            with (folder / "optimizer.pt").open("wb") as file:
                torch.save(state.optimizer.state_dict(), file)
            (folder / "state.json").write_text(json.dumps({"step": state.step, "bad_images": state.bad_images}))
        for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
            _remove(old)

    def load(self, state: State, device: torch.device) -> None:
        """Put the newest checkpoint, if there is one, into `state`."""
        folder = self.latest()
        if folder is None:
            return
        try:
            state.model.load_state_dict(load_file(folder / "training.safetensors", device=str(device)))
            checkpoint.load_weights(folder / "tokenizer", state.ema, device)
            optimizer = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
            state.optimizer.load_state_dict(optimizer)
            saved = json.loads((folder / "state.json").read_text())
            state.step, state.bad_images = saved["step"], saved["bad_images"]
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(f"{folder} is damaged ({reason}): remove it to resume from an earlier one") from error

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl; a line cut off by a crash is passed over."""
        records = []
        if self.log_file.is_file():
            for line in self.log_file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
        return records

    def truncate_log(self, step: int) -> None:
        """Forget what was logged after the checkpoint that the run resumes from."""
        records = [r for r in self.read_log() if r["step"] <= step]
        with checkpoint.atomic_file(self.log_file) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in records))


def fit(
    model: nn.Module,
    compute_loss: ComputeLoss,
    dataset: ImageDataset,
    config: TrainConfig,
    num_workers: int,
    run: RunFolder,
    draw: Callable[[nn.Module], Image.Image] | None = None,
) -> nn.Module:
    """Train `model`, or go on with it where `run` left off, up to `config.steps`.

    Args:
        model: on the CPU, freshly initialised; has `save_pretrained`.
        compute_loss: what to minimise on one micro-batch.
        dataset: yields uint8 images.
        config: how.
        num_workers: of the data loader.
        run: where to write.
        draw: a picture of what the averaged model does, every `config.picture_every` steps.

    Returns:
        The averaged (EMA) model, in evaluation mode.

    Raises:
        TrainingError: the loss or a gradient is not finite, or the checkpoint to resume from is damaged.
        ValueError: the batch does not divide over the processes.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    device, is_main = accelerator.device, accelerator.is_main_process
    share, rest = divmod(config.batch_size, accelerator.num_processes)
    micro = config.micro_batch_size or share
    if rest or share % micro:
        raise ValueError(
            f"train.batch_size {config.batch_size} does not divide into {accelerator.num_processes} processes"
            f" times micro-batches of {micro}"
        )
    accumulation = share // micro

    model = model.to(device).train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    state = State(model, ema, make_optimizer(model, config, device))
    if is_main:
        run.prepare()
    accelerator.wait_for_everyone()
    run.load(state, device)
    if is_main:
        run.truncate_log(state.step)
    wrapped, optimizer = accelerator.prepare(model, state.optimizer)
    batches = StepBatches(
        num_images=len(dataset),
        batch_size=config.batch_size,
        micro_batch_size=micro,
        start_step=state.step,
        num_steps=config.steps - state.step,
        seed=config.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    loader = iter(training_loader(dataset, batches, num_workers))
    log = Log(run, state.step) if is_main else None
    progress = tqdm(
        total=config.steps * config.batch_size,
        initial=state.step * config.batch_size,
        unit=" images",
        desc=run.path.name,
        smoothing=0.05,
        disable=not is_main,
    )
    meter = Meter(device)

    with contextlib.closing(progress), contextlib.closing(log) if log else contextlib.nullcontext():
        while state.step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, config)
            for i in range(accumulation):
                with meter.waiting():
                    batch = next(loader)
                images = to_float(batch["image"].to(device, non_blocking=True))
                torch.manual_seed(seed_of(config.seed, state.step, accelerator.process_index * accumulation + i))
                is_last = i == accumulation - 1
                with contextlib.nullcontext() if is_last else accelerator.no_sync(wrapped):
                    loss, terms = compute_loss(wrapped, images)
                    accelerator.backward(loss / accumulation)
                meter.add({"loss": loss.detach(), **terms}, batch["skipped"])
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.clip_norm)
            assert isinstance(norm, Tensor)
            optimizer.step()
            optimizer.zero_grad()
            update_ema(ema, model, state.step, config.ema_decay)
            state.step += 1
            meter.watch(norm, state.step)
            progress.update(config.batch_size)

            done = state.step == config.steps
            save = done or state.step % config.save_every == 0
            if save or device.type == "cpu" or state.step % config.log_every == 0:
                bad_step = meter.first_bad_step()
                if bad_step:
                    raise TrainingError(not_finite(bad_step, run))
            if done or state.step % config.log_every == 0:
                record = meter.flush(accelerator, state, config.batch_size)
                if log:
                    log.write({**record, "learning_rate": learning_rate(state.step - 1, config)})
                    progress.set_postfix(loss=f"{record['loss']:.4f}")
            if save and is_main:
                run.save(state, config.keep_checkpoints)
            if log and draw and config.picture_every and (done or state.step % config.picture_every == 0):
                log.picture(draw(ema), state.step)
    accelerator.wait_for_everyone()
    return ema


def not_finite(step: int, run: RunFolder) -> str:
    """The message of a diverged run."""
    last = run.latest()
    good = f"the last good checkpoint is {last}" if last else "no checkpoint was written before it"
    return f"loss or gradient is not finite at step {step}; {good}. Try a lower --train.learning_rate, or fp32"


class Meter:
    """Running means of what a step reports, kept on the device: reading them would stall a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bad_step = torch.zeros((), dtype=torch.long, device=device)
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.norm = torch.zeros((), device=self.device)
        self.skipped = 0
        self.waited = 0.0
        self.started = time.perf_counter()
        self.steps = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, terms: dict[str, Tensor], skipped: Tensor) -> None:
        """One micro-batch's scalars and its number of unreadable images per place."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1
        self.skipped += int(skipped.sum())

    def watch(self, norm: Tensor, step: int) -> None:
        """Note the gradient's norm, and the first step at which it is not finite (as it is where the loss is not)."""
        self.norm = norm.detach()
        self.steps += 1
        bad = (self.bad_step == 0) & ~torch.isfinite(self.norm)
        self.bad_step = torch.where(bad, torch.full_like(self.bad_step, step), self.bad_step)

    def first_bad_step(self) -> int:
        """The first step whose gradient was not finite, 0 if none; the same on every process without asking, as a bad
        value is bad everywhere after the gradients' all-reduce. Waits for the device."""
        return int(self.bad_step)

    def flush(self, accelerator: Any, state: State, batch_size: int) -> dict[str, float]:
        """Means over the interval and over processes, and the rate."""
        names = list(self.sums)
        values = torch.stack([self.sums[name].float() for name in names]) / self.count
        means = accelerator.reduce(values, reduction="mean").tolist()
        skipped = accelerator.reduce(torch.tensor(self.skipped, device=self.device), reduction="sum")
        state.bad_images += int(skipped)
        seconds = time.perf_counter() - self.started
        record = {
            "step": state.step,
            "images": state.step * batch_size,
            **dict(zip(names, means)),
            "gradient_norm": float(self.norm),
            "images_per_second": self.steps * batch_size / seconds,
            "data_wait": self.waited / seconds,
            "bad_images": state.bad_images,
        }
        self.reset()
        return record


class Log:
    """log.jsonl, TensorBoard and pictures/ of a run; written by the main process."""

    def __init__(self, run: RunFolder, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        self.file = run.log_file.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, float]) -> None:
        """One interval's numbers."""
        self.file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "images"):
                self.tensorboard.add_scalar(name, value, int(record["step"]))

    def picture(self, picture: Image.Image, step: int) -> None:
        """A contact sheet of reconstructions."""
        import numpy as np

        folder = self.run.path / "pictures"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{step:08d}.png")
        self.tensorboard.add_image("reconstructions", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Flush everything."""
        self.file.close()
        self.tensorboard.close()


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings -> {"train.steps": ...}."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as what YAML and JSON hold: nested dicts, lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
