"""Results: the manifest that goes with every number, `metrics.json`, the table on the screen, and comparing two."""

import importlib.metadata
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from hieratok.checkpoint import atomic_file, json_text, write_json
from hieratok.evaluation.distribution import DISTRIBUTION_PROTOCOL
from hieratok.evaluation.features import FeatureNetwork
from hieratok.evaluation.processes import process, wait
from hieratok.evaluation.reconstruction import Shown
from hieratok.files import read_json, shown

PUBLISHED_IMAGES = 50_000  # behind the FID of a table: samples, or the validation images of an rFID


# Writes a page into the folder of a result, which may come with its worst and best reconstructions. What pages look
# like is no business of the evaluation's: its callers say so.
WritePage = Callable[[Path, dict[str, Any], Shown | None], None]


@dataclass(frozen=True)
class Metric:
    """What a number is called, and what it says."""

    label: str
    better: Literal["lower", "higher", "neither"]
    unit: str = ""
    meaning: str = ""
    is_count: bool = False
    """It counts images, and does not measure them."""


# By their names in metrics.json; a network's name may follow ("lpips-vgg", "fd-squeezenet", "perceptual[...]"), and in
# evaluations during training a coarse scale's side in pixels ("psnr/32").
METRICS = {
    "n": Metric("images", "neither", "", "How many were judged.", is_count=True),
    "psnr": Metric("PSNR", "higher", "dB", "Peak signal over mean squared error, a mean over images."),
    "baseline_psnr": Metric(
        "PSNR of one colour per token",
        "neither",
        "dB",
        "Of the image with each token's patch in its mean colour: what a tokenizer should be well above.",
    ),
    "baseline_psnr_identical": Metric(
        "images of one colour per token",
        "neither",
        "",
        "They equal that baseline: its PSNR is infinite and not counted.",
        is_count=True,
    ),
    "psnr_identical": Metric(
        "identical images",
        "neither",
        "",
        "Reconstructed without any error: their PSNR is infinite and not counted.",
        is_count=True,
    ),
    "ssim": Metric("SSIM", "higher", "", "Structural similarity of each image; 1 is identical."),
    "lpips": Metric("LPIPS", "lower", "", "Perceptual distance of each image; 0 is identical."),
    "perceptual": Metric("perceptual", "lower", "", "A perceptual distance that is not LPIPS; 0 is identical."),
    "fid": Metric("FID", "lower", "", "Frechet distance of the two sets' Inception features."),
    "fd": Metric("FD", "lower", "", "Frechet distance of another network's features: not FID."),
    "sfid": Metric("sFID", "lower", "", "The same of features that keep places."),
    "sfd": Metric("SFD", "lower", "", "The same of another network's features that keep places: not sFID."),
    "kid": Metric("KID", "lower", "", "Kernel distance of the two sets' Inception features."),
    "kd": Metric("KD", "lower", "", "Kernel distance of another network's features: not KID."),
    "is": Metric("IS", "higher", "", "Inception Score: how sure of a class each image is, and how varied they are."),
    "class-score": Metric("class-score", "higher", "", "The same with another network's classes: not IS."),
    "precision": Metric("precision", "higher", "", "Share of the images that lie among the reference's."),
    "recall": Metric("recall", "higher", "", "Share of the reference that lies among the images."),
}


def manifest(protocol: str, network: FeatureNetwork | None) -> dict[str, Any]:
    """What the numbers depend on whatever the images: versions, backend, network, definitions."""
    packages = ("hieratok", "torch", "torchvision", "numpy", "pillow")
    device = network.device if network else torch.device("cpu")
    backend = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts: dict[str, Any] = {"protocol": protocol}
    facts |= {f"{package} version": importlib.metadata.version(package) for package in packages}
    facts |= {"backend": backend, "features dtype": "float32 without TF32 and autocast, sums in float64"}
    facts |= network.description() if network else {"network": "none"}
    return facts | DISTRIBUTION_PROTOCOL


def compare_files(path_a: str, path_b: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The metrics that two metrics.json have in common, {metric: {a, b, difference}}, and the same as a table.

    Raises:
        ValueError: a file is no result, or the manifests differ; the message lists the lines that do.
        FileNotFoundError: no file.
    """
    results = [_read_result(path) for path in (path_a, path_b)]
    a, b = (result["manifest"] for result in results)
    missing = object()
    differing = [key for key in {**a, **b} if a.get(key, missing) != b.get(key, missing)]
    if differing:
        lines = [shown(f"{key}: {a.get(key, 'absent')} | {b.get(key, 'absent')}") for key in differing]
        raise ValueError(f"{shown(path_a)} and {shown(path_b)} cannot be compared, they differ in {'; '.join(lines)}")
    table = {
        key: {"a": x, "b": y, "difference": y - x}
        for key, x in results[0].items()
        if isinstance(x, int | float) and isinstance(y := results[1].get(key), int | float) and key != "n"
    }
    rows = [("", ["a", "b", "b - a"])]
    rows += [(_label(key), [_digits(value) for value in row.values()]) for key, row in table.items()]
    return table, _table(rows)


def _read_result(path: str) -> dict[str, Any]:
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("manifest"), dict):
        raise ValueError(f"{shown(path)} is not a metrics.json with a manifest")
    return result


def finish(
    result: dict[str, Any],
    as_json: bool,
    out: str | None,
    shown: Shown | None = None,
    write_page: WritePage | None = None,
) -> None:
    """Write and print a result, in the first process; the others return when that is done."""
    if process()[0] == 0:
        _write_and_print(result, as_json, out, shown, write_page)
    wait()


def _write_and_print(
    result: dict[str, Any], as_json: bool, out: str | None, shown: Shown | None, write_page: WritePage | None
) -> None:
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        if shown is not None:
            with atomic_file(folder / "reconstructions.png") as temporary:
                shown.picture().save(temporary, format="PNG")
        if write_page is not None:
            write_page(folder, result, shown)
        write_json(folder / "metrics.json", result)  # the last: where it is, all is
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(json_text(result) if as_json else format_result(result))


def format_result(result: Mapping[str, Any]) -> str:
    """A result as a table: a row a metric, a column a scale."""
    columns: dict[str, Mapping[str, Any]] = {f"{k} px": v for k, v in result.get("scales", {}).items()} or {"": result}
    rows = [("", list(columns))] if len(columns) > 1 else []
    for key, value in result.items():
        if isinstance(value, int | float):
            rows.append((_label(key), [_digits(column.get(key)) for column in columns.values()]))
    return _table(rows)


def _label(key: str) -> str:
    metric = describe(key)
    unit = f" ({metric.unit})" if metric and metric.unit else ""
    return metric.label + unit if metric else key


def describe(key: str) -> Metric | None:
    """What a name in a result stands for; None: no metric of an evaluation."""
    if scale := re.fullmatch(r"(.+)/(\d+(?:x\d+)?)", key):
        metric = describe(scale[1])
        return replace(metric, label=f"{metric.label}, {scale[2]} px") if metric else None
    for stem, metric in METRICS.items():
        if key == stem:
            return metric
        if key.startswith((f"{stem}-", f"{stem}[")):
            return replace(metric, label=metric.label + key[len(stem) :])
    return None


def _digits(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def _table(rows: list[tuple[str, list[str]]]) -> str:
    first = max(len(label) for label, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows))]
    return "\n".join(
        f"{label:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
        for label, cells in rows
    )


def count_warnings(n: int | None, dimensions: int | None, what: str) -> list[str]:
    """About a number of images with which a distance should not be trusted, or is not published. None: not known, or
    no distance."""
    if n is None or dimensions is None or n == PUBLISHED_IMAGES:
        return []
    if n <= dimensions:
        return [f"{n} {what}: too few for the covariance of {dimensions} dimensions, distances are far too high"]
    return [f"{n} {what}: published figures use {PUBLISHED_IMAGES:,}, and a distance falls as n grows"]
