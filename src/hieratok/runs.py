"""What training runs left on the disk, as plain values: for the gallery and for model cards.

A run may be unfinished, killed or damaged: whatever can be read is, and `problems` says what could not be.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from safetensors import SafetensorError, safe_open

from hieratok import checkpoint
from hieratok.quickstart import speed
from hieratok.training.run_folder import EVALUATIONS, LOG, flatten

CONFIG = "config.yaml"
PARTS = {"checkpoints", "tensorboard", "pictures", "tokenizer", "generator"}
"""Folders of a run that hold no other run."""
STATISTICS = {"latent_mean", "latent_std"}
"""Tensors beside the weights that are no parameters."""
SILENT_SECONDS, SILENT_INTERVALS = 600, 10
"""An unfinished run counts as stopped when its log has not grown for so long, and so many times its own interval."""


@dataclass(frozen=True)
class Measurement:
    """A metrics.json below a run: of `hieratok evaluate`, `analyze`, `quickstart` or a study."""

    where: str
    """Its folder, within the run's."""
    result: dict[str, Any]
    """All of it."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What the numbers depend on; numbers of equal manifests can be compared."""
        manifest = self.result.get("manifest")
        return manifest if isinstance(manifest, dict) else {"protocol": str(self.result.get("protocol", "not stated"))}

    @property
    def numbers(self) -> dict[str, float]:
        """Its numbers by name, without lists and nested ones."""
        return {k: v for k, v in self.result.items() if is_number(v)}


@dataclass(frozen=True)
class Run:
    """One run, finished or not."""

    name: str
    """Its folder, within the one that was searched."""
    folder: Path
    kind: str
    """tokenizer or generator."""
    state: str
    """finished, step n of m, or stopped at step n of m."""
    written: float
    """When its log last grew, in seconds since 1970."""
    settings: dict[str, Any]
    """By their names, {"train.steps": ...}."""
    log: list[dict[str, float]]
    """Of log.jsonl: terms by name for each interval, with `step` and `images`."""
    evaluations: list[dict[str, float]]
    """Of evaluations.jsonl, likewise."""
    measurements: list[Measurement]
    """Of metrics.json files below the run."""
    parameters: int | None
    """Of the averaged model; None: it was not saved yet."""
    picture: Path | None
    """The latest training picture."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, a line each."""

    @property
    def finished(self) -> bool:
        """Whether it trained to its end."""
        return self.state == "finished"

    @property
    def pace(self) -> dict[str, float]:
        """`images_seen`, `seconds` of training, and `images_per_second`; empty where nothing was logged."""
        return speed(self.log) if self.log else {}

    def facts(self) -> dict[str, Any]:
        """What `hieratok report --json` prints."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "kind": self.kind,
            "state": self.state,
            **self.pace,
            "parameters": self.parameters,
            "last": self.log[-1] if self.log else {},
            "last_evaluation": self.evaluations[-1] if self.evaluations else {},
            "measurements": {m.where: {**m.numbers, "manifest": m.manifest} for m in self.measurements},
            "picture": str(self.picture) if self.picture else None,
            "settings": self.settings,
            "problems": self.problems,
        }


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value from JSON is a number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / LOG).is_file() or ((folder / CONFIG).is_file() and (folder / "checkpoints").is_dir())


def find_runs(folder: Path) -> list[Run]:
    """Every run in a folder and below it, itself included, in the order of their names.

    Raises:
        FileNotFoundError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    folders = [path for path in walk(folder) if is_run(path)]
    if not folders:
        raise FileNotFoundError(f"no runs in {folder} or below it: a run has {CONFIG} and {LOG} (`hieratok train`)")
    return [read_run(path, path.relative_to(folder).as_posix() if path != folder else path.name) for path in folders]


def walk(folder: Path, into_runs: bool = True) -> Iterator[Path]:
    """A folder and those below it, without hidden ones, a run's parts and, if so asked, other runs."""
    for path, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in PARTS)
        if not into_runs:
            folders[:] = [name for name in folders if not is_run(Path(path) / name)]
        yield Path(path)


def read_run(folder: Path, name: str | None = None) -> Run:
    """One run; whatever is damaged is told in `problems` and raises nothing."""
    problems: list[str] = []
    settings = read_settings(folder / CONFIG, problems)
    kind = settings.get("kind", "tokenizer")
    if kind not in ("tokenizer", "generator"):
        problems.append(f"{CONFIG}: kind {kind!r} is none that is known")
        kind = "tokenizer"
    log = read_records(folder / LOG, ("images_per_second",), problems)
    written = next((p.stat().st_mtime for p in (folder / LOG, folder / CONFIG) if p.is_file()), 0.0)
    pictures = sorted((folder / "pictures").glob("step-*.png"))
    return Run(
        name=name or folder.name,
        folder=folder,
        kind=kind,
        state=state_of(folder, kind, settings, log, time.time() - written),
        written=written,
        settings=settings,
        log=log,
        evaluations=read_records(folder / EVALUATIONS, (), problems) if (folder / EVALUATIONS).is_file() else [],
        measurements=read_measurements(folder, problems),
        parameters=count_parameters(folder, kind, problems),
        picture=pictures[-1] if pictures else None,
        problems=problems,
    )


def read_settings(path: Path, problems: list[str]) -> dict[str, Any]:
    """A run's settings by their names; what is wrong with the file goes to `problems`."""
    try:
        settings = yaml.safe_load(path.read_text())
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {first_line(error)}")
        return {}
    return flatten(settings)


def read_records(path: Path, required: tuple[str, ...], problems: list[str]) -> list[dict[str, float]]:
    """The records of a log in the order of their steps, numbers alone; damaged lines go to `problems`."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {first_line(error)}")
        return []
    records: list[dict[str, float]] = []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if not isinstance(values, dict):
            continue
        record = {k: v for k, v in values.items() if is_number(v) and math.isfinite(v)}
        last = records[-1] if records else {"step": -1, "images": -1}
        complete = all(record.get(key, 0) > 0 for key in ("step", "images", *required))
        if complete and record["step"] > last["step"] and record["images"] > last["images"]:
            records.append(record)
    if len(records) < len(lines):
        problems.append(f"{path.name}: {len(lines) - len(records)} of {len(lines)} lines cannot be used")
    return records


def state_of(
    folder: Path, kind: str, settings: dict[str, Any], log: list[dict[str, float]], silent_seconds: float
) -> str:
    """How far a run got, and whether it still goes on: nothing but its log's age tells."""
    steps = settings.get("train.steps")
    saved = [checkpoint.step_of(path) for path in checkpoint.step_folders(folder)]
    step = int(max([log[-1]["step"] if log else 0, *saved]))
    is_whole = (folder / kind / checkpoint.WEIGHTS).is_file()
    if is_whole and (not is_number(steps) or step == 0 or step >= steps):
        return "finished"
    interval = log[-1]["images"] / len(log) / log[-1]["images_per_second"] if log else 0.0
    where = f"step {step:,} of {steps:,}" if is_number(steps) else f"step {step:,}"
    is_silent = silent_seconds > max(SILENT_SECONDS, SILENT_INTERVALS * interval)
    return f"stopped at {where}" if is_silent else where


def read_measurements(folder: Path, problems: list[str]) -> list[Measurement]:
    """Every metrics.json below a run, but for those of other runs within it."""
    measurements = []
    for path in walk(folder, into_runs=False):
        file = path / "metrics.json"
        if not file.is_file():
            continue
        where = path.relative_to(folder).as_posix()
        try:
            result = json.loads(file.read_text())
            if not isinstance(result, dict):
                raise ValueError("it holds no table")
        except (OSError, ValueError) as error:
            problems.append(f"{file.relative_to(folder)} cannot be read: {first_line(error)}")
            continue
        measurements.append(Measurement(where, result))
    return measurements


def count_parameters(folder: Path, kind: str, problems: list[str]) -> int | None:
    """Of the finished model or the newest checkpoint's, from the file's header; None where there is none."""
    try:
        model = checkpoint.find(folder, inside=kind)
    except FileNotFoundError:
        return None
    path = model / checkpoint.WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys() if k not in STATISTICS)  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        problems.append(f"{path.relative_to(folder)} cannot be read: {first_line(error)}")
        return None


def first_line(error: Exception) -> str:
    """An error's message, short and on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())[:200]
