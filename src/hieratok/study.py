"""`hieratok study`: one of the paper's tables or figures at a size that fits the machine, beside the paper's numbers.

Every run lies in OUT/runs under a hash of its settings and data, and every measurement under a hash of its options, so
what is there is used again, by other studies too, and the same command goes on where it was stopped.
"""

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hieratok import cost, studies
from hieratok.analysis.convergence import speed_up
from hieratok.analysis.density import MIN_POINTS
from hieratok.analysis.intervals import CONFIDENCE, summarize
from hieratok.analyze import Analyze, analyze_tokenizer, load_tokenizer
from hieratok.analyze import write as write_analysis
from hieratok.analyze_page import make_page as analysis_page
from hieratok.checkpoint import atomic_file
from hieratok.data.images import open_source
from hieratok.evaluation.evaluate import EvaluateReconstruction, EvaluateSamples, evaluate_samples
from hieratok.evaluation.pixels import psnr
from hieratok.evaluation.reconstruction import area_resize
from hieratok.generation import diffusion, flow
from hieratok.generation.dit import DiT
from hieratok.latents import WriteLatents, write_latents
from hieratok.losses.reconstruction import ReconstructionLoss
from hieratok.quickstart import hardware, speed
from hieratok.reconstruct import best_device, evaluate_tokenizer
from hieratok.sample import Sample, folder_name, read_image, sample, written_sides
from hieratok.settings import load_run
from hieratok.studies import METRICS, Metric, Row, Size, SizeName, Study
from hieratok.tokenizer.model import HieraTok
from hieratok.training.generator import GeneratorEval, GeneratorRun, train_generator
from hieratok.training.run_folder import EVALUATIONS, HARMLESS, LOG, flatten, plain, read_lines
from hieratok.training.tokenizer import TokenizerRun, train_tokenizer

AnyRun = TypeVar("AnyRun", TokenizerRun, GeneratorRun)
DONE = "trained.json"
"""In a finished run's folder: on what, how long and on how many images it was trained."""
CONSISTENCY_SAMPLES = 256
"""At most, for appendix D."""


@dataclass(kw_only=True)
class RunStudy:
    """Run one of the paper's tables or figures, and set the paper's numbers beside its own.

    Example: hieratok study table3; hieratok study table2 --size small --data PHOTOS/train --val PHOTOS/val --plan
    """

    study: str
    """table1 .. table7, figure4, figure5, appendix-b, appendix-d."""
    size: SizeName | None = None
    """tiny: a row in less than a minute on a CPU; small: one GPU, minutes a row; paper: the paper's settings. Default:
    tiny, and paper for table7, which trains nothing."""
    data: str | None = None
    """Images to train on; tiny has ten photos of its own."""
    val: str | None = None
    """Images to judge by, never trained on."""
    out: str | None = None
    """Folder of pages, tables and runs. Default: studies/SIZE."""
    base: str | None = None
    """Recipe or YAML file of the multi-scale tokenizer that rows are variants of, instead of the size's."""
    steps: int | None = None
    """Training steps of every run, instead of the size's."""
    seeds: int = 1
    """Runs of each row; several give intervals."""
    row: int | None = None
    """Run this row alone, from 1, and write no page: for many machines, one a row. Without --row again, the study is
    put together from what they made."""
    plan: bool = False
    """Print what would be trained, what is there, and how long the rest would take; train nothing."""
    features: str = "none"
    """Feature network of FID, as of `hieratok evaluate`. none: no rFID, and no generator is trained."""
    weights: str | None = None
    """File with the feature network's weights. Default: torch's cache."""
    lpips: list[str] = field(default_factory=list)
    """Trunks of LPIPS, each optionally =FILE, as of `hieratok evaluate`."""
    reference: str | None = None
    """Real images that samples are compared with, or an .npz of their statistics. Default: those of --val."""

    def __post_init__(self):
        for name, least in (("seeds", 1), ("steps", 1), ("row", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}")


class Planned(NamedTuple):
    """A run and where it lies."""

    run: TokenizerRun | GeneratorRun
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return (self.folder / DONE).is_file()


@dataclass(frozen=True)
class Setup:
    """What a study's options come to."""

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
        """Index and row of those to be run."""
        wanted = self.options.row
        return [(i, r) for i, r in enumerate(self.study.rows) if r.build and wanted in (None, i + 1)]


def run_study(options: RunStudy) -> dict[str, Any] | None:
    """The command.

    Returns:
        What is in `OUT/STUDY.json`; None with `--plan` or `--row`.

    Raises:
        ValueError, FileNotFoundError: no such study or row, settings, images or weights that do not fit or are missing.
        TrainingError, Stopped: as in training.
    """
    from hieratok import study_page  # reads this module's results

    setup = prepare(options)
    if options.plan:
        print(plan(setup))
        return None
    check_images(setup)
    measured = {}
    for i, row in setup.rows:
        for seed in range(options.seeds):
            print(f"{options.study}, row {i + 1} of {len(setup.study.rows)}: {row.name}, seed {seed}", flush=True)
            measured[i, seed] = run_row(setup, row, seed)
    if os.environ.get("RANK", "0") != "0":
        return None
    if options.row is not None:
        print(f"done. When all rows are: hieratok study {options.study} ... without --row")
        return None
    result = assemble(setup, measured)
    study_page.write(setup.out / options.study, result)
    print(f"written: {setup.out / options.study}.html, .md and .json")
    return result


def prepare(options: RunStudy) -> Setup:
    """Resolve a study's options.

    Raises:
        ValueError, FileNotFoundError: no such study, row or base, or no images.
    """
    study = studies.get(options.study)
    if options.features == "none" and set(study.needs) <= {"generation", "curves"}:
        raise ValueError(
            f"{options.study} compares samples by a distance: give --features NAME, and its weights by --weights FILE"
        )
    name = options.size or ("paper" if study.needs == ("cost",) else "tiny")
    size = studies.SIZES[name]
    if options.row is not None and options.row > len(study.rows):
        raise ValueError(f"--row {options.row}: {options.study} has rows 1 to {len(study.rows)}")
    if options.row is not None and study.rows[options.row - 1].build is None:
        mine = [i + 1 for i, row in enumerate(study.rows) if row.build]
        raise ValueError(f"--row {options.row} is another system's published result; rows to run: {mine}")
    base = size.base() if options.base is None else load_run(options.base).run
    if not isinstance(base, TokenizerRun) or len(base.model.scales) < 2:
        raise ValueError(
            f"--base {options.base}: rows are variants of a tokenizer of several scales, which this is not"
        )
    data = replace(base.data, path=options.data or base.data.path, val_path=options.val or base.data.val_path)
    if study.needs != ("cost",) and not options.plan:
        if data.path is None:
            raise ValueError(f"size {name} has no images of its own: give --data PATH to train on and --val PATH")
        if data.val_path is None or (options.data and not options.val):
            raise ValueError("results are measured on images that were never trained on: give --val PATH")
    base = with_steps(replace(base, data=data), options.steps)
    return Setup(options, study, name, size, base, Path(options.out or f"studies/{name}"))


def with_steps(run: AnyRun, steps: int | None) -> AnyRun:
    """The same run with so many steps, and checkpoints no rarer than its end."""
    if steps is None:
        return run
    return replace(run, train=replace(run.train, steps=steps, save_every=min(run.train.save_every, steps)))


def check_images(setup: Setup) -> None:
    """Before the long part.

    Raises:
        ValueError: too few held-out images for what the study measures.
    """
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
    """Where a run lies: under a hash of all settings that change its weights, and of its images' names and classes."""
    settings = settings_of(run)
    if run.start_from is not None:
        settings["start_from"] = Path(run.start_from).name  # a hash itself
    settings["images"] = images_sha256(run.data.path) if run.data.path else None
    return Planned(run, setup.out / "runs" / digest(settings))


def settings_of(run: TokenizerRun | GeneratorRun) -> dict[str, Any]:
    """The settings that change a run's weights, flat."""
    return {name: value for name, value in flatten(plain(run)).items() if name not in HARMLESS}


def wants_generator(setup: Setup) -> bool:
    """Whether rows need a generator, and its samples can be judged if they must be."""
    needs = set(setup.study.needs)
    return "samples" in needs or (setup.options.features != "none" and bool(needs & {"generation", "guided", "curves"}))


def generator_run(setup: Setup, row: Row, tokenizer: Planned, seed: int) -> Planned:
    """A row's generator, on the tokenizer's latents of its training images; judged ten times while it trains."""
    assert isinstance(tokenizer.run, TokenizerRun)
    shape, images = tokenizer.run.model, tokenizer.run.data.path
    run = with_steps(setup.size.generators[row.generator](), setup.options.steps)
    classes = num_classes(images) if images else run.model.num_classes
    model = replace(run.model, latent_channels=shape.latent_channels, latent_size=shape.scales[-1], num_classes=classes)
    judged = GeneratorEval()
    if setup.options.features != "none" and reference(setup):  # a plan may do without images
        judged = GeneratorEval(
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
        eval=judged,
    )
    settings = settings_of(run) | {"tokenizer": tokenizer.folder.name, "data.path": "latents"}
    return Planned(run, setup.out / "runs" / digest(settings | {"judged": plain(judged)}))  # figure 4 needs its curve


def planned_runs(setup: Setup, row: Row, seed: int) -> list[Planned]:
    """All that a row trains, in order."""
    runs = tokenizer_runs(setup, row, seed)
    return [*runs, generator_run(setup, row, runs[-1], seed)] if wants_generator(setup) else runs


def reference(setup: Setup) -> str | None:
    """What samples are compared with."""
    return setup.options.reference or setup.base.data.val_path


@functools.cache
def images_sha256(path: str) -> str:
    """SHA-256 of the names and classes of images, in their order."""
    source = open_source(path)
    names = hashlib.sha256()
    for i in range(len(source)):
        names.update(f"{source.name(i)}\0{source.label(i)}\n".encode(errors="surrogateescape"))
    return names.hexdigest()


@functools.cache
def num_classes(path: str) -> int:
    """How many classes images have; images without are of one."""
    source = open_source(path)
    return max(1, max(source.label(i) for i in range(len(source))) + 1)


def digest(settings: dict[str, Any]) -> str:
    """A short name for settings: the first 12 digits of the SHA-256 of their JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def train(planned: Planned) -> None:
    """Train a run, or go on with it; nothing if it is finished. Every process must call."""
    if planned.finished:
        return
    if isinstance(planned.run, GeneratorRun):
        assert planned.run.tokenizer is not None
        trained = yaml.safe_load((Path(planned.run.tokenizer) / "config.yaml").read_text())
        write_latents(WriteLatents(run=planned.run.tokenizer, data=trained["data"]["path"], out=planned.run.data.path))
        train_generator(planned.run, planned.folder)
    else:
        train_tokenizer(planned.run, planned.folder)
    facts = {**speed(read_lines(planned.folder / LOG)), "hardware": hardware(), "torch": torch.__version__}
    write_json(planned.folder / DONE, facts)


# --- The plan ---------------------------------------------------------------------------------------------------------


def plan(setup: Setup) -> str:
    """What would be trained, what is there, and how long the rest takes, as text."""
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
        lines.append(f"training left: {total} on one {unit} ({source}); measuring comes on top")
    return "\n".join(lines)


def hours_text(hours: float) -> str:
    """A duration, readable at any size."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes" if hours > 0.02 else (
        f"{3600 * hours:.0f} seconds"
    )  # fmt: skip


def done_steps(planned: Planned) -> int:
    """Steps up to the newest checkpoint."""
    saved = sorted((planned.folder / "checkpoints").glob("step-*"))
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def images_left(planned: Planned) -> int:
    """Images that training has still to see."""
    train = planned.run.train
    return 0 if planned.finished else (train.steps - done_steps(planned)) * train.batch_size


def throughput(runs: Sequence[Planned]) -> tuple[dict[Path, float], str]:
    """Images per second of each run, and where that is known from.

    From the logs of the study's runs of the same kind, so far as they have trained; else from a short measurement of
    one. Either way runs of one kind are told apart by the GFLOPs of their models.
    """
    rates, sources = {}, []
    for kind in dict.fromkeys(one.run.kind for one in runs):
        work = {one: gflops(one.run) for one in runs if one.run.kind == kind}
        logs = {one: log for one in work if (log := read_lines(one.folder / LOG))}
        if logs:
            done = [speed(log)["images_per_second"] * work[one] for one, log in logs.items()]
            rate = sum(done) / len(done)
            sources.append(f"{kind}s by the logs of {len(logs)} of these runs")
        else:
            first = next(iter(work))
            rate = measure_throughput(first.run) * work[first]
            sources.append(f"{kind}s by a short measurement on noise, without data loading")
        rates |= {one.folder: rate / amount for one, amount in work.items()}
    return rates, ", ".join(sources)


def gflops(run: TokenizerRun | GeneratorRun) -> float:
    """Of one forward pass of one image, or latent."""
    if isinstance(run, TokenizerRun):
        return cost.measure(run.model).gflops
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        DiT(run.model).eval()(torch.empty(1, *run.model.latent_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() / 1e9


def measure_throughput(run: TokenizerRun | GeneratorRun) -> float:
    """Images per second of forward and backward passes on noise, here and now; the first pass does not count."""
    device = best_device()
    most = run.train.micro_batch_size or run.train.batch_size
    size = min(most, 16 if device.type == "cuda" else max(1, round(8 / gflops(run))))
    one_pass = training_pass(run, size, device)
    for timed in (False, True):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=run.train.precision == "bf16"):
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
    config = replace(run.loss, random_trunk=True)  # costs the same, and needs no weights
    criterion = ReconstructionLoss(config, len(run.model.scales)).to(device)
    images = torch.rand(size, 3, run.model.image_size, run.model.image_size, device=device) * 2 - 1

    def one_pass() -> Tensor:
        pyramid, posterior, _ = tokenizer(images)
        return criterion(pyramid, images, posterior)[0]

    return one_pass


# --- Measurements -----------------------------------------------------------------------------------------------------


def run_row(setup: Setup, row: Row, seed: int) -> dict[str, Any]:
    """Train a row's runs and measure what the study needs.

    Returns:
        {"runs": facts of each run, "measured": {need: {name: number}}, "warnings": [...]}.
    """
    planned = planned_runs(setup, row, seed)
    measured: dict[str, dict[str, Any]] = {}
    if "cost" in setup.study.needs:
        numbers = asdict(cost.measure(tokenizer_of(planned).run.model))  # type: ignore[arg-type]
        measured["cost"] = numbers | {"parameters": numbers["parameters"] / 1e6}
    if setup.study.needs == ("cost",):
        return {"runs": [], "measured": measured, "warnings": []}
    for one in planned:
        train(one)
    tokenizer = tokenizer_of(planned)
    if "reconstruction" in setup.study.needs:
        measured["reconstruction"] = reconstruction(setup, tokenizer)
    for need in ("density", "commutation"):
        if need in setup.study.needs:
            measured[need] = latent_analysis(setup, tokenizer, setup.size.draws if need == "density" else 0)
    if wants_generator(setup):
        generator = planned[-1]
        if "generation" in setup.study.needs:
            measured["generation"] = generation(setup, tokenizer, generator)
        if "guided" in setup.study.needs:
            measured["guided"] = generation(setup, tokenizer, generator, studies.GUIDANCE)
        if "samples" in setup.study.needs:
            measured["samples"] = consistency(setup, tokenizer, generator)
        if "curves" in setup.study.needs:
            points = read_lines(generator.folder / EVALUATIONS)
            measured["curves"] = {
                "points": points,
                **{k: v for k, v in points[-1].items() if k not in ("step", "images")},
            }
    warnings = [warning for numbers in measured.values() for warning in numbers.get("warnings", [])]
    return {"runs": [facts(one) for one in planned], "measured": measured, "warnings": warnings}


def tokenizer_of(planned: Sequence[Planned]) -> Planned:
    """The last tokenizer of a row's runs."""
    return [one for one in planned if isinstance(one.run, TokenizerRun)][-1]


def facts(planned: Planned) -> dict[str, Any]:
    """What a finished run was."""
    done = json.loads((planned.folder / DONE).read_text())
    seed = planned.run.train.seed
    return {
        "folder": str(planned.folder),
        "kind": planned.run.kind,
        "seed": seed,
        **done,
        "settings": plain(planned.run),
    }


def cached(folder: Path, kind: str, settings: dict[str, Any], measure: Callable[[Path], Any]) -> dict[str, Any]:
    """What `measure` wrote as metrics.json into a folder of its own, by a hash of its settings; measured once."""
    out = folder / "measured" / f"{kind}-{digest(settings)}"
    if not (out / "metrics.json").is_file():
        measure(out)
    return json.loads((out / "metrics.json").read_text())


def reconstruction(setup: Setup, tokenizer: Planned) -> dict[str, Any]:
    """Of the held-out images."""
    options = setup.options
    chosen: dict[str, Any] = {"features": options.features, "weights": options.weights, "lpips": options.lpips}

    def measure(out: Path) -> None:
        evaluate_tokenizer(EvaluateReconstruction(run=str(tokenizer.folder), data=setup.val, out=str(out), **chosen))

    return cached(tokenizer.folder, "reconstruction", chosen | {"images": images_sha256(setup.val)}, measure)


def draw_samples(setup: Setup, tokenizer: Planned, generator: Planned, num: int, cfg: float, scales: Any) -> Path:
    """Samples' folder in the generator's; what is missing is drawn."""
    name = f"samples-{scales}" + f"-cfg{cfg:g}" * (cfg != 1)
    sampler = {"sampler": setup.size.sampler, "steps": setup.size.sampler_steps}
    out = generator.folder / "measured" / f"{name}-{digest(sampler | {'num': num})}"
    if not (out / "samples.npz").is_file():
        sample(
            Sample(
                run=str(generator.folder), tokenizer=str(tokenizer.folder), out=str(out), num=num, cfg=cfg,
                scales=scales, **sampler,
            )
        )  # fmt: skip
    return out


def generation(setup: Setup, tokenizer: Planned, generator: Planned, cfg: float = 1.0) -> dict[str, Any]:
    """Samples against real images."""
    assert isinstance(tokenizer.run, TokenizerRun)
    real = reference(setup)
    assert real is not None
    chosen = {"features": setup.options.features, "weights": setup.options.weights}
    size, num = tokenizer.run.model.image_size, setup.size.samples

    def measure(out: Path) -> None:
        samples = draw_samples(setup, tokenizer, generator, num, cfg, "finest")
        evaluate_samples(
            EvaluateSamples(path=str(samples / "samples.npz"), reference=real, size=size, out=str(out), **chosen)
        )

    facts = {"cfg": cfg, "num": num, "steps": setup.size.sampler_steps, "reference": real}
    facts["images"] = None if real.endswith(".npz") else images_sha256(real)
    return cached(generator.folder, "generation", chosen | facts, measure)


def consistency(setup: Setup, tokenizer: Planned, generator: Planned) -> dict[str, Any]:
    """Samples at every scale: PSNR of each scale's picture against the finest one, area-resized to it (appendix D)."""
    model = HieraTok.from_pretrained(tokenizer.folder)
    num = min(setup.size.samples, CONSISTENCY_SAMPLES)
    out = draw_samples(setup, tokenizer, generator, num, 1.0, "all")
    *coarse, finest = written_sides(
        model, Sample(run=str(generator.folder), tokenizer=str(tokenizer.folder), out=str(out), scales="all")
    )
    result: dict[str, Any] = {"n": num, "folder": str(out)}
    full = torch.stack([read_image(out, finest, i) for i in range(num)])
    for side in coarse:
        own = torch.stack([read_image(out, side, i) for i in range(num)])
        result |= summarize(f"psnr/{folder_name(side)}", psnr(area_resize(full, (side, side)), own))
    return result


def latent_analysis(setup: Setup, tokenizer: Planned, draws: int) -> dict[str, Any]:
    """`hieratok analyze` of the held-out images, and beside its page the embedding; by one process alone."""
    options = Analyze(run=str(tokenizer.folder), data=setup.val, draws=draws)

    def measure(out: Path) -> None:
        codec, side, statistics = load_tokenizer(str(tokenizer.folder), options.device)
        result, embedding, pictures = analyze_tokenizer(codec, open_source(setup.val), side, options, statistics)
        out.mkdir(parents=True, exist_ok=True)
        if embedding is not None:
            labels = embedding.labels if embedding.labels is not None else np.full(len(embedding.points), -1)
            with atomic_file(out / "embedding.npz") as temporary, temporary.open("wb") as file:
                np.savez(file, points=embedding.points, density=embedding.density, labels=labels)
        title = f"Latent space of {tokenizer.folder}"
        summary = "How evenly, regularly and robustly a tokenizer's latents stand for images."
        result["folder"] = str(out)
        write_analysis(out, result, analysis_page(title, summary, result, embedding, pictures))

    if os.environ.get("RANK", "0") != "0":
        return {}
    return cached(tokenizer.folder, "analysis", {"draws": draws, "images": images_sha256(setup.val)}, measure)


# --- Results ----------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean over seeds and its 95% interval; without one for a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def interval(values: Sequence[float]) -> Interval:
    """Student's t on numbers, one a seed."""
    from scipy.stats import t

    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def verdict(paper: float | None, ours: Interval | None) -> str:
    """Whether an effect (a row minus the row it is held against) has the paper's sign.

    Args:
        paper: the paper's effect; None: it gives no numbers.
        ours: the effect's mean over seeds, each seed's row against the same seed's.

    Returns:
        `agrees`, `opposite`, `not resolved` (the interval holds 0, or the effect is 0), or `-` (the paper has none).
    """
    if paper is None or ours is None or round(paper, 9) == 0:
        return "-"
    if ours.mean == 0 or (ours.low is not None and ours.high is not None and ours.low <= 0 <= ours.high):
        return "not resolved"
    return "agrees" if (ours.mean > 0) == (paper > 0) else "opposite"


def names_of(metric: Metric, measured: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The measured numbers that stand in a metric's column, and those of other networks that stand in for it."""
    found = list(dict.fromkeys(name for numbers in measured for name in numbers.get(metric.need, {})))
    exact = [n for n in found if n == metric.key or (metric.key.endswith("-") and n.startswith(metric.key))]
    return exact, [n for n in found if metric.stand_in and n.startswith(metric.stand_in)]


def assemble(setup: Setup, measured: dict[tuple[int, int], dict[str, Any]]) -> dict[str, Any]:
    """The study's result: settings, every row's numbers, and for each metric the paper's, ours and the effects."""
    rows = setup.study.rows
    everything = [numbers["measured"] for numbers in measured.values()]
    comparisons = []
    for name in setup.study.metrics:
        exact, others = names_of(METRICS[name], everything)
        for key in [*exact, *others] or [None]:
            lines = [comparison(setup, measured, name, key, i, is_exact=key in exact) for i in range(len(rows))]
            comparisons.append({"metric": name, "measured": key, "is_metric": key in exact, "rows": lines})
    warnings = list(dict.fromkeys(w for numbers in measured.values() for w in numbers["warnings"]))
    return {
        "study": setup.options.study,
        "title": setup.study.title,
        "columns": setup.study.columns,
        "size": setup.size_name,
        "notes": [setup.size.note if setup.study.needs != ("cost",) else "", setup.study.note],
        "seeds": setup.options.seeds,
        "options": asdict(setup.options),
        "base": plain(setup.base),
        "rows": [
            {
                "label": row.label,
                "against": row.against,
                "paper": row.paper,
                "seeds": [measured[i, seed] for seed in range(setup.options.seeds) if (i, seed) in measured],
            }
            for i, row in enumerate(rows)
        ],
        "comparisons": comparisons,
        "speed_up": curves(setup, measured),
        "warnings": warnings,
        "torch": torch.__version__,
    }


def curves(setup: Setup, measured: dict[tuple[int, int], dict[str, Any]]) -> dict[str, Any] | None:
    """Figure 4: the distances during training of the first row's generators and of the second's, and the speed-up."""
    if "curves" not in setup.study.needs:
        return None
    seeds = range(setup.options.seeds)
    points = [[measured[i, seed]["measured"]["curves"]["points"] for seed in seeds] for i in (0, 1)]
    name = next(n for n in points[0][0][0] if n == "fid" or n.startswith("fd-"))
    steps = [point["step"] for point in points[0][0]]
    base, other = ([[point[name] for point in one] for one in row] for row in points)
    labels = [row.name for row in setup.study.rows[:2]]
    levels = [level._asdict() for level in speed_up(steps, base, other)]
    return {"measured": name, "steps": steps, "curves": dict(zip(labels, (base, other))), "levels": levels}


def comparison(
    setup: Setup, measured: dict[tuple[int, int], dict[str, Any]], name: str, key: str | None, i: int, is_exact: bool
) -> dict[str, Any]:
    """One row's line of one metric."""
    row, metric = setup.study.rows[i], METRICS[name]

    def values(index: int) -> dict[int, float]:
        found = {}
        for seed in range(setup.options.seeds):
            number = measured.get((index, seed), {}).get("measured", {}).get(metric.need, {}).get(key)
            if number is not None:
                found[seed] = number
        return found

    ours, paper = values(i), row.paper.get(name)
    line: dict[str, Any] = {"paper": paper, "ours": interval(list(ours.values()))._asdict() if ours else None}
    line["difference"] = line["ours"]["mean"] - paper if ours and paper is not None and is_exact else None
    if row.against is None:
        return line
    base, paper_base = values(row.against), setup.study.rows[row.against].paper.get(name)
    effect = interval([ours[s] - base[s] for s in ours if s in base]) if set(ours) & set(base) else None
    paper_effect = None if paper is None or paper_base is None else paper - paper_base
    line |= {"paper_effect": paper_effect, "effect": effect._asdict() if effect else None}
    return line | {"verdict": verdict(paper_effect, effect)}


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
