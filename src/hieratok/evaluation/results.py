"""Results of evaluations: manifest, `metrics.json`, tables, and comparison of two results."""

import importlib.metadata
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hieratok.core.checkpoint import json_text, remove_leftovers, write_json
from hieratok.core.distributed import process, wait
from hieratok.core.estimates import Estimate
from hieratok.core.files import read_json, read_json_table, shown
from hieratok.core.glossary import Metric, describe
from hieratok.core.lock import lock
from hieratok.core.pictures import save_png
from hieratok.core.tables import Table, digits
from hieratok.core.typed import typed
from hieratok.evaluation.distribution import DISTRIBUTION_PROTOCOL
from hieratok.evaluation.features import FeatureNetwork
from hieratok.evaluation.reconstruction import Numbers, ReconstructionMetrics

PUBLISHED_IMAGES = 50_000  # usual for published numbers: samples for FID, validation images for rFID


Ends = tuple[float | None, float | None]
"""Ends of a 95% interval; None if there is none, as for a single image."""


@dataclass(frozen=True)
class Result:
    """The result of an evaluation, as in `metrics.json`."""

    numbers: Numbers
    manifest: dict[str, Any]
    """Everything that the numbers depend on, except the evaluated images."""
    warnings: list[str] = field(default_factory=list)
    inputs: Mapping[str, str] = field(default_factory=dict)
    """The options and other facts that name the evaluated images."""
    intervals: dict[str, dict[str, Ends]] = field(default_factory=dict)
    """Intervals of means over images, {side in pixels: {metric: ends}}; empty without such means."""

    @property
    def n(self) -> int:
        """Images."""
        return int(self.numbers.finest["n"])

    def to_json(self) -> dict[str, Any]:
        """The content of `metrics.json`: the finest scale's numbers by name, next to the rest."""
        lists = {side: {name: list(ends) for name, ends in row.items()} for side, row in self.intervals.items()}
        intervals = {"intervals": lists} if lists else {}
        rest = {"warnings": self.warnings, "manifest": self.manifest, "inputs": self.inputs}
        return {**self.numbers.to_json(), **intervals, **rest}

    @classmethod
    def from_json(cls, table: Mapping[str, Any], where: str) -> "Result":
        """The inverse of `to_json`. A number that is not finite is null in a file, and NaN here.

        Args:
            table: of a `metrics.json`.
            where: its file, for messages.

        Raises:
            ValueError: a value is missing or has another type; names the file and the value.
        """

        def part(name: str) -> Any:
            return typed(table.get(name, {}), dict, f"{where}: {name}")

        rest = ("scales", "intervals", "warnings", "manifest", "inputs")
        finest = {name: value for name, value in table.items() if name not in rest}
        intervals = {
            side: {name: typed(ends, Ends, f"{where}: intervals of {shown(name)}") for name, ends in row.items()}
            for side, row in _rows(part("intervals"), f"{where}: intervals").items()
        }
        return cls(
            Numbers(
                _numbers(finest | {"n": typed(table.get("n"), int, f"{where}: n")}, where),
                {side: _numbers(row, where) for side, row in _rows(part("scales"), f"{where}: scales").items()},
            ),
            typed(table.get("manifest"), dict, f"{where}: manifest"),
            typed(table.get("warnings", []), list[str], f"{where}: warnings"),
            part("inputs"),
            intervals,
        )

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a `metrics.json`. Raises as `read_json_table` and `from_json`."""
        return cls.from_json(read_json_table(path), shown(path))


def _rows(table: Mapping[str, object], where: str) -> dict[str, dict[str, object]]:
    return {side: typed(row, dict, f"{where}, {shown(side)}") for side, row in table.items()}


def _numbers(table: Mapping[str, object], where: str) -> dict[str, float]:
    found = {name: typed(value, int | float | None, f"{where}: {shown(name)}") for name, value in table.items()}
    return {name: math.nan if value is None else value for name, value in found.items()}


# Writes a page into the folder of a result; the second argument has the images' values, if any. Passed by the caller,
# so that evaluation does not depend on reports.
WritePage = Callable[[Path, Result, ReconstructionMetrics | None], None]


@dataclass(frozen=True)
class Measured:
    """One number of a result, at every scale."""

    key: str
    """Its name in metrics.json."""
    metric: Metric
    values: Mapping[str, Estimate]
    """Values by scale, such as 64 px, coarse to fine; the name of a single scale is empty. A scale may be missing."""


def measured(numbers: Numbers, intervals: Mapping[str, Mapping[str, Ends]] | None = None) -> list[Measured]:
    """The metrics of the glossary, in order, with their intervals."""
    columns = {f"{side} px": row for side, row in numbers.scales.items()} or {"": numbers.finest}
    intervals = intervals or {}
    sides = list(numbers.scales) or list(intervals)[-1:] or [""]
    found = []
    for key in numbers.finest:
        metric = describe(key)
        if metric is None:
            continue
        values = {
            title: Estimate(row[key], *intervals.get(side, {}).get(key, ()))
            for side, (title, row) in zip(sides, columns.items())
            if key in row
        }
        found.append(Measured(key, metric, values))
    return found


def manifest(protocol: str, network: FeatureNetwork | None) -> dict[str, Any]:
    """Facts that the numbers depend on besides the images: versions, backend, network, definitions."""
    packages = ("hieratok", "torch", "torchvision", "numpy", "pillow")
    device = network.device if network else torch.device("cpu")
    backend = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts: dict[str, Any] = {"protocol": protocol}
    facts |= {f"{package} version": importlib.metadata.version(package) for package in packages}
    facts |= {"backend": backend, "features dtype": "float32 without TF32 and autocast, sums in float64"}
    facts |= network.description() if network else {"network": "none"}
    return facts | DISTRIBUTION_PROTOCOL


class Difference(NamedTuple):
    """A metric of two results."""

    a: float
    b: float
    difference: float
    """b - a."""


def compare_files(path_a: str, path_b: str) -> tuple[dict[str, Difference], str]:
    """The metrics that two files metrics.json have in common, by name, and the same as a table.

    Raises:
        ValueError: a file is not a result, or the manifests differ; the message lists the differences.
        FileNotFoundError: no file.
    """
    results = [_read_comparable(path) for path in (path_a, path_b)]
    a, b = (result.manifest for result in results)
    missing = object()
    differing = [key for key in {**a, **b} if a.get(key, missing) != b.get(key, missing)]
    if differing:
        lines = [shown(f"{key}: {a.get(key, 'absent')} | {b.get(key, 'absent')}") for key in differing]
        raise ValueError(f"{shown(path_a)} and {shown(path_b)} cannot be compared, they differ in {'; '.join(lines)}")
    first, second = (result.numbers for result in results)
    table = {
        key: Difference(x, second[key], second[key] - x) for key, x in first.items() if key in second and key != "n"
    }
    rows = [[_label(key), *map(digits, row)] for key, row in table.items()]
    return table, Table(["", "a", "b", "b - a"], rows).text()


class _Comparable(NamedTuple):
    """The values and manifest of a metrics.json, of any command."""

    numbers: Mapping[str, float]
    manifest: dict[str, Any]


def _read_comparable(path: str) -> _Comparable:
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("manifest"), dict):
        raise ValueError(f"{shown(path)} is not a metrics.json with a manifest")
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
    return _Comparable(numbers, result["manifest"])


def finish(
    result: Result,
    as_json: bool,
    out: str | None,
    metrics: ReconstructionMetrics | None = None,
    write_page: WritePage | None = None,
) -> None:
    """Write and print a result in the first process; the others wait."""
    if process()[0] == 0:
        _write_and_print(result, as_json, out, metrics, write_page)
    wait()


def _write_and_print(
    result: Result,
    as_json: bool,
    out: str | None,
    metrics: ReconstructionMetrics | None,
    write_page: WritePage | None,
) -> None:
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(json_text(result.to_json()) if as_json else format_numbers(result.numbers))
    if out is None:
        return
    folder = Path(out)
    with lock(folder, "evaluate"):
        for name in ("reconstructions.png", "index.html", "metrics.json"):
            remove_leftovers(folder / name)
        if metrics is not None:
            save_png(metrics.picture(), folder / "reconstructions.png")
        if write_page is not None:
            write_page(folder, result, metrics)
        write_json(folder / "metrics.json", result.to_json())  # last: if it exists, the result is complete


def format_numbers(numbers: Numbers) -> str:
    """Metrics as a table: one row per metric, one column per scale."""
    found = measured(numbers)
    titles = list(dict.fromkeys(title for one in found for title in one.values))
    rows = [[one.metric.with_unit, *(digits(_mean(one.values.get(title))) for title in titles)] for one in found]
    return Table(["", *titles], rows).text()


def _mean(estimate: Estimate | None) -> float | None:
    return estimate.mean if estimate else None


def _label(key: str) -> str:
    metric = describe(key)
    return metric.with_unit if metric else key


def count_warnings(n: int | None, dimensions: int | None, what: str) -> list[str]:
    """Warnings about too few images for a distance, or fewer than usual. `n` or `dimensions` None: not known, or no
    distance."""
    if n is None or dimensions is None or n == PUBLISHED_IMAGES:
        return []
    if n <= dimensions:
        return [f"{n} {what}: too few for the covariance of {dimensions} dimensions, distances are far too high"]
    return [f"{n} {what}: published figures use {PUBLISHED_IMAGES:,}, and a distance falls as n grows"]
