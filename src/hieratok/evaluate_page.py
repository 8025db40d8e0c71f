"""The page of an evaluation: what was measured and which way is better, the worst and best pictures, the protocol."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hieratok import report
from hieratok.evaluation.reconstruction import Shown
from hieratok.evaluation.results import describe
from hieratok.pictures import to_pil

TITLES = {
    "reconstruction": "Reconstructions judged",
    "images": "Two sets of images compared",
    "samples": "Samples judged",
}
SUMMARIES = {
    "reconstruction": "How close {run} comes to {n:,} images of {data} that it encodes and decodes.",
    "images": "How close {n:,} images of {b} are to those of {a}.",
    "samples": "How {n:,} generated images of {path} compare with the real ones of {reference}.",
}


def write(folder: Path, result: Mapping[str, Any], shown: Shown | None) -> None:
    """Write `index.html` into the folder of a result's metrics.json.

    Args:
        folder: there already.
        result: as `hieratok.evaluation.evaluate` returns it.
        shown: its worst and best reconstructions, if it has any.
    """
    protocol = result["manifest"]["protocol"]
    names = {key: value for key, value in result["inputs"].items() if isinstance(value, str)}
    warnings = [report.text(f"Warning: {warning}.") for warning in result["warnings"]]
    sections = [
        report.key_figures(key_figures(result)),
        report.section("Metrics", metric_table(result), *warnings),
    ]
    if shown is not None and shown.pairs:
        sections.append(report.section("Worst and best", pictures(shown)))
    facts = {**result["manifest"], **{f"input: {key}": value for key, value in result["inputs"].items()}}
    caption = "What the numbers depend on. `hieratok evaluate compare` sets two results side by side if this agrees."
    sections.append(
        report.section("How this was measured", report.table(["what", "value"], list(flat(facts)), caption))
    )
    summary = SUMMARIES[protocol].format(n=result["n"], **names)
    report.write_page(folder / "index.html", report.page(TITLES[protocol], summary, sections))


def key_figures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metrics, large."""
    figures = []
    for key, value in result.items():
        metric = describe(key)
        if metric is not None and not metric.is_count:
            better = "" if metric.better == "neither" else f", {metric.better} is better"
            figures.append((f"{digits(value)} {metric.unit}".strip(), metric.label + better))
    return figures


def metric_table(result: Mapping[str, Any]) -> report.Html:
    """A row a metric, a column a scale, and what each one means."""
    scales: dict[str, Mapping[str, Any]] = {f"{k} px": v for k, v in result.get("scales", {}).items()}
    columns = scales or {"value": result}
    rows = []
    for key in result:
        metric = describe(key)
        if metric is not None:
            values = [digits(column.get(key)) for column in columns.values()]
            better = "" if metric.better == "neither" else metric.better
            rows.append([metric.label, *values, metric.unit, better, metric.meaning])
    caption = "Columns are scales, each held against the original resized to it by area. " if scales else ""
    header = ["metric", *columns, "unit", "better", "meaning"]
    return report.table(header, rows, caption + "metrics.json beside this page has every digit.")


def pictures(shown: Shown) -> report.Html:
    """Original, reconstruction and error of each pair."""
    rows = []
    for title, pairs in shown.worst_and_best().items():
        for pair in pairs:
            error = (pair.reconstruction.int() - pair.original.int()).abs().clamp(max=63).mul(4).to(pair.original.dtype)
            images = [to_pil(x) for x in (pair.original, pair.reconstruction, error)]
            rows.append(report.Row(pair.name, images, f"{title}: {digits(pair.psnr)} dB"))
    return report.picture_grid(
        ["original", "reconstruction", "error x 4"],
        rows,
        "The worst and the best by PSNR, finest scale. The error is |reconstruction - original|, four times as bright."
        " Select a picture to enlarge it; arrow keys go on to the next.",
    )


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Facts as rows, nested ones with their names joined."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}, ")
        else:
            rows.append((f"{prefix}{key}", "not known" if value is None else str(value)))
    return rows


def digits(value: float | None) -> str:
    """Five significant digits; whole numbers as they are."""
    if value is None:
        return "–"
    if isinstance(value, float) and math.isinf(value):
        return "∞"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
