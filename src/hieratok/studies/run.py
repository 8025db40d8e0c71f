"""`hieratok study`: one of the paper's tables or figures at a chosen size, compared with the paper's numbers.

Every run is in OUT/runs under a hash of its settings and data, and every measurement under a hash of its options. So
finished ones are used again, by other studies too, and the same command resumes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from hieratok.analysis.convergence import speed_up
from hieratok.analysis.intervals import summarize
from hieratok.analysis.report import LatentReport
from hieratok.core.checkpoint import remove_leftovers, write_json
from hieratok.core.distributed import is_first, process_group
from hieratok.core.estimates import Estimate
from hieratok.core.files import read_json_table, shown
from hieratok.core.lock import lock
from hieratok.core.typed import from_json
from hieratok.data.images import open_source
from hieratok.evaluation.pixels import psnr
from hieratok.evaluation.protocols import EvaluateReconstruction, EvaluateSamples, evaluate_samples
from hieratok.evaluation.reconstruction import area_resize
from hieratok.evaluation.results import Result
from hieratok.studies import paper as studies
from hieratok.studies.paper import METRICS, Metric, Row
from hieratok.studies.plan import (
    DONE,
    Planned,
    RunStudy,
    Setup,
    check,
    digest,
    images_sha256,
    plan,
    planned_runs,
    prepare,
    reference,
    train,
    unless_done,
    wants_generator,
)
from hieratok.studies.results import (
    EMBEDDING,
    Agreement,
    Cell,
    ComparedCurves,
    ComparedRow,
    Comparison,
    Curve,
    Effect,
    FinishedRun,
    Interval,
    Measured,
    StudyResult,
    StudyRow,
    Trained,
    Verdict,
)
from hieratok.tasks import analyze
from hieratok.tasks.analyze import Analyze, analyze_tokenizer, load_tokenizer
from hieratok.tasks.reconstruct import evaluate_tokenizer
from hieratok.tasks.sample import Sample, folder_name, read_image, sample, written_sides
from hieratok.tokenizer import cost
from hieratok.tokenizer.model import HieraTok
from hieratok.training.run_folder import EVALUATIONS, read_log
from hieratok.training.tokenizer import TokenizerRun

CONSISTENCY_SAMPLES = 256
"""Largest number of samples for appendix D."""


# Writes pages next to STUDY.json, whose path without suffix it gets. Studies do not depend on reports.
WritePage = Callable[[Path, StudyResult], None]
Cells = Mapping[tuple[int, int], Cell]
"""Cells by index of the row and seed."""
SampleScales = Literal["finest", "all"]


def run_study(
    options: RunStudy, write_page: WritePage | None = None, write_analysis: analyze.WritePage | None = None
) -> StudyResult | None:
    """The command.

    Args:
        options: of the command.
        write_page: writes pages next to OUT/STUDY.json.
        write_analysis: writes the page of each analysis of latents.

    Returns:
        The content of `OUT/STUDY.json`; None with `--plan` or `--row`.

    Raises:
        ValueError, FileNotFoundError: an unknown study or row; settings, images or weights that do not fit or are
            missing; or another process that runs the study in the same folder.
        TrainingError, Stopped: as in training.
    """
    setup = prepare(options)
    if options.plan:
        print(plan(setup))
        return None
    check(setup)
    row = "" if options.row is None else f"-row-{options.row}"
    name = f".{options.study}{row}.lock"  # other studies may run in the folder
    with lock(setup.out, f"study {options.study}", name), process_group():
        return _run_study(setup, write_page, write_analysis)


def _run_study(
    setup: Setup, write_page: WritePage | None, write_analysis: analyze.WritePage | None
) -> StudyResult | None:
    options = setup.options
    cells = {}
    for i, row in setup.rows:
        for seed in range(options.seeds):
            print(f"{options.study}, row {i + 1} of {len(setup.study.rows)}: {row.name}, seed {seed}", flush=True)
            cells[i, seed] = run_row(setup, row, seed, write_analysis)
    if not is_first():
        return None
    if options.row is not None:
        print(f"done. When all rows are done: hieratok study {options.study} ... without --row")
        return None
    result = assemble(setup, cells)
    stem = setup.out / options.study
    stem.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(setup.out / f"{options.study}.*")
    write_json(stem.with_suffix(".json"), result.to_json())
    if write_page is not None:
        write_page(stem, result)
    print(f"written: {stem}" + (".html, .md and .json" if write_page else ".json"))
    return result


# --- Measurements -----------------------------------------------------------------------------------------------------


def run_row(setup: Setup, row: Row, seed: int, write_analysis: analyze.WritePage | None = None) -> Cell:
    """Train a row's runs and make the study's measurements."""
    planned = planned_runs(setup, row, seed)
    needs = setup.study.needs
    tokenizer = tokenizer_of(planned)
    found = Measured()
    if "cost" in needs:
        assert isinstance(tokenizer.run, TokenizerRun)
        found = replace(found, cost=cost.measure(tokenizer.run.model))
    if needs == ("cost",):
        return Cell(measured=found)

    for one in planned:
        train(one)

    if "reconstruction" in needs:
        found = replace(found, reconstruction=reconstruction(setup, tokenizer))
    if "density" in needs:
        density = latent_analysis(setup, tokenizer, "vavae", setup.size.draws, write_analysis)
        found = replace(found, density=density)
    if "commutation" in needs:
        found = replace(found, commutation=latent_analysis(setup, tokenizer, "ours", 0, write_analysis))
    if "spectrum" in needs:
        found = replace(found, spectrum=latent_analysis(setup, tokenizer, "ours", 0, write_analysis))
    if wants_generator(setup):
        found = measure_generator(setup, tokenizer, planned[-1], found)
    return Cell([finished(one) for one in planned], found, found.warnings)


def measure_generator(setup: Setup, tokenizer: Planned, generator: Planned, found: Measured) -> Measured:
    """Add the measurements of a row's generator."""
    needs = setup.study.needs
    if "generation" in needs:
        found = replace(found, generation=generation(setup, tokenizer, generator))
    if "guided" in needs:
        found = replace(found, guided=generation(setup, tokenizer, generator, studies.GUIDANCE))
    if "samples" in needs:
        found = replace(found, samples=consistency(setup, tokenizer, generator))
    if "curves" in needs:
        found = replace(found, curves=Curve(read_log(generator.folder / EVALUATIONS)))
    return found


def tokenizer_of(planned: Sequence[Planned]) -> Planned:
    """The last tokenizer of a row's runs."""
    return [one for one in planned if isinstance(one.run, TokenizerRun)][-1]


def finished(planned: Planned) -> FinishedRun:
    """The facts of a finished run.

    Raises:
        ValueError: its `trained.json` is damaged.
    """
    path = planned.folder / DONE
    return FinishedRun(str(planned.folder), planned.run, from_json(Trained, read_json_table(path), shown(path)))


def cached(folder: Path, kind: str, settings: dict[str, Any], measure: Callable[[Path], object]) -> Path:
    """The `metrics.json` that `measure` writes, once, into a folder named by a hash of its settings."""
    out = folder / "measured" / f"{kind}-{digest(settings)}"
    with unless_done(out, "metrics.json", "*") as wanted:
        if wanted:
            measure(out)
    return out / "metrics.json"


def reconstruction(setup: Setup, tokenizer: Planned) -> Result:
    """Evaluate reconstructions of the held-out images."""
    options = setup.options
    chosen: dict[str, Any] = {"features": options.features, "weights": options.weights, "lpips": options.lpips}
    chosen |= {"scales": True} if setup.study.every_scale else {}

    def measure(out: Path) -> None:
        evaluate_tokenizer(EvaluateReconstruction(run=str(tokenizer.folder), data=setup.val, out=str(out), **chosen))

    settings = chosen | {"images": images_sha256(setup.val)}
    return Result.read(cached(tokenizer.folder, "reconstruction", settings, measure))


def draw_samples(
    setup: Setup, tokenizer: Planned, generator: Planned, num: int, cfg: float, scales: SampleScales
) -> Path:
    """The folder of samples within the generator's; missing or damaged ones are drawn."""
    name = f"samples-{scales}" + f"-cfg{cfg:g}" * (cfg != 1)
    sampler = {"sampler": setup.size.sampler, "steps": setup.size.sampler_steps}
    out = generator.folder / "measured" / f"{name}-{digest(sampler | {'num': num})}"
    run, decoder = str(generator.folder), str(tokenizer.folder)
    sample(Sample(run=run, tokenizer=decoder, out=str(out), num=num, cfg=cfg, scales=scales, **sampler))
    return out


def generation(setup: Setup, tokenizer: Planned, generator: Planned, cfg: float = 1.0) -> Result:
    """Evaluate samples against real images."""
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
    return Result.read(cached(generator.folder, "generation", chosen | facts, measure))


def consistency(setup: Setup, tokenizer: Planned, generator: Planned) -> Agreement:
    """PSNR of each scale of samples against the finest one, area-resized to it (appendix D)."""
    model = HieraTok.from_pretrained(tokenizer.folder)
    num = min(setup.size.samples, CONSISTENCY_SAMPLES)
    out = draw_samples(setup, tokenizer, generator, num, 1.0, "all")
    *coarse, finest = written_sides(
        model, Sample(run=str(generator.folder), tokenizer=str(tokenizer.folder), out=str(out), scales="all")
    )
    agreement = {}
    full = torch.stack([read_image(out, finest, i) for i in range(num)])
    for side in coarse:
        own = torch.stack([read_image(out, side, i) for i in range(num)])
        agreement[folder_name(side)] = summarize(psnr(area_resize(full, (side, side)), own))
    return Agreement(num, str(out), agreement)


def latent_analysis(
    setup: Setup,
    tokenizer: Planned,
    protocol: Literal["ours", "vavae"],
    draws: int,
    write_page: analyze.WritePage | None,
) -> LatentReport | None:
    """`hieratok analyze` of the held-out images, with the embedding as a file; in one process, None in the others."""
    if not is_first():
        return None
    options = Analyze(run=str(tokenizer.folder), data=setup.val, protocol=protocol, draws=draws)

    def measure(out: Path) -> None:
        codec, side, statistics = load_tokenizer(str(tokenizer.folder), options.device)
        found = analyze_tokenizer(codec, open_source(setup.val), side, options, statistics)
        out.mkdir(parents=True, exist_ok=True)
        if found.embedding is not None:
            found.embedding.save(out / EMBEDDING)
        analyze.write(out, replace(found, report=replace(found.report, folder=str(out))), write_page)

    settings = {"protocol": protocol, "draws": draws, "images": images_sha256(setup.val)}
    return LatentReport.read(cached(tokenizer.folder, "analysis", settings, measure))


# --- Results ----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> Interval:
    """Mean and interval (Student's t) of one number per seed."""
    found = Estimate.of(values)
    return Interval(found.mean, found.low, found.high, len(values))


def verdict(paper: float | None, ours: Interval | None) -> Verdict:
    """Whether an effect (a row minus its reference row) has the paper's sign.

    Args:
        paper: the paper's effect; None: it gives no numbers.
        ours: the mean over seeds of the differences at the same seed.

    Returns:
        `agrees`, `opposite`, `not resolved` (the interval holds 0, or the effect is 0), or `-` (the paper has none).
    """
    if paper is None or ours is None or round(paper, 9) == 0:
        return "-"
    if ours.mean == 0 or (ours.low is not None and ours.high is not None and ours.low <= 0 <= ours.high):
        return "not resolved"
    return "agrees" if (ours.mean > 0) == (paper > 0) else "opposite"


def names_of(metric: Metric, cells: Cells) -> tuple[list[str], list[str]]:
    """Names of the measured numbers for a metric's column, and of other networks' stand-ins for it."""
    found = list(dict.fromkeys(name for cell in cells.values() for name in cell.measured.numbers(metric.need)))
    exact = [n for n in found if n == metric.key or (metric.key.endswith("-") and n.startswith(metric.key))]
    return exact, [n for n in found if metric.stand_in and n.startswith(metric.stand_in)]


def assemble(setup: Setup, cells: Cells) -> StudyResult:
    """The study's result from its cells."""
    rows = setup.study.rows
    comparisons = []
    for name in setup.study.metrics:
        exact, others = names_of(METRICS[name], cells)
        for key in [*exact, *others] or [None]:
            lines = [compared_row(setup, cells, name, key, i, is_exact=key in exact) for i in range(len(rows))]
            comparisons.append(Comparison(name, key, key in exact, lines))
    return StudyResult(
        title=setup.study.title,
        columns=setup.study.columns,
        size=setup.size_name,
        notes=[setup.size.note if setup.study.needs != ("cost",) else "", setup.study.note],
        options=setup.options,
        base=setup.base,
        rows=[
            StudyRow(
                row.label,
                row.against,
                row.paper,
                [cells[i, seed] for seed in range(setup.options.seeds) if (i, seed) in cells],
            )
            for i, row in enumerate(rows)
        ],
        comparisons=comparisons,
        speed_up=compared_curves(setup, cells),
        warnings=list(dict.fromkeys(warning for cell in cells.values() for warning in cell.warnings)),
        torch=torch.__version__,
    )


def compared_curves(setup: Setup, cells: Cells) -> ComparedCurves | None:
    """Figure 4: the distances during training of the first and second row's generators, and the speed-up."""
    if setup.study.needs != ("curves",):
        return None
    curves = [[curve_of(cells[i, seed]) for seed in range(setup.options.seeds)] for i in (0, 1)]
    first = curves[0][0]
    name, steps = first.distance, [int(point["step"]) for point in first.points]
    base, other = ([[point[name] for point in one.points] for one in row] for row in curves)
    labels = [row.name for row in setup.study.rows[:2]]
    return ComparedCurves(name, steps, dict(zip(labels, (base, other))), speed_up(steps, base, other))


def curve_of(cell: Cell) -> Curve:
    """The evaluations of a row's generator."""
    assert cell.measured.curves is not None
    return cell.measured.curves


def compared_row(setup: Setup, cells: Cells, name: str, key: str | None, i: int, is_exact: bool) -> ComparedRow:
    """One row's line of one metric."""
    row, metric = setup.study.rows[i], METRICS[name]

    def values(index: int) -> dict[int, float]:
        """Values by seed, if measured and finite."""
        found = {}
        for seed in range(setup.options.seeds):
            cell = cells.get((index, seed))
            number = cell.measured.numbers(metric.need).get(key) if cell and key else None
            if number is not None and not math.isnan(number):
                found[seed] = number
        return found

    values_here, paper = values(i), row.paper.get(name)
    ours = interval(list(values_here.values())) if values_here else None
    difference = ours.mean - paper if ours and paper is not None and is_exact else None
    if row.against is None:
        return ComparedRow(paper, ours, difference, effect=None)

    base, paper_base = values(row.against), setup.study.rows[row.against].paper.get(name)
    pairs = [value - base[seed] for seed, value in values_here.items() if seed in base]
    effect = interval(pairs) if pairs else None
    paper_effect = None if paper is None or paper_base is None else paper - paper_base
    compared = Effect(paper_effect, effect, verdict(paper_effect, effect), counts=name not in row.doubtful)
    return ComparedRow(paper, ours, difference, compared)
