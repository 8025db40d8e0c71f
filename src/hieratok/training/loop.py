"""What every training run shares: optimisers, schedules, EMA, checkpoints, exact resume, and what to do when it fails.

Randomness is stateless: the data order is a function of (seed, step), each image's augmentation of (seed, epoch,
image), and the noise of each micro-batch (posterior samples, stochastic depth) of (seed, step, micro-batch). A step
number is therefore all that a checkpoint needs besides weights, optimisers and what the log has summed up, and one
process with two micro-batches does what two processes with one each do.
"""

import contextlib
import copy
import hashlib
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from hieratok.core import checkpoint
from hieratok.core.errors import NotFinite, Stopped, TrainingError
from hieratok.core.extras import needs_extras
from hieratok.core.layers import Blocks
from hieratok.data.images import StepBatches, training_loader
from hieratok.training import parallel
from hieratok.training.config import Optimization, TrainConfig
from hieratok.training.run_folder import COUNTERS, Log, RunFolder, Snapshot

logger = logging.getLogger(__name__)

STOP_CHECK_STEPS = 10
"""Several processes agree this often whether to stop: asking at every step would cost time."""


class Objective:
    """What is trained and what it minimises; `fit` does the rest.

    Args:
        networks: everything that is trained, by name. The first is the model: it is averaged, saved by its
            `save_pretrained(folder, state_dict)`, and shown.
        optimizations: of the same names.
    """

    methods: tuple[str, ...] = ()
    """Methods of the model that compute with its weights besides `forward`."""

    def __init__(self, networks: dict[str, nn.Module], optimizations: dict[str, Optimization]):
        self.networks = networks
        self.optimizations = optimizations
        self.name = next(iter(networks))

    def losses(
        self, networks: dict[str, nn.Module], batch: dict[str, Tensor], step: int
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One micro-batch's losses, each backpropagated before the next is asked for.

        Args:
            networks: as given, perhaps wrapped for several processes: call these.
            batch: what the data set gives, on the device.
            step: optimiser steps done.

        Yields:
            A scalar, and detached scalars to log by name; the first has "loss".
        """
        raise NotImplementedError

    def finish_step(self, bad: Tensor) -> None:
        """Called after each optimiser step; `bad` is 1 where it was left out, 0 elsewhere."""


def learning_rate(step: int, config: Optimization, steps: int) -> float:
    """Linear warm-up, then a cosine down to `min_learning_rate` at the last step. `step` counts from 0."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def make_optimizer(model: nn.Module, config: Optimization, device: torch.device) -> torch.optim.AdamW:
    """AdamW on what is trained of a network, with weight decay on matrices and convolutions alone. [ours]"""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim >= 2 and "positions" not in name and "embeddings" not in name
            (decayed if is_weight else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, config.learning_rate, betas, fused=device.type in ("cpu", "cuda"))


def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + step) / (10 + step)): early averages forget quickly. [ours]"""
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average([p.detach() for p in ema.parameters()], [p.detach() for p in model.parameters()], step)


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class State:
    """Everything that a step changes, and the checkpoints that it is kept in.

    Args:
        objective: freshly initialised networks on the CPU.
        config: how they are trained.
        device: where they are trained.
    """

    def __init__(self, objective: Objective, config: TrainConfig, device: torch.device):
        self.name = objective.name
        self.device = device
        self.networks = {name: network.to(device).train() for name, network in objective.networks.items()}
        self.ema = copy.deepcopy(self.networks[self.name]).requires_grad_(False).eval()
        for module in self.networks[self.name].modules():
            if isinstance(module, Blocks):
                module.activation_checkpointing = config.activation_checkpointing
        if config.parallel == "fsdp2" and torch.distributed.is_initialized():
            parallel.shard(self.networks[self.name], objective.methods)
            parallel.shard(self.ema, objective.methods)
        if config.compile:
            self.networks[self.name].compile()
        self.called = {
            name: network if isinstance(network, parallel.FSDPModule) else parallel.replicate(network, device)
            for name, network in self.networks.items()
        }
        self.optimizers = {
            name: make_optimizer(network, objective.optimizations[name], device)
            for name, network in self.networks.items()
        }
        self.step = 0
        """Optimiser steps done, skipped ones included."""
        self.counts = {"bad_images": 0, "skipped_steps": 0, "rollbacks": 0}
        """Unreadable images passed over, steps left out, and how often the run went back to a checkpoint."""

    @property
    def files(self) -> list[str]:
        """What a checkpoint has to hold."""
        model = [f"{self.name}/{file}" for file in (checkpoint.CONFIG, checkpoint.WEIGHTS)]
        others = [f"{name}{end}" for name in self.networks for end in (".safetensors", "-optimizer.pt")]
        return [COUNTERS, *model, *others]

    def save(self, run: RunFolder, interval: dict[str, Any], keep: int | None, is_main: bool) -> None:
        """Write a checkpoint; every process must call.

        Args:
            run: where to.
            interval: what the meter has summed up since the last line in the log.
            keep: how many checkpoints stay; None: all.
            is_main: whether this process writes.
        """
        averaged = parallel.whole_weights(self.ema)
        counters = {"step": self.step, **self.counts, "threads": torch.get_num_threads(), "interval": interval}
        snapshot = Snapshot(
            counters,
            {name: parallel.whole_weights(network) for name, network in self.networks.items()},
            {name: parallel.whole_optimizer(network, self.optimizers[name]) for name, network in self.networks.items()},
        )
        if is_main:
            model: Any = self.ema
            run.save(snapshot, lambda folder: model.save_pretrained(folder / self.name, averaged), keep)

    def load(self, run: RunFolder, folder: Path) -> dict[str, Any]:
        """Take over what an intact checkpoint holds; what is left over: `interval` and `threads`."""
        snapshot = run.load(folder, self.networks)
        parallel.load_weights(self.ema, checkpoint.read_tensors(folder / self.name / checkpoint.WEIGHTS))
        for name, network in self.networks.items():
            parallel.load_weights(network, snapshot.weights[name])
            parallel.load_optimizer(network, self.optimizers[name], snapshot.optimizers[name])
        self.step = snapshot.counters.pop("step")
        self.counts = {name: snapshot.counters.pop(name) for name in self.counts}
        return snapshot.counters

    def is_finite(self) -> bool:
        """Whether all weights are; under FSDP2 those of this process."""
        weights = [p for network in (self.ema, *self.networks.values()) for p in network.parameters()]
        return all(bool(parallel.local(p).isfinite().all()) for p in weights)


def fit(
    objective: Objective,
    dataset: Dataset,
    config: TrainConfig,
    num_workers: int,
    run: RunFolder,
    draw: Callable[[nn.Module], Image.Image] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> nn.Module:
    """Train an objective's networks, or go on with them where `run` left off, up to `config.steps`.

    Args:
        objective: what to train and to minimise.
        dataset: items are asked for as (index, epoch), and are dicts of tensors with `skipped` among them.
        config: how.
        num_workers: of the data loader.
        run: where to write.
        draw: a picture of what the averaged model does, every `config.picture_every` steps. All processes call it.
        evaluate: numbers by name of the averaged model. All processes call it.
        evaluate_every: steps between evaluations, and one at the end; 0: none.

    Returns:
        The averaged (EMA) model, in evaluation mode.

    Raises:
        TrainingError: the run diverged, or every checkpoint to resume from is damaged.
        Stopped: SIGTERM came; a checkpoint was saved.
        ValueError: the batch does not divide over the processes.
    """
    with needs_extras():
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
    first_micro = accelerator.process_index * accumulation
    state = State(objective, config, device)
    meter = Meter(device)

    def loader() -> Iterator[dict[str, Tensor]]:
        """Micro-batches from where `state` stands; after going back, in another order."""
        batches = StepBatches(
            num_images=len(dataset),  # type: ignore[arg-type]
            batch_size=config.batch_size,
            micro_batch_size=micro,
            start_step=state.step,
            num_steps=config.steps - state.step,
            seed=seed_of(config.seed, state.counts["rollbacks"]),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        return iter(training_loader(dataset, batches, num_workers))

    def resume(folder: Path | None) -> None:
        """Load a checkpoint, if there is one, and forget what was logged after it."""
        if folder:
            others = state.load(run, folder)
            meter.resume(others.get("interval"), accelerator)
            if is_main:
                warn_of_threads(others.get("threads"), run, device)
        if is_main:
            run.truncate_logs(state.step)

    def every(steps: int) -> bool:
        """Whether something that happens so often, and at the end, happens after this step."""
        return steps > 0 and state.step > 0 and (state.step % steps == 0 or state.step == config.steps)

    def optimize() -> None:
        """One step: micro-batches forth and back, then every network's optimiser, unless a gradient is not finite."""
        for name, optimizer in state.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, objective.optimizations[name], config.steps)
        for i in range(accumulation):
            with meter.waiting():
                batch = next(batches)
            meter.skipped_images += int(batch.pop("skipped").sum())
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            torch.manual_seed(seed_of(config.seed, state.counts["rollbacks"], state.step, first_micro + i))
            with parallel.synchronized(state.called.values(), i == accumulation - 1):
                losses = objective.losses(state.called, batch, state.step)
                for loss, terms in each_inside(lambda: accelerator.autocast(), losses):
                    (loss / accumulation).backward()
                    meter.add(terms)
        norms = {
            name: parallel.clip_gradients(network, objective.optimizations[name].clip_norm)
            for name, network in state.networks.items()
        }
        bad = meter.watch(norms, state.step + 1)
        for optimizer in state.optimizers.values():
            parallel.step_unless(optimizer, bad)
            optimizer.zero_grad()
        objective.finish_step(bad)
        update_ema(state.ema, state.networks[state.name], state.step, config.ema_decay)
        state.step += 1

    def diverged(check_weights: bool) -> int:
        """The step from which on nothing is finite any more; 0 if all is well. A bad step or a few are no matter, but
        for the last one: its weights would be untried."""
        bad_steps, first_bad = meter.bad_steps()
        if bad_steps >= (config.max_bad_steps if state.step < config.steps else 1):
            return first_bad
        if check_weights:
            broken: Any = accelerator.reduce(torch.tensor(float(not state.is_finite()), device=device), reduction="sum")
            if broken > 0:
                return first_bad if bad_steps else state.step
        return 0

    def go_back(step: int) -> None:
        """To the last checkpoint before the run diverged; its counter of such returns gives the data another order.

        Raises:
            TrainingError: there is none, or it was done too often.
        """
        rollbacks = state.counts["rollbacks"] + 1
        folder = newest_everywhere(run, state, accelerator, before=step)
        if folder is None or rollbacks > config.max_rollbacks:
            raise TrainingError(divergence(step, rollbacks - 1, folder))
        resume(folder)
        meter.in_a_row.zero_()
        state.counts["rollbacks"] = rollbacks
        tqdm.write(f"{divergence(step, rollbacks - 1, folder)}: going back to it", file=sys.stderr)
        progress.n = state.step * config.batch_size
        progress.refresh()

    def write_log() -> None:
        """A line of means since the last one."""
        record = meter.flush(accelerator, state, config.batch_size)
        record["learning_rate"] = learning_rate(state.step - 1, objective.optimizations[state.name], config.steps)
        if log:
            log.write(record)
            progress.set_postfix(loss=f"{record.get('loss', math.nan):.4f}", refresh=False)

    def save() -> None:
        """A checkpoint. While steps are bad it takes no other's place: those before may be the last good ones."""
        interval = meter.state(accelerator)
        if log:
            log.sync()
        state.save(run, interval, None if interval["in_a_row"] else config.keep_checkpoints, is_main)

    def observe() -> None:
        """This step's picture and evaluation, unless they are there: a run killed after its checkpoint owes them."""
        try:
            if draw and every(config.picture_every) and on_main(lambda: not run.picture(state.step).is_file()):
                picture = draw(state.ema)
                if log:
                    log.picture(picture, state.step)
            if evaluate and every(evaluate_every) and on_main(lambda: not run.is_evaluated(state.step)):
                numbers = {"step": state.step, "images": state.step * config.batch_size, **evaluate(state.ema)}
                if log:
                    log.evaluation(numbers)
        except NotFinite as error:  # perhaps on this process alone: no asking the others
            bad_steps, first_bad = meter.bad_steps()
            step = first_bad if bad_steps else state.step
            folder = run.newest(state.files, before=step)
            raise TrainingError(divergence(step, state.counts["rollbacks"], folder)) from error

    def on_main(ask: Callable[[], bool]) -> bool:
        """What the first process finds."""
        return broadcast(accelerator, ask() if is_main else None)

    if is_main:
        run.prepare()
    accelerator.wait_for_everyone()
    resume(newest_everywhere(run, state, accelerator))
    batches = loader()
    log = Log(run, state.step) if is_main else None
    progress = progress_bar(config, state.step, run.path.name, is_main)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signal(accelerator))
        stack.callback(progress.close)
        stack.callback(lambda: log and log.close())
        observe()
        while state.step < config.steps:
            optimize()
            progress.update(config.batch_size)
            is_saved, is_logged, stopping = every(config.save_every), every(config.log_every), stop(state.step)
            is_shown = every(config.picture_every) or every(evaluate_every)
            is_kept = is_saved or is_shown or stopping
            is_asked = is_kept or is_logged or device.type == "cpu"  # at every step it would cost a GPU time
            if is_asked and (step := diverged(check_weights=is_kept)):
                go_back(step)
                batches = loader()
                if log:  # its file was cut
                    log.close()
                    log = Log(run, state.step)
                continue
            if is_logged:
                write_log()
            if is_saved or stopping:
                save()
            observe()
            if stopping and state.step < config.steps:
                raise Stopped(f"stopped by SIGTERM after step {state.step}: the same command goes on from there")
        if step := diverged(check_weights=True):  # a run that was at its end already
            raise TrainingError(divergence(step, state.counts["rollbacks"], run.newest(state.files, before=step)))
    accelerator.wait_for_everyone()
    return state.ema


def each_inside(context: Callable[[], Any], iterator: Iterator[Any]) -> Iterator[Any]:
    """The items of `iterator`, each computed inside a context that is left before the item is used."""
    end = object()
    while True:
        with context():
            item = next(iterator, end)
        if item is end:
            return
        yield item


def newest_everywhere(run: RunFolder, state: State, accelerator: Any, before: int | None = None) -> Path | None:
    """The newest intact checkpoint, as the first process finds it; if asked for, of a step before."""
    found: Any = None
    if accelerator.is_main_process:
        try:
            found = run.newest(state.files, before)
        except TrainingError as error:
            found = error
    found = broadcast(accelerator, found)
    if isinstance(found, TrainingError):
        raise found
    return found


def broadcast(accelerator: Any, value: Any) -> Any:
    """The first process's value, on every process."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def divergence(step: int, rollbacks: int, folder: Path | None) -> str:
    """The message of a diverged run."""
    good = f"the last checkpoint before that is {folder}" if folder else "no checkpoint was written before it"
    times = f" (after going back {rollbacks} time{'s' * (rollbacks > 1)})" * (rollbacks > 0)
    return (
        f"the run diverged: loss, gradient or weights are not finite from step {step} on{times}; {good}. Try a lower"
        f" learning rate, or fp32"
    )


def warn_of_threads(before: int | None, run: RunFolder, device: torch.device) -> None:
    """Say so if sums will be rounded otherwise than before: on a CPU, torch splits them among its threads."""
    now = torch.get_num_threads()
    if device.type == "cpu" and before not in (None, now):
        logger.warning(
            "%s was trained with %s threads up to here, and goes on with %d: the result will differ in its last bits"
            " from an uninterrupted run's (OMP_NUM_THREADS=%s keeps them)",
            run.path,
            before,
            now,
            before,
        )


@contextlib.contextmanager
def stop_signal(accelerator: Any) -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step that says whether SIGTERM came: on every process alike."""
    came = threading.Event()

    def stop(step: int) -> bool:
        if accelerator.num_processes == 1:
            return came.is_set()
        if step % STOP_CHECK_STEPS:
            return False
        flag = torch.tensor(float(came.is_set()), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum") > 0)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def progress_bar(config: TrainConfig, step: int, name: str, is_main: bool) -> tqdm:
    """Images done, their rate and the time left; in a file seldom, on a terminal often."""
    return tqdm(
        total=config.steps * config.batch_size,
        initial=step * config.batch_size,
        unit=" images",
        desc=name,
        smoothing=0.05,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=not is_main,
    )


class Meter:
    """Running means of what a step reports, kept on the device: reading them would stall a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.in_a_row = torch.zeros((), dtype=torch.long, device=self.device)
        self.first_bad = torch.zeros((), dtype=torch.long, device=self.device)
        self.start_interval()

    def start_interval(self) -> None:
        """Start new means."""
        self.sums: dict[str, Tensor] = {}  # of finite values, and beside it how many there were
        self.skipped_steps = torch.zeros((), dtype=torch.long, device=self.device)
        self.skipped_images = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Start a new measurement of speed."""
        self.steps = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def state(self, accelerator: Any) -> dict[str, Any]:
        """The interval up to now, for a checkpoint; every process must call.

        Each process's sums by themselves: added up in another order they would round differently.
        """
        sums = accelerator.gather(torch.stack(list(self.sums.values()))[None]).tolist() if self.sums else []
        images = accelerator.gather(torch.tensor([self.skipped_images], device=self.device)).tolist()
        return {
            "sums": [dict(zip(self.sums, rows)) for rows in sums],
            "skipped_images": images,
            "skipped_steps": int(self.skipped_steps),
            "in_a_row": int(self.in_a_row),
            "first_bad": int(self.first_bad),
        }

    def resume(self, state: dict[str, Any] | None, accelerator: Any) -> None:
        """Go on with the interval of a checkpoint; None: it has none.

        With another number of processes than then, the first one takes all.
        """
        self.start_interval()
        if state is None:
            return
        rank, world = accelerator.process_index, accelerator.num_processes
        if len(state["skipped_images"]) == world:
            mine = slice(rank, rank + 1)
        else:
            mine = slice(None) if rank == 0 else slice(0)
        for sums in state["sums"][mine]:
            for name, values in sums.items():
                new = torch.tensor(values, device=self.device)
                self.sums[name] = self.sums[name] + new if name in self.sums else new
        self.skipped_images = sum(state["skipped_images"][mine])
        self.skipped_steps.fill_(state["skipped_steps"])
        self.in_a_row.fill_(state["in_a_row"])
        self.first_bad.fill_(state["first_bad"])

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, terms: dict[str, Tensor]) -> None:
        """Scalars by name; what is not finite is left out of the means."""
        for name, value in terms.items():
            finite = torch.isfinite(value)
            new = torch.stack((torch.where(finite, value, 0).float(), finite.float()))
            self.sums[name] = self.sums[name] + new if name in self.sums else new

    def watch(self, norms: dict[str, Tensor], step: int) -> Tensor:
        """Note a step's gradient norms by network; 1 where one is not finite (as it is where the loss is not), else 0.

        The same on every process without asking: a bad value is bad everywhere after the gradients' all-reduce.
        """
        bad = ~torch.stack([torch.isfinite(norm) for norm in norms.values()]).all()
        first, *others = norms
        self.add({"gradient_norm": norms[first], **{f"{name}/gradient_norm": norms[name] for name in others}})
        self.first_bad = torch.where(bad & (self.in_a_row == 0), step, self.first_bad)
        self.in_a_row = torch.where(bad, self.in_a_row + 1, 0)
        self.skipped_steps += bad
        self.steps += 1
        return bad.float()

    def bad_steps(self) -> tuple[int, int]:
        """How many steps in a row were bad up to now, and the first of them. Waits for the device."""
        return int(self.in_a_row), int(self.first_bad)

    def flush(self, accelerator: Any, state: State, batch_size: int) -> dict[str, float]:
        """Means over the interval and over processes, and the rate."""
        names = list(self.sums)
        sums = accelerator.reduce(torch.stack([self.sums[name] for name in names]), reduction="sum")
        skipped = accelerator.reduce(torch.tensor(self.skipped_images, device=self.device), reduction="sum")
        state.counts["bad_images"] += int(skipped)
        state.counts["skipped_steps"] += int(self.skipped_steps)
        seconds = time.perf_counter() - self.started
        record = {
            "step": state.step,
            "images": state.step * batch_size,
            **{name: total / count for name, (total, count) in zip(names, sums.tolist()) if count},
            "images_per_second": self.steps * batch_size / seconds,
            "data_wait": self.waited / seconds,
            **state.counts,
        }
        self.start_interval()
        return record
