"""The plan of a study: its options, its rows' runs with their folders, and estimates of time."""

import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hieratok.analysis.density import MIN_POINTS
from hieratok.core.checkpoint import remove_leftovers, step_folders, step_of, write_json
from hieratok.core.devices import best_device, hardware
from hieratok.core.distributed import is_first, wait
from hieratok.core.files import read_yaml
from hieratok.core.lock import lock
from hieratok.core.precision import autocast
from hieratok.core.typed import plain
from hieratok.data.images import names_sha256, open_source
from hieratok.evaluation.features import load_network
from hieratok.evaluation.protocols import load_perceptual
from hieratok.evaluation.statistics import SetStatistics
from hieratok.generation import diffusion, flow
from hieratok.generation.config import DiTConfig
from hieratok.generation.dit import DiT
from hieratok.losses.reconstruction import ReconstructionLoss
from hieratok.settings import load_run
from hieratok.studies import paper as studies
from hieratok.studies.config import RunStudy, SizeName
from hieratok.studies.paper import Row, Size, Study
from hieratok.studies.results import Trained
from hieratok.tasks.latents import WriteLatents, write_latents
from hieratok.tokenizer import cost
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.scales import Scales
from hieratok.training.config import GeneratorEval
from hieratok.training.generator import GeneratorRun, train_generator
from hieratok.training.run_folder import HARMLESS, LOG, flatten, read_log
from hieratok.training.runs import speed
from hieratok.training.tokenizer import TokenizerRun, train_tokenizer

AnyRun = TypeVar("AnyRun", TokenizerRun, GeneratorRun)
DONE = "trained.json"
"""In a finished run's folder: hardware, time and number of images of the training."""
LOCK = ".study.lock"
"""Lock of one run or measurement, besides that of the command that writes there."""


class Planned(NamedTuple):
    """A run and its folder."""

    run: TokenizerRun | GeneratorRun
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether training is finished."""
        return (self.folder / DONE).is_file()


@dataclass(frozen=True)
class Setup:
    """A study's resolved options."""

    options: RunStudy
    study: Study
    size_name: SizeName
    size: Size
    base: TokenizerRun
    out: Path

    @property
    def val(self) -> str:
        """Held-out images."""
        assert self.base.data.val_path is not None
        return self.base.data.val_path

    @property
    def rows(self) -> list[tuple[int, Row]]:
        """Indices and rows to run."""
        wanted = self.options.row
        return [(i, r) for i, r in enumerate(self.study.rows) if r.build and wanted in (None, i + 1)]


def prepare(options: RunStudy) -> Setup:
    """Resolve and check a study's options.

    Raises:
        ValueError, FileNotFoundError: no such study, row or base, or no images.
    """
    study = studies.with_encoders(studies.get(options.study), options.encoders)
    if options.features == "none" and set(study.needs) <= {"generation", "curves"}:
        raise ValueError(
            f"{options.study} needs a distance of samples: give --features NAME, and its weights with --weights FILE"
        )
    generator_steps = options.steps_of_generators
    if "curves" in study.needs and generator_steps is not None and generator_steps < 3:
        raise ValueError(f"a curve needs at least 3 steps of the generators, not {generator_steps}")
    name = options.size or ("paper" if study.needs == ("cost",) else "tiny")
    size = studies.SIZES[name]
    size = replace(size, samples=options.samples or size.samples)
    if options.row is not None and options.row > len(study.rows):
        raise ValueError(f"--row {options.row}: {options.study} has rows 1 to {len(study.rows)}")
    if options.row is not None and study.rows[options.row - 1].build is None:
        mine = [i + 1 for i, row in enumerate(study.rows) if row.build]
        raise ValueError(f"--row {options.row} is another system's published result; rows to run: {mine}")
    base = size.base() if options.base is None else load_run(options.base).run
    if not isinstance(base, TokenizerRun) or len(base.model.scales) < 2:
        raise ValueError(f"--base {options.base}: rows need a tokenizer of several scales, which this is not")
    data = replace(base.data, path=options.data or base.data.path, val_path=options.val or base.data.val_path)
    if study.needs != ("cost",) and not options.plan:
        if data.path is None:
            raise ValueError(f"size {name} comes without images: give --data PATH to train on and --val PATH")
        if data.val_path is None or (options.data and not options.val):
            raise ValueError("results are measured on held-out images: give --val PATH")
    base = with_steps(replace(base, data=data), options.steps)
    return Setup(options, study, name, size, base, Path(options.out or f"studies/{name}"))


def with_steps(run: AnyRun, steps: int | None) -> AnyRun:
    """The same run with `steps` steps, and at least one checkpoint."""
    if steps is None:
        return run
    return replace(run, train=replace(run.train, steps=steps, save_every=min(run.train.save_every, steps)))


def check(setup: Setup) -> None:
    """Find errors that would otherwise appear after hours of training.

    Raises:
        ValueError, FileNotFoundError: an unknown feature network, missing weights, a missing reference or one of
            another network, or too few held-out images.
    """
    if setup.options.features != "none":
        network = load_network(setup.options.features, setup.options.weights, "cpu")
        real = reference(setup)
        if compares_samples(setup) and real is None:
            raise ValueError(f"size {setup.size_name} needs {setup.size.gfid_reference}: give it with --reference FILE")
        if compares_samples(setup) and real and real.endswith(".npz"):
            SetStatistics.load(real, network)
    load_perceptual(setup.options.lpips, "cpu")
    if "density" in setup.study.needs:
        found = len(open_source(setup.val))
        if found < MIN_POINTS:
            raise ValueError(
                f"{setup.options.study} measures a density, which needs at least {MIN_POINTS} held-out images, and"
                f" {setup.val} has {found}: give --data PATH and --val PATH"
            )


# --- Runs -------------------------------------------------------------------------------------------------------------


def tokenizer_runs(setup: Setup, row: Row, seed: int) -> list[Planned]:
    """A row's tokenizer: one run, or two stages of which the second starts from the first."""
    assert row.build is not None
    run = row.build(setup.base)
    run = replace(run, train=replace(run.train, seed=run.train.seed + seed))
    planned = [place(setup, run)]
    if row.stage2:
        second = setup.size.stage2()
        train = replace(second.train, seed=second.train.seed + seed, picture_every=run.train.picture_every)
        second = replace(second, model=run.model, data=run.data, loss=run.loss, train=train)
        second = with_steps(second, setup.options.steps)
        planned.append(place(setup, replace(second, start_from=str(planned[0].folder))))
    return planned


def place(setup: Setup, run: TokenizerRun) -> Planned:
    """A run's folder, named by a hash of all settings that change its weights, and of its images' names and classes."""
    settings = settings_of(run)
    if run.start_from is not None:
        settings["start_from"] = Path(run.start_from).name  # already a hash
    settings["images"] = images_sha256(run.data.path) if run.data.path else None
    return Planned(run, setup.out / "runs" / digest(settings))


def settings_of(run: TokenizerRun | GeneratorRun) -> dict[str, Any]:
    """The settings that change a run's weights, flat."""
    return {name: value for name, value in flatten(plain(run)).items() if name not in HARMLESS}


def wants_generator(setup: Setup) -> bool:
    """Whether rows need a generator whose samples can be evaluated."""
    return "samples" in setup.study.needs or compares_samples(setup)


def compares_samples(setup: Setup) -> bool:
    """Whether generators' samples are compared with real images."""
    return setup.options.features != "none" and not {"generation", "guided", "curves"}.isdisjoint(setup.study.needs)


def generator_run(setup: Setup, row: Row, tokenizer: Planned, seed: int) -> Planned:
    """A row's generator, on the tokenizer's latents of its training images; evaluated ten times while it trains."""
    assert isinstance(tokenizer.run, TokenizerRun)
    shape, images = tokenizer.run.model, tokenizer.run.data.path
    run = with_steps(setup.size.generators[row.generator](), setup.options.steps_of_generators)
    classes = num_classes(images) if images else run.model.num_classes
    model = on_latents(run.model, shape.latent_channels, shape.scales[-1], classes)
    evaluation = GeneratorEval()
    if setup.options.features != "none" and reference(setup):  # a plan needs no images
        evaluation = GeneratorEval(
            every=max(1, run.train.steps // 10),
            num_images=setup.size.curve_samples,
            reference=reference(setup),
            features=setup.options.features,
            weights=setup.options.weights,
            steps=min(setup.size.sampler_steps, GeneratorEval.steps),
        )
    run = replace(
        run,
        tokenizer=str(tokenizer.folder),
        model=model,
        data=replace(run.data, path=str(tokenizer.folder / "latents"), num_workers=tokenizer.run.data.num_workers),
        train=replace(run.train, seed=run.train.seed + seed),
        eval=evaluation,
    )
    settings = settings_of(run) | {"tokenizer": tokenizer.folder.name, "data.path": "latents"}
    return Planned(
        run, setup.out / "runs" / digest(settings | {"judged": plain(evaluation)})
    )  # figure 4 needs its curve


def on_latents(model: DiTConfig, channels: int, side: int, num_classes: int) -> DiTConfig:
    """A generator's shape for latents; with RAE's wide head and shift of times where they have more channels than its
    tokens. [ours]"""
    fitting: dict[str, Any] = {"latent_channels": channels, "latent_size": side, "num_classes": num_classes}
    if channels > model.width:
        width = math.ceil(channels / (4 * model.heads)) * 4 * model.heads
        fitting |= {"wide_width": width, "wide_depth": 2, "wide_heads": model.heads}
        fitting |= {"time_shift": "dimension"} if model.objective == "flow" else {}
    return replace(model, **fitting)


def planned_runs(setup: Setup, row: Row, seed: int) -> list[Planned]:
    """All runs of a row, in order."""
    runs = tokenizer_runs(setup, row, seed)
    return [*runs, generator_run(setup, row, runs[-1], seed)] if wants_generator(setup) else runs


def reference(setup: Setup) -> str | None:
    """The reference for samples; None if not given yet."""
    return setup.options.reference or (None if setup.size.gfid_reference else setup.base.data.val_path)


@functools.cache
def images_sha256(path: str) -> str:
    """SHA-256 of the names and classes of images, in order."""
    return names_sha256(open_source(path))


@functools.cache
def num_classes(path: str) -> int:
    """The number of classes; 1 for images without classes."""
    source = open_source(path)
    return max(1, max(source.label(i) for i in range(len(source))) + 1)


def digest(settings: dict[str, Any]) -> str:
    """A short hash of settings: the first 12 digits of the SHA-256 of their JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def train(planned: Planned) -> None:
    """Train or resume a run, unless it is finished. Every process must call it."""
    with unless_done(planned.folder, DONE, DONE) as wanted:
        if wanted:
            _train(planned)


@contextlib.contextmanager
def unless_done(folder: Path, mark: str, written: str) -> Iterator[bool]:
    """Whether the block has to do its work in a folder, which is locked; every process must call it.

    Args:
        folder: to work in.
        mark: the file that is written last: if it exists, the work is done.
        written: pattern of the files that the block writes; temporary files of killed processes are removed.

    Raises:
        ValueError: another study works there.
    """
    if (folder / mark).is_file() and not (folder / LOCK).exists():
        yield False
        return
    with lock(folder, "study", LOCK):  # the lock's file may be a killed process's
        if is_first():
            remove_leftovers(folder / written)
        yield not (folder / mark).is_file()


def _train(planned: Planned) -> None:
    if isinstance(planned.run, GeneratorRun):
        assert planned.run.tokenizer is not None
        trained = flatten(read_yaml(Path(planned.run.tokenizer) / "config.yaml"))
        write_latents(WriteLatents(run=planned.run.tokenizer, data=trained["data.path"], out=planned.run.data.path))
        train_generator(planned.run, planned.folder)
    else:
        train_tokenizer(planned.run, planned.folder)
    pace = speed(read_log(planned.folder / LOG))
    if is_first():
        write_json(planned.folder / DONE, asdict(Trained(*pace, hardware(), torch.__version__)))
    wait()


# --- The plan ---------------------------------------------------------------------------------------------------------


def plan(setup: Setup) -> str:
    """The plan as text: runs, their state, and the estimated time."""
    title = f"{setup.study.title}, size {setup.size_name}, in {setup.out}"
    if setup.study.needs == ("cost",):
        return f"{title}\n  nothing to train"
    runs: dict[Path, Planned] = {}
    users: dict[Path, list[int]] = {}
    for i, row in setup.rows:
        for seed in range(setup.options.seeds):
            for one in planned_runs(setup, row, seed):
                runs[one.folder] = one
                users.setdefault(one.folder, []).append(i + 1)
    left = {folder: images_left(one) for folder, one in runs.items()}
    rates, source = throughput(list(runs.values())) if any(left.values()) else ({}, "")
    hours = {folder: images / rates[folder] / 3600 for folder, images in left.items() if images}
    lines = [title]
    for folder, one in runs.items():
        steps = one.run.train.steps
        state = "finished" if one.finished else f"{one.run.train.steps - done_steps(one):,} of {steps:,} steps to train"
        estimate = f", {hours_text(hours[folder])}" if folder in hours else ""
        rows = ", ".join(map(str, dict.fromkeys(users[folder])))
        lines.append(f"  {folder}  {one.run.kind}, seed {one.run.train.seed}, rows {rows}: {state}{estimate}")
    if hours:
        unit = "GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        total = hours_text(sum(hours.values()))
        lines.append(f"training left: {total} on one {unit} ({source}); without measurements")
    return "\n".join(lines)


def hours_text(hours: float) -> str:
    """A duration as text."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes" if hours > 0.02 else (
        f"{3600 * hours:.0f} seconds"
    )  # fmt: skip


def done_steps(planned: Planned) -> int:
    """Steps up to the newest checkpoint."""
    saved = step_folders(planned.folder)
    return step_of(saved[0]) if saved else 0


def images_left(planned: Planned) -> int:
    """Number of images that training has still to see."""
    train = planned.run.train
    return 0 if planned.finished else (train.steps - done_steps(planned)) * train.batch_size


def throughput(runs: Sequence[Planned]) -> tuple[dict[Path, float], str]:
    """Images per second of each run, and the source of that estimate.

    From the logs of the study's runs of the same kind if there are any, else from a short measurement of one; scaled by
    the models' GFLOPs.
    """
    rates, sources = {}, []
    for kind in dict.fromkeys(one.run.kind for one in runs):
        work = {one: gflops(one.run) for one in runs if one.run.kind == kind}
        logs = {one: log for one in work if (log := read_log(one.folder / LOG))}
        if logs:
            done = [speed(log).images_per_second * work[one] for one, log in logs.items()]
            rate = sum(done) / len(done)
            sources.append(f"{kind}s by the logs of {len(logs)} of these runs")
        else:
            first = next(iter(work))
            rate = measure_throughput(first.run) * work[first]
            sources.append(f"{kind}s by a short measurement on noise, without data loading")
        rates |= {one.folder: rate / amount for one, amount in work.items()}
    return rates, ", ".join(sources)


def gflops(run: TokenizerRun | GeneratorRun) -> float:
    """GFLOPs of one forward pass of one image or latent."""
    if isinstance(run, TokenizerRun):
        return cost.measure(run.model).gflops
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        DiT(run.model).eval()(torch.empty(1, *run.model.latent_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() / 1e9


def measure_throughput(run: TokenizerRun | GeneratorRun) -> float:
    """Images per second of forward and backward passes on noise, measured now; the first pass does not count."""
    device = best_device()
    most = run.train.micro_batch_size or run.train.batch_size
    size = min(most, 16 if device.type == "cuda" else max(1, round(8 / gflops(run))))
    one_pass = training_pass(run, size, device)
    for timed in (False, True):
        start = time.perf_counter()
        with autocast(device, run.train.precision):
            loss = one_pass()
        loss.backward()
        float(loss.detach())  # waits for the device
        seconds = time.perf_counter() - start
        if timed:
            return size / seconds
    raise AssertionError


def training_pass(run: TokenizerRun | GeneratorRun, size: int, device: torch.device) -> Callable[[], Tensor]:
    """A forward pass and its loss, on noise."""
    if isinstance(run, GeneratorRun):
        generator = DiT(run.model).to(device)
        z = torch.randn(size, *run.model.latent_shape, device=device)
        labels = torch.zeros(size, dtype=torch.long, device=device)
        loss_of = diffusion.loss if run.model.objective == "ddpm" else flow.loss
        return lambda: loss_of(generator, z, labels)[0]
    tokenizer = HieraTok(run.model).to(device)
    config = replace(run.loss, random_trunk=True)  # the same cost, without weights
    criterion = ReconstructionLoss(config, Scales.of(run.model.scales, run.model.grid)).to(device)
    images = torch.rand(size, 3, run.model.image_size, run.model.image_size, device=device) * 2 - 1

    def one_pass() -> Tensor:
        pyramid, posterior, _ = tokenizer(images)
        return criterion(pyramid, images, posterior)[0]

    return one_pass
