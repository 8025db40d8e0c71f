"""Results: the manifest that goes with every number, `metrics.json`, the table on the screen, and comparing two."""

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hieratok.checkpoint import atomic_file, json_text, write_json
from hieratok.evaluation.distribution import DISTRIBUTION_PROTOCOL
from hieratok.evaluation.features import FeatureNetwork
from hieratok.evaluation.processes import process, wait

PUBLISHED_IMAGES = 50_000  # behind the FID of a table: samples, or the validation images of an rFID


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
        lines = [f"  {key}: {a.get(key, 'absent')} | {b.get(key, 'absent')}" for key in differing]
        raise ValueError(f"{path_a} and {path_b} cannot be compared, they differ in\n" + "\n".join(lines))
    table = {
        key: {"a": x, "b": y, "difference": y - x}
        for key, x in results[0].items()
        if isinstance(x, int | float) and isinstance(y := results[1].get(key), int | float) and key != "n"
    }
    rows = [("", ["a", "b", "b - a"])]
    rows += [(_label(key), [_digits(value) for value in row.values()]) for key, row in table.items()]
    return table, _table(rows)


def _read_result(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        result = json.loads(Path(path).read_text())
        if not isinstance(result["manifest"], dict):
            raise TypeError("no manifest")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a metrics.json with a manifest") from error
    return result


def finish(result: dict[str, Any], as_json: bool, out: str | None, picture: Image.Image | None = None) -> None:
    """Write and print a result, in the first process; the others return when that is done."""
    if process()[0] == 0:
        _write_and_print(result, as_json, out, picture)
    wait()


def _write_and_print(result: dict[str, Any], as_json: bool, out: str | None, picture: Image.Image | None) -> None:
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        if picture is not None:
            with atomic_file(folder / "reconstructions.png") as temporary:
                picture.save(temporary, format="PNG")
        write_json(folder / "metrics.json", result)
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
    special = {"n": "images", "psnr": "PSNR (dB)", "psnr_identical": "identical images", "sfid": "sFID"}
    if key in special:
        return special[key]
    word, dash, rest = key.partition("-")
    return (word.upper() if word in ("ssim", "lpips", "fid", "fd", "sfd", "is", "kid", "kd") else word) + dash + rest


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
