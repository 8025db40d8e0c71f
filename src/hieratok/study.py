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
from typing import Any, NamedTuple

import numpy as np
import torch

from hieratok import cost, studies
from hieratok.analysis.density import MIN_POINTS
from hieratok.analysis.intervals import CONFIDENCE
from hieratok.analysis.page import make_page as analysis_page
from hieratok.analyze import Analyze, analyze_tokenizer, load_tokenizer
from hieratok.analyze import write as write_analysis
from hieratok.checkpoint import atomic_file
from hieratok.data.images import open_source
from hieratok.evaluation.evaluate import EvaluateReconstruction
from hieratok.losses.reconstruction import ReconstructionLoss
from hieratok.quickstart import hardware, speed
from hieratok.reconstruct import best_device, evaluate_tokenizer
from hieratok.settings import load_run
from hieratok.studies import METRICS, Metric, Row, Size, SizeName, Study
from hieratok.tokenizer.model import HieraTok
from hieratok.training.run_folder import HARMLESS, LOG, flatten, plain, read_lines
from hieratok.training.tokenizer import TokenizerRun, train_tokenizer

DONE = "trained.json"
"""In a finished run's folder: on what, how long and on how many images it was trained."""


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

    run: TokenizerRun
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
    if study.needs != ("cost",):
        if data.path is None:
            raise ValueError(f"size {name} has no images of its own: give --data PATH to train on and --val PATH")
        if data.val_path is None or (options.data and not options.val):
            raise ValueError("results are measured on images that were never trained on: give --val PATH")
    base = with_steps(replace(base, data=data), options.steps)
    return Setup(options, study, name, size, base, Path(options.out or f"studies/{name}"))


def with_steps(run: TokenizerRun, steps: int | None) -> TokenizerRun:
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
    settings = {name: value for name, value in flatten(plain(run)).items() if name not in HARMLESS}
    if run.start_from is not None:
        settings["start_from"] = Path(run.start_from).name  # a hash itself
    settings["images"] = images_sha256(run.data.path) if run.data.path else None
    return Planned(run, setup.out / "runs" / digest(settings))


@functools.cache
def images_sha256(path: str) -> str:
    """SHA-256 of the names and classes of images, in their order."""
    source = open_source(path)
    names = hashlib.sha256()
    for i in range(len(source)):
        names.update(f"{source.name(i)}\0{source.label(i)}\n".encode(errors="surrogateescape"))
    return names.hexdigest()


def digest(settings: dict[str, Any]) -> str:
    """A short name for settings: the first 12 digits of the SHA-256 of their JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def train(planned: Planned) -> None:
    """Train a run, or go on with it; nothing if it is finished. Every process must call."""
    if planned.finished:
        return
    train_tokenizer(planned.run, planned.folder)
    facts = {**speed(read_lines(planned.folder / LOG)), "hardware": hardware(), "torch": torch.__version__}
    write_json(planned.folder / DONE, facts)


# --- The plan ---------------------------------------------------------------------------------------------------------


def plan(setup: Setup) -> str:
    """What would be trained, what is there, and how long the rest takes, as text."""
    runs = {one.folder: one for i, row in setup.rows for seed in range(setup.options.seeds)
            for one in tokenizer_runs(setup, row, seed)} if setup.study.needs != ("cost",) else {}  # fmt: skip
    users: dict[Path, list[str]] = {}
    for i, row in setup.rows:
        for one in tokenizer_runs(setup, row, 0):
            users.setdefault(one.folder, []).append(f"row {i + 1}")
    left = {folder: images_left(one) for folder, one in runs.items()}
    rate, source = throughput(list(runs.values())) if any(left.values()) else (None, "")
    lines, total = [f"{setup.study.title}, size {setup.size_name}, in {setup.out}"], 0.0
    for folder, one in runs.items():
        state = "finished" if one.finished else f"{left[folder]:,} images to train" + " on" * (done_steps(one) > 0)
        time = ""
        if left[folder] and rate:
            hours = left[folder] / rate(one) / 3600
            total += hours
            time = f", {hours_text(hours)}"
        seed = f", seed {one.run.train.seed}" if setup.options.seeds > 1 else ""
        lines.append(f"  {folder}  {', '.join(users.get(folder, ['']))}{seed}: {state}{time}")
    if not runs:
        return "\n".join([*lines, "  nothing to train"])
    unit = "GPU" if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"
    lines.append(f"training left: {hours_text(total)} on one {unit}" + f", {source}" * bool(source))
    return "\n".join([*lines, "evaluation comes on top"])


def hours_text(hours: float) -> str:
    """A duration, readable at any size."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def done_steps(planned: Planned) -> int:
    """Steps up to the newest checkpoint."""
    saved = sorted((planned.folder / "checkpoints").glob("step-*"))
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def images_left(planned: Planned) -> int:
    """Images that training has still to see."""
    train = planned.run.train
    return 0 if planned.finished else (train.steps - done_steps(planned)) * train.batch_size


def throughput(runs: Sequence[Planned]) -> tuple[Callable[[Planned], float], str]:
    """Images per second of any of the runs, and where that is known from.

    From the logs of the study's runs, so far as they have trained; else from a short measurement of the first. Either
    way runs are told apart by the GFLOPs of their tokenizers.
    """
    work = {one.folder: cost.measure(one.run.model).gflops for one in runs}
    logged = [speed(log)["images_per_second"] * work[one.folder]
              for one in runs if (log := read_lines(one.folder / LOG))]  # fmt: skip
    if logged:
        rate, source = sum(logged) / len(logged), f"by the logs of {len(logged)} runs"
    else:
        rate, source = measure_throughput(runs[0].run) * work[runs[0].folder], "by a short measurement without data"
    return lambda one: rate / work[one.folder], source


def measure_throughput(run: TokenizerRun) -> float:
    """Images per second of forward and backward passes on noise, here and now; the first pass does not count."""
    device = best_device()
    size = min(run.train.micro_batch_size or run.train.batch_size, 8 if device.type == "cpu" else 32)
    tokenizer = HieraTok(run.model).to(device)
    loss_config = replace(run.loss, random_trunk=True)  # costs the same, and needs no weights
    criterion = ReconstructionLoss(loss_config, len(run.model.scales)).to(device)
    images = torch.rand(size, 3, run.model.image_size, run.model.image_size, device=device) * 2 - 1
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=run.train.precision == "bf16"):
            pyramid, posterior, _ = tokenizer(images)
            loss, _ = criterion(pyramid, images, posterior)
        loss.backward()
        float(loss.detach())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return size / min(seconds[1:])


# --- Measurements -----------------------------------------------------------------------------------------------------


def run_row(setup: Setup, row: Row, seed: int) -> dict[str, Any]:
    """Train a row's runs and measure what the study needs.

    Returns:
        {"runs": facts of each run, "measured": {need: {name: number}}, "warnings": [...]}.
    """
    planned = tokenizer_runs(setup, row, seed)
    measured: dict[str, dict[str, Any]] = {}
    if "cost" in setup.study.needs:
        numbers = asdict(cost.measure(planned[-1].run.model))
        measured["cost"] = numbers | {"parameters": numbers["parameters"] / 1e6}
    if setup.study.needs == ("cost",):
        return {"runs": [], "measured": measured, "warnings": []}
    for one in planned:
        train(one)
    tokenizer = planned[-1]
    if "reconstruction" in setup.study.needs:
        measured["reconstruction"] = reconstruction(setup, tokenizer)
    for need in ("density", "commutation"):
        if need in setup.study.needs:
            measured[need] = latent_analysis(setup, tokenizer, setup.size.draws if need == "density" else 0)
    warnings = [warning for numbers in measured.values() for warning in numbers.get("warnings", [])]
    return {"runs": [facts(one) for one in planned], "measured": measured, "warnings": warnings}


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
        "warnings": warnings,
        "torch": torch.__version__,
    }


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
