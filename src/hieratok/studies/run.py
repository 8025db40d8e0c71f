"""`hieratok study`: one of the paper's tables or figures at a size that fits the machine, beside the paper's numbers.

Every run lies in OUT/runs under a hash of its settings and data, and every measurement under a hash of its options, so
what is there is used again, by other studies too, and the same command goes on where it was stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from hieratok.analysis.convergence import speed_up
from hieratok.analysis.intervals import summarize
from hieratok.core.checkpoint import atomic_file, remove_leftovers
from hieratok.core.distributed import is_first, process_group
from hieratok.core.estimates import Estimate
from hieratok.core.files import read_json_table
from hieratok.core.lock import lock
from hieratok.core.typed import plain
from hieratok.data.images import open_source
from hieratok.evaluation.pixels import psnr
from hieratok.evaluation.protocols import EvaluateReconstruction, EvaluateSamples, evaluate_samples
from hieratok.evaluation.reconstruction import area_resize
from hieratok.reports import study as study_page
from hieratok.reports.analysis import make_page as analysis_page
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
from hieratok.tasks.analyze import Analyze, analyze_tokenizer, load_tokenizer
from hieratok.tasks.analyze import write as write_analysis
from hieratok.tasks.reconstruct import evaluate_tokenizer
from hieratok.tasks.sample import Sample, folder_name, read_image, sample, written_sides
from hieratok.tokenizer import cost
from hieratok.tokenizer.model import HieraTok
from hieratok.training.run_folder import EVALUATIONS, read_log
from hieratok.training.tokenizer import TokenizerRun

CONSISTENCY_SAMPLES = 256
"""At most, for appendix D."""


def run_study(options: RunStudy) -> dict[str, Any] | None:
    """The command.

    Returns:
        What is in `OUT/STUDY.json`; None with `--plan` or `--row`.

    Raises:
        ValueError, FileNotFoundError: no such study or row, settings, images or weights that do not fit or are missing,
            or another process that runs it in the same folder.
        TrainingError, Stopped: as in training.
    """
    setup = prepare(options)
    if options.plan:
        print(plan(setup))
        return None
    check(setup)
    row = "" if options.row is None else f"-row-{options.row}"
    name = f".{options.study}{row}.lock"  # other studies may run
    with lock(setup.out, f"study {options.study}", name), process_group():
        return _run_study(setup)


def _run_study(setup: Setup) -> dict[str, Any] | None:
    options = setup.options
    measured = {}
    for i, row in setup.rows:
        for seed in range(options.seeds):
            print(f"{options.study}, row {i + 1} of {len(setup.study.rows)}: {row.name}, seed {seed}", flush=True)
            measured[i, seed] = run_row(setup, row, seed)
    if not is_first():
        return None
    if options.row is not None:
        print(f"done. When all rows are: hieratok study {options.study} ... without --row")
        return None
    result = assemble(setup, measured)
    remove_leftovers(setup.out / f"{options.study}.*")
    study_page.write(setup.out / options.study, result)
    print(f"written: {setup.out / options.study}.html, .md and .json")
    return result


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
    if "density" in setup.study.needs:
        measured["density"] = latent_analysis(setup, tokenizer, "vavae", setup.size.draws)
    if "commutation" in setup.study.needs:
        measured["commutation"] = latent_analysis(setup, tokenizer, "ours", draws=0)
    if wants_generator(setup):
        generator = planned[-1]
        if "generation" in setup.study.needs:
            measured["generation"] = generation(setup, tokenizer, generator)
        if "guided" in setup.study.needs:
            measured["guided"] = generation(setup, tokenizer, generator, studies.GUIDANCE)
        if "samples" in setup.study.needs:
            measured["samples"] = consistency(setup, tokenizer, generator)
        if "curves" in setup.study.needs:
            points = read_log(generator.folder / EVALUATIONS)
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
    done = read_json_table(planned.folder / DONE)
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
    with unless_done(out, "metrics.json", "*") as wanted:
        if wanted:
            measure(out)
    return read_json_table(out / "metrics.json")


def reconstruction(setup: Setup, tokenizer: Planned) -> dict[str, Any]:
    """Of the held-out images."""
    options = setup.options
    chosen: dict[str, Any] = {"features": options.features, "weights": options.weights, "lpips": options.lpips}

    def measure(out: Path) -> None:
        evaluate_tokenizer(EvaluateReconstruction(run=str(tokenizer.folder), data=setup.val, out=str(out), **chosen))

    return cached(tokenizer.folder, "reconstruction", chosen | {"images": images_sha256(setup.val)}, measure)


def draw_samples(setup: Setup, tokenizer: Planned, generator: Planned, num: int, cfg: float, scales: Any) -> Path:
    """Samples' folder in the generator's; what is missing or damaged is drawn."""
    name = f"samples-{scales}" + f"-cfg{cfg:g}" * (cfg != 1)
    sampler = {"sampler": setup.size.sampler, "steps": setup.size.sampler_steps}
    out = generator.folder / "measured" / f"{name}-{digest(sampler | {'num': num})}"
    run, decoder = str(generator.folder), str(tokenizer.folder)
    sample(Sample(run=run, tokenizer=decoder, out=str(out), num=num, cfg=cfg, scales=scales, **sampler))
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


def latent_analysis(setup: Setup, tokenizer: Planned, protocol: Literal["ours", "vavae"], draws: int) -> dict[str, Any]:
    """`hieratok analyze` of the held-out images, and beside its page the embedding; by one process alone."""
    options = Analyze(run=str(tokenizer.folder), data=setup.val, protocol=protocol, draws=draws)

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

    if not is_first():
        return {}
    settings = {"protocol": protocol, "draws": draws, "images": images_sha256(setup.val)}
    return cached(tokenizer.folder, "analysis", settings, measure)


# --- Results ----------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean over seeds and its 95% interval; without one for a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def interval(values: Sequence[float]) -> Interval:
    """Student's t on numbers, one a seed."""
    found = Estimate.of(values)
    return Interval(found.mean, found.low, found.high, len(values))


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
    return line | {"verdict": verdict(paper_effect, effect), "counts": name not in row.doubtful}
