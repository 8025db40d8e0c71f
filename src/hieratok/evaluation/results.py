"""Results: the manifest that goes with every number, `metrics.json`, the table on the screen, and comparing two."""

import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hieratok.core.checkpoint import atomic_file, json_text, write_json
from hieratok.core.distributed import process, wait
from hieratok.core.estimates import Estimate
from hieratok.core.files import read_json, shown
from hieratok.core.glossary import Metric, describe
from hieratok.core.tables import Table, digits
from hieratok.evaluation.distribution import DISTRIBUTION_PROTOCOL
from hieratok.evaluation.features import FeatureNetwork
from hieratok.evaluation.reconstruction import ReconstructionMetrics

PUBLISHED_IMAGES = 50_000  # behind the FID of a table: samples, or the validation images of an rFID


# Writes a page into the folder of a result, which may come with what was collected of each image. What pages look like
# is no business of the evaluation's: its callers say so.
WritePage = Callable[[Path, dict[str, Any], ReconstructionMetrics | None], None]


@dataclass(frozen=True)
class Measured:
    """One number of a result, at every scale."""

    key: str
    """Its name in metrics.json."""
    metric: Metric
    values: Mapping[str, Estimate]
    """By scale, such as 64 px, coarse to fine; under an empty name if there is but one. A scale may lack it."""


def measured(result: Mapping[str, Any]) -> list[Measured]:
    """The metrics in a result (as `evaluate_reconstruction` returns it, or read from metrics.json), in its order."""
    scales: Mapping[str, Any] = result.get("scales") or {}
    columns = {f"{side} px": row for side, row in scales.items()} or {"": result}
    intervals: Mapping[str, Any] = result.get("intervals") or {}
    sides = list(scales) or list(intervals)[-1:] or [""]
    found = []
    for key, value in result.items():
        metric = describe(key)
        if metric is None or not isinstance(value, int | float):
            continue
        values = {
            title: Estimate(row[key], *intervals.get(side, {}).get(key, ()))
            for side, (title, row) in zip(sides, columns.items())
            if key in row
        }
        found.append(Measured(key, metric, values))
    return found


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
    rows = [[_label(key), *map(digits, row.values())] for key, row in table.items()]
    return table, Table(["", "a", "b", "b - a"], rows).text()


def _read_result(path: str) -> dict[str, Any]:
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("manifest"), dict):
        raise ValueError(f"{shown(path)} is not a metrics.json with a manifest")
    return result


def finish(
    result: dict[str, Any],
    as_json: bool,
    out: str | None,
    metrics: ReconstructionMetrics | None = None,
    write_page: WritePage | None = None,
) -> None:
    """Write and print a result, in the first process; the others return when that is done."""
    if process()[0] == 0:
        _write_and_print(result, as_json, out, metrics, write_page)
    wait()


def _write_and_print(
    result: dict[str, Any],
    as_json: bool,
    out: str | None,
    metrics: ReconstructionMetrics | None,
    write_page: WritePage | None,
) -> None:
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        if metrics is not None:
            with atomic_file(folder / "reconstructions.png") as temporary:
                metrics.picture().save(temporary, format="PNG")
        if write_page is not None:
            write_page(folder, result, metrics)
        write_json(folder / "metrics.json", result)  # the last: where it is, all is
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(json_text(result) if as_json else format_result(result))


def format_result(result: Mapping[str, Any]) -> str:
    """A result as a table: a row a metric, a column a scale."""
    found = measured(result)
    titles = list(dict.fromkeys(title for one in found for title in one.values))
    rows = [[one.metric.with_unit, *(digits(_mean(one.values.get(title))) for title in titles)] for one in found]
    return Table(["", *titles], rows).text()


def _mean(estimate: Estimate | None) -> float | None:
    return estimate.mean if estimate else None


def _label(key: str) -> str:
    metric = describe(key)
    return metric.with_unit if metric else key


def count_warnings(n: int | None, dimensions: int | None, what: str) -> list[str]:
    """About a number of images with which a distance should not be trusted, or is not published. None: not known, or
    no distance."""
    if n is None or dimensions is None or n == PUBLISHED_IMAGES:
        return []
    if n <= dimensions:
        return [f"{n} {what}: too few for the covariance of {dimensions} dimensions, distances are far too high"]
    return [f"{n} {what}: published figures use {PUBLISHED_IMAGES:,}, and a distance falls as n grows"]
