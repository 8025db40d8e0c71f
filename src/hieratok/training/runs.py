"""Training runs read from disk as plain values, for `hieratok report` and model cards.

A run may be unfinished, killed or damaged: what can be read is read, and `problems` lists the rest.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from hieratok.core import checkpoint
from hieratok.core.files import read_json_lines, read_json_table, read_yaml, shown
from hieratok.training.run_folder import EVALUATIONS, LOG, flatten

CONFIG = "config.yaml"
PARTS = {"checkpoints", "tensorboard", "wandb", "pictures", "tokenizer", "generator"}
"""Sub-folders of a run that are not searched for runs."""
LEAST, MOST = 1e-9, 1e30
"""Largest number taken from a log: those of a diverged run may be larger, and would hide others in a plot."""
MOST_TERMS = 80
"""Largest number of a log's terms, each of which is a plot."""
SILENT_SECONDS, SILENT_INTERVALS = 600, 10
"""An unfinished run counts as stopped if its log has not grown for that many seconds and that many intervals."""


@dataclass(frozen=True)
class Measurement:
    """A metrics.json in a run's folder: of `hieratok evaluate`, `analyze`, `quickstart` or a study."""

    where: str
    """Its folder, relative to the run's."""
    result: dict[str, Any]
    """The whole content."""

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest; numbers with equal manifests can be compared."""
        manifest = self.result.get("manifest")
        return manifest if isinstance(manifest, dict) else {"protocol": str(self.result.get("protocol", "not stated"))}

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers by name, without lists and nested values."""
        return {shown(k): v for k, v in self.result.items() if is_number(v)}


class Pace(NamedTuple):
    """Progress and speed of training."""

    images_seen: int
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Run:
    """One run, finished or not."""

    name: str
    """Its folder, relative to the searched one."""
    folder: Path
    kind: str
    """tokenizer or generator."""
    state: str
    """finished, step n of m, or stopped at step n of m."""
    written: float
    """Time of the log's last change, in seconds since 1970."""
    settings: dict[str, Any]
    """The settings by name, {"train.steps": ...}."""
    log: list[dict[str, float]]
    """log.jsonl: terms by name for each interval, with `step` and `images`."""
    evaluations: list[dict[str, float]]
    """evaluations.jsonl, likewise."""
    measurements: list[Measurement]
    """The metrics.json files in the run's folder."""
    parameters: int | None
    """Number of the averaged model's parameters; None: not saved yet."""
    picture: Path | None
    """The latest training picture."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, one line each."""

    @property
    def finished(self) -> bool:
        """Whether training is finished."""
        return self.state == "finished"

    @property
    def pace(self) -> Pace | None:
        """Progress and speed by the log; None without a log."""
        return speed(self.log) if self.log else None

    def facts(self) -> dict[str, Any]:
        """The values for `hieratok report --json`."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "kind": self.kind,
            "state": self.state,
            **(self.pace._asdict() if self.pace else {}),
            "parameters": self.parameters,
            "last": self.log[-1] if self.log else {},
            "last_evaluation": self.evaluations[-1] if self.evaluations else {},
            "measurements": {m.where: {**m.numbers, "manifest": m.manifest} for m in self.measurements},
            "picture": str(self.picture) if self.picture else None,
            "settings": self.settings,
            "problems": self.problems,
        }


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value from JSON is a number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / LOG).is_file() or ((folder / CONFIG).is_file() and (folder / "checkpoints").is_dir())


def find_runs(folder: Path) -> list[Run]:
    """Every run in a folder and its sub-folders, including the folder itself, sorted by name.

    Raises:
        FileNotFoundError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{shown(folder)}: no such folder")
    folders = [path for path in walk(folder) if is_run(path)]
    if not folders:
        raise FileNotFoundError(
            f"no runs in {shown(folder)} or below it: a run has {CONFIG} and {LOG} (`hieratok train`)"
        )
    return [read_run(path, path.relative_to(folder).as_posix() if path != folder else path.name) for path in folders]


def walk(folder: Path, into_runs: bool = True) -> Iterator[Path]:
    """A folder and its sub-folders, except hidden ones, parts of runs and, unless `into_runs`, other runs."""
    for path, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in PARTS)
        if not into_runs:
            folders[:] = [name for name in folders if not is_run(Path(path) / name)]
        yield Path(path)


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read one run; damage is listed in `problems` and raises no error."""
    problems: list[str] = []
    settings = read_settings(folder / CONFIG, problems)
    kind = settings.get("kind", "tokenizer")
    if kind not in ("tokenizer", "generator"):
        problems.append(f"{CONFIG}: kind {shown(repr(kind))} is unknown")
        kind = "tokenizer"
    log = read_records(folder / LOG, ("images_per_second",), problems)
    written = next((p.stat().st_mtime for p in (folder / LOG, folder / CONFIG) if p.is_file()), 0.0)
    pictures = sorted((folder / "pictures").glob("step-*.png"))
    return Run(
        name=shown(name or folder.name),
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
    """A run's settings by name; errors go to `problems`."""
    try:
        return flatten(read_yaml(path))
    except (OSError, ValueError) as error:
        problems.append(problem_of(path, path.parent, error))
        return {}


def read_records(path: Path, required: tuple[str, ...], problems: list[str]) -> list[dict[str, float]]:
    """The numbers of a log's records, in order of steps; damaged lines go to `problems`."""
    records: list[dict[str, float]] = []
    names: set[str] = set()
    lines = 0
    try:
        for values in read_json_lines(path):
            lines += 1
            record = {shown(k): v for k, v in (values or {}).items() if is_number(v) and abs(v) <= MOST}
            last = records[-1] if records else {"step": -1, "images": -1}
            complete = all(record.get(key, 0) >= LEAST for key in ("step", "images", *required))
            if complete and record["step"] > last["step"] and record["images"] > last["images"]:
                names |= record.keys()
                records.append(record)
    except (OSError, ValueError) as error:
        problems.append(problem_of(path, path.parent, error))
        return []
    if len(records) < lines:
        problems.append(f"{path.name}: {lines - len(records)} of {lines} lines cannot be used")
    if len(names) > MOST_TERMS:
        problems.append(f"{path.name}: it has {len(names):,} terms, of which {MOST_TERMS} are used")
        kept = {*required, "step", "images", *sorted(names)[:MOST_TERMS]}
        records = [{k: v for k, v in record.items() if k in kept} for record in records]
    return records


def state_of(
    folder: Path, kind: str, settings: dict[str, Any], log: list[dict[str, float]], silent_seconds: float
) -> str:
    """A run's progress, and whether it is still running, by the age of its log."""
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
    """Every metrics.json in a run's folder, except those of other runs within it."""
    measurements = []
    for path in walk(folder, into_runs=False):
        file = path / "metrics.json"
        if not file.exists():
            continue
        try:
            result = read_json_table(file)
        except (OSError, ValueError) as error:
            problems.append(problem_of(file, folder, error))
            continue
        measurements.append(Measurement(shown(path.relative_to(folder).as_posix()), result))
    return measurements


def count_parameters(folder: Path, kind: str, problems: list[str]) -> int | None:
    """Parameters of the finished model or the newest checkpoint, from the file's header; None without one."""
    try:
        model = checkpoint.find(folder, inside=kind)
    except FileNotFoundError:
        return None
    path = model / checkpoint.WEIGHTS
    try:
        shapes = checkpoint.tensor_shapes(path)
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in checkpoint.STATISTICS)
    except (OSError, ValueError) as error:
        problems.append(problem_of(path, folder, error))
        return None


def problem_of(path: Path, folder: Path, error: Exception) -> str:
    """An error of a file as one short line that begins with its name within the folder."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = shown(" ".join(reason.split())).removeprefix(f"{shown(path)} ").removeprefix("cannot be read: ")
    return f"{shown(path.relative_to(folder))} cannot be read: {reason[:200]}"


def speed(log: Sequence[Mapping[str, float]]) -> Pace:
    """Images seen and time of training, without interruptions."""
    before = [0, *(record["images"] for record in log)]
    seconds = sum((record["images"] - last) / record["images_per_second"] for last, record in zip(before, log))
    images = int(log[-1]["images"])
    return Pace(images, seconds, images / seconds)
