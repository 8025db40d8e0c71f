"""A run on disk: settings, logs and checkpoints."""

import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from hieratok.core import checkpoint
from hieratok.core.errors import TrainingError
from hieratok.core.files import read_json_lines, read_json_table, read_yaml
from hieratok.core.pictures import save_png
from hieratok.core.typed import flatten
from hieratok.training.trackers import open_tracker

logger = logging.getLogger(__name__)

# Settings of models that do not change the weights' shapes.
SHAPELESS = {"drop_path", "init_std", "encoder_weights", "encoder_sha256"}
# Settings that change outputs or speed, never the weights: a run may resume with other values.
HARMLESS = {
    "name",
    "train.log_every",
    "train.tracker",
    "train.save_every",
    "train.keep_checkpoints",
    "train.picture_every",
    "train.activation_checkpointing",
    "data.num_workers",
    "eval.every",
    "eval.num_images",
    "eval.features",
    "eval.weights",
    "eval.lpips",
    "eval.batch_size",
    "eval.reference",
    "eval.steps",
}

CONFIG = "config.yaml"
LOG = "log.jsonl"
EVALUATIONS = "evaluations.jsonl"
PICTURES = "pictures"
COUNTERS = "counters.json"


@dataclasses.dataclass
class Snapshot:
    """The content of a checkpoint besides the averaged model."""

    counters: dict[str, Any]
    """`step` and other counts, as plain values."""
    weights: dict[str, dict[str, Tensor]]
    """Weights of each network by name."""
    optimizers: dict[str, dict[str, Any]]
    """Optimiser states of each network by name."""


class RunFolder:
    """A run on disk: run.json, config.yaml, log.jsonl, evaluations.jsonl, tensorboard/, pictures/, checkpoints/step-*/
    and at the end the model.

    Args:
        path: made by `prepare`.
        settings: the resolved config as plain values.
        allow_changes: resume a run that has other settings.
        defaults: what settings were before they existed, where an older version began the run.

    Raises:
        ValueError: the folder holds a run with other settings; the message names them. Or a damaged config.yaml.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        allow_changes: bool = False,
        defaults: dict[str, Any] | None = None,
    ):
        self.path = Path(path)
        self.settings = settings
        self.checkpoints = self.path / "checkpoints"
        self.log_file = self.path / LOG
        self.evaluations_file = self.path / EVALUATIONS
        config_file = self.path / CONFIG
        if config_file.exists():
            before = flatten(defaults or {}) | flatten(read_config(config_file))
            now = flatten(settings)
            changed = [k for k in {**before, **now} if before.get(k) != now.get(k) and k not in HARMLESS]
            if changed:
                differences = ", ".join(f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in changed)
                if not allow_changes:
                    raise ValueError(
                        f"{path} holds a run with other settings ({differences}): choose another --out, or resume with"
                        f" the new ones with --allow-changes"
                    )
                self._check_changes(changed, differences)
                logger.warning("%s resumes with other settings: %s", path, differences)

    def _check_changes(self, changed: list[str], differences: str) -> None:
        """Refuse what a run with checkpoints cannot resume with.

        Raises:
            ValueError: another model, or fewer steps than done.
        """
        saved = self.saved()
        shape = [k for k in changed if k.startswith("model.") and k.partition(".")[2] not in SHAPELESS]
        if saved and shape:
            raise ValueError(
                f"{self.path} holds checkpoints of another model ({differences}), which --allow-changes cannot change:"
                f" choose another --out"
            )
        done, steps = checkpoint.step_of(saved[0]) if saved else 0, self.settings["train"]["steps"]
        if done > steps:
            raise ValueError(f"{self.path} has done {done} steps: train.steps must be at least that, not {steps}")

    @property
    def id(self) -> str | None:
        """The run's id, which its checkpoints repeat; None: an older run without one."""
        return checkpoint.read_table(self.path / checkpoint.RUN).get("id")

    def prepare(self) -> None:
        """Make the folder, write the settings, and remove temporary files of a killed run.

        The caller holds the folder's lock.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, checkpoint.RUN, LOG, EVALUATIONS, self.settings["kind"], f"{PICTURES}/*"):
            checkpoint.remove_leftovers(self.path / name)
        checkpoint.remove_leftovers(self.checkpoints / "step-*")
        with checkpoint.atomic_file(self.path / CONFIG) as temporary:
            temporary.write_text(yaml.safe_dump(self.settings, sort_keys=False))
        if self.id is None and not self.saved():
            checkpoint.write_json(self.path / checkpoint.RUN, {"id": uuid.uuid4().hex})

    def saved(self) -> list[Path]:
        """The checkpoints' folders, newest first."""
        return checkpoint.step_folders(self.path)

    def save(self, snapshot: Snapshot, save_model: Callable[[Path], None], keep: int | None) -> None:
        """Write a checkpoint atomically, then remove the oldest ones.

        Args:
            snapshot: what a resumed run needs.
            save_model: writes the averaged model into the given folder.
            keep: number of checkpoints to keep, including this one; None: all.
        """
        step = snapshot.counters["step"]
        target = self.checkpoints / f"step-{step:08d}"
        self._set_aside(target)
        with checkpoint.atomic_folder(target) as folder:
            save_model(folder)
            for name, weights in snapshot.weights.items():
                checkpoint.save_tensors(weights, folder / f"{name}.safetensors")
            for name, state in snapshot.optimizers.items():
                with (folder / f"{name}-optimizer.pt").open("wb") as file:
                    torch.save(state, file)
            (folder / COUNTERS).write_text(json.dumps(snapshot.counters))
            checkpoint.seal(folder, run=self.id, step=step)
        if keep is not None:  # newer ones were damaged, and ignored
            for old in [folder for folder in self.saved() if checkpoint.step_of(folder) <= step][keep:]:
                checkpoint.remove(old)

    def _set_aside(self, target: Path) -> None:
        """Rename a folder that is not a checkpoint of this run but has the name of one."""
        if os.path.lexists(target) and target not in self.saved():
            aside = target.with_name(f"not-this-runs-{target.name}-{uuid.uuid4().hex[:8]}")
            target.rename(aside)
            logger.warning("%s is not a checkpoint of this run: it was renamed to %s", target, aside.name)

    def newest(self, files: Iterable[str], before: int | None = None) -> Path | None:
        """The newest intact checkpoint; damaged ones are ignored with a warning. None: none was written.

        Args:
            files: the files that it must hold.
            before: only of earlier steps than this.

        Raises:
            TrainingError: there are checkpoints, and all are damaged.
        """
        damages, saved, files = [], self.saved(), list(files)
        for folder in checkpoint.named_as_steps(self.path):
            if before is not None and checkpoint.step_of(folder) >= before:
                continue
            if folder not in saved and checkpoint.read_table(folder / checkpoint.CHECKSUMS):
                logger.warning("%s is not a checkpoint of this run: ignored", folder)
                continue
            damage = checkpoint.find_damage(folder, files)
            if damage is None:
                return folder
            damages.append(damage)
            logger.warning("%s is damaged (%s): ignored", folder, damage)
        if damages:
            raise TrainingError(
                f"every checkpoint in {self.checkpoints} is damaged (the newest: {damages[0]}): remove them to"
                " start again"
            )
        return None

    def load(self, folder: Path, networks: Iterable[str]) -> Snapshot:
        """Read an intact checkpoint, on the CPU."""
        networks = list(networks)
        return Snapshot(
            read_json_table(folder / COUNTERS),
            {name: checkpoint.read_tensors(folder / f"{name}.safetensors") for name in networks},
            {
                name: torch.load(folder / f"{name}-optimizer.pt", map_location="cpu", weights_only=True)
                for name in networks
            },
        )

    def truncate_logs(self, step: int) -> None:
        """Remove what was logged after a step, that of the checkpoint which the run resumes from."""
        for path in (self.log_file, self.evaluations_file):
            records = [r for r in read_log(path) if r["step"] <= step]
            with checkpoint.atomic_file(path) as temporary:
                temporary.write_text("".join(json.dumps(r) + "\n" for r in records))

    def picture(self, step: int) -> Path:
        """Path of a step's picture."""
        return self.path / PICTURES / f"step-{step:08d}.png"

    def is_evaluated(self, step: int) -> bool:
        """Whether the evaluation of a step was written."""
        return any(record["step"] == step for record in read_log(self.evaluations_file))


class Log:
    """log.jsonl, evaluations.jsonl and pictures/ of a run, and its tracker; written by the first process.

    Raises:
        MissingPackageError, ValueError: the tracker is not installed, or does not start.
    """

    def __init__(self, run: RunFolder, step: int):
        name = run.settings.get("train", {}).get("tracker", "tensorboard")
        self.tracker = open_tracker(name, run.path, run.settings, run.id, step)
        self.run = run
        self.file = run.log_file.open("a", buffering=1)
        self.evaluations = run.evaluations_file.open("a", buffering=1)

    def write(self, record: dict[str, float]) -> None:
        """Write one interval's numbers."""
        self.file.write(json.dumps(record) + "\n")
        self._track(record)

    def evaluation(self, record: dict[str, float]) -> None:
        """Write one evaluation's numbers."""
        self.evaluations.write(json.dumps(record) + "\n")
        self._track(record, "evaluation/")

    def _track(self, record: dict[str, float], prefix: str = "") -> None:
        values = {f"{prefix}{name}": value for name, value in record.items() if name not in ("step", "images")}
        self.tracker.numbers(values, int(record["step"]))

    def picture(self, picture: Image.Image, step: int) -> None:
        """Write a contact sheet of the averaged model's outputs."""
        path = self.run.picture(step)
        path.parent.mkdir(exist_ok=True)
        save_png(picture, path)
        self.tracker.picture(picture, step)

    def sync(self) -> None:
        """Flush the records to the disk, so that no checkpoint is newer than its log."""
        checkpoint.sync(self.run.log_file)
        checkpoint.sync(self.run.evaluations_file)

    def close(self) -> None:
        """Flush everything."""
        self.file.close()
        self.evaluations.close()
        self.tracker.close()


def read_config(path: Path) -> dict[str, Any]:
    """The settings that a run's config.yaml holds.

    Raises:
        ValueError: missing or damaged settings.
    """
    try:
        return read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{error}: remove it, and the same command resumes") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, each with a step; empty if there is no log. A line cut off by a crash is ignored."""
    records = read_json_lines(path) if path.is_file() else ()
    return [record for record in records if record and isinstance(record.get("step"), int)]
