"""The page of an evaluation: numbers with directions, their spread over images, worst and best pictures, protocol."""

import math
from pathlib import Path

from hieratok.core.pictures import error_map, to_pil
from hieratok.core.tables import Table, digits, estimated, flat
from hieratok.evaluation.reconstruction import Pair, ReconstructionMetrics, Shown
from hieratok.evaluation.results import Measured, Result, measured
from hieratok.reports import page as report

TITLES = {
    "reconstruction": "Evaluation of reconstructions",
    "images": "Two sets of images compared",
    "samples": "Evaluation of samples",
}
SUMMARIES = {
    "reconstruction": "Reconstructions by {run} of {n:,} images of {data}, compared with the originals.",
    "images": "{n:,} images of {b}, compared with those of {a}.",
    "samples": "{n:,} generated images of {path}, compared with the real ones of {reference}.",
}


def write(folder: Path, result: Result, metrics: ReconstructionMetrics | None) -> None:
    """Write `index.html` into the folder of a result's metrics.json.

    Args:
        folder: must exist.
        result: from `hieratok.evaluation.protocols`.
        metrics: the images' values, for pairs.
    """
    protocol = result.manifest["protocol"]
    names = {key: value for key, value in result.inputs.items() if isinstance(value, str)}
    warnings = [report.text(f"Warning: {warning}.") for warning in result.warnings]
    found = measured(result.numbers, result.intervals)
    parts = [report.table(metric_table(found)), *warnings]
    if metrics is not None:
        parts += distribution(metrics.psnr_of_images())
    sections = [report.key_figures(key_figures(found)), report.section("Metrics", *parts)]
    if metrics is not None and metrics.shown.pairs:
        sections.append(report.section("Worst and best", *pictures(metrics.shown)))
    facts = {**result.manifest, **{f"input: {key}": value for key, value in result.inputs.items()}}
    caption = "What the numbers depend on. `hieratok evaluate compare` compares two results if this agrees."
    table = report.table(Table(["what", "value"], flat(facts), caption))
    sections.append(report.section("How this was measured", table))
    summary = SUMMARIES[protocol].format(n=result.n, **names)
    report.write_page(folder / "index.html", report.page(TITLES[protocol], summary, sections))


def key_figures(found: list[Measured]) -> list[tuple[str, str]]:
    """The metrics of the finest scale, large."""
    figures = []
    for one in found:
        if not one.metric.is_count:
            better = "" if one.metric.better == "neither" else f", {one.metric.better} is better"
            *_, finest = one.values.values()
            figures.append((f"{digits(finest.mean)} {one.metric.unit}".strip(), one.metric.label + better))
    return figures


def metric_table(found: list[Measured]) -> Table:
    """One row per metric, one column per scale, and explanations; counts of 0 are left out."""
    titles = list(dict.fromkeys(title for one in found for title in one.values))
    rows = []
    for one in found:
        if one.metric.is_count and not any(value.mean for value in one.values.values()):
            continue  # no such images
        better = "" if one.metric.better == "neither" else one.metric.better
        values = [estimated(one.values.get(title)) for title in titles]
        rows.append([one.metric.label, *values, one.metric.unit, better, one.metric.meaning])
    caption = "In brackets: 95% intervals of means over images. " if any(map(has_interval, found)) else ""
    caption += "Each scale is compared with the original resized to it by area. " * (len(titles) > 1)
    header = ["metric", *(title or "value" for title in titles), "unit", "better", "meaning"]
    return Table(header, rows, caption + "metrics.json in the same folder has every digit.")


def has_interval(one: Measured) -> bool:
    """Whether a metric has an interval over images."""
    return any(value.low is not None for value in one.values.values())


def distribution(psnr: list[float]) -> list[report.Html]:
    """A histogram of the images' PSNR, if at least two differ from their originals."""
    finite = [value for value in psnr if not math.isinf(value)]
    if len(finite) < 2:
        return []
    same = len(psnr) - len(finite)
    caption = (
        f"{len(finite):,} images of the finest scale; the line is their mean."
        + f" {same:,} more are identical to their originals." * (same > 0)
    )
    return [report.columns(report.histogram(finite, "PSNR (dB)", caption))]


def pictures(shown: Shown) -> list[report.Html]:
    """A grid of coarse scales, reconstruction, original and error of each pair."""
    first = shown.pairs[0]
    scales = [f"{image.shape[-1]} px" for image in (*first.coarse, first.reconstruction)]
    titles = scales if first.coarse else ["reconstruction"]
    rows = [
        report.Row(pair.name, images_of(pair), f"{title}: {digits(pair.psnr)} dB")
        for title, pairs in shown.worst_and_best().items()
        for pair in pairs
    ]
    caption = (
        "The worst and the best by PSNR of the finest scale. The error is the mean over red, green and blue."
        " Select a picture to enlarge it; arrow keys show the next."
    )
    return [report.picture_grid([*titles, "original", "error"], rows, caption), report.error_scale()]


def images_of(pair: Pair) -> list[report.Image.Image]:
    """The pictures of a pair, in the order of the columns."""
    return [
        to_pil(x)
        for x in (*pair.coarse, pair.reconstruction, pair.original, error_map(pair.reconstruction, pair.original))
    ]
