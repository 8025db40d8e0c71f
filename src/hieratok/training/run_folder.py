"""A run on disk: its settings, its logs, and checkpoints that are whole or not there."""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from hieratok import checkpoint
from hieratok.errors import TrainingError
from hieratok.files import read_yaml

logger = logging.getLogger(__name__)

# Settings of models that change no weight's shape.
SHAPELESS = {"drop_path", "init_std"}
# Settings that change what is written or how fast, never the weights: a run may resume with others.
HARMLESS = {
    "name",
    "train.log_every",
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

CHECKSUMS = "checksums.json"
LOG = "log.jsonl"
EVALUATIONS = "evaluations.jsonl"


@dataclasses.dataclass
class Snapshot:
    """What a checkpoint holds besides the averaged model."""

    counters: dict[str, int]
    """`step` and what else a run counts."""
    weights: dict[str, dict[str, Tensor]]
    """Of each network by name."""
    optimizers: dict[str, dict[str, Any]]
    """Their optimisers' states."""


class RunFolder:
    """A run on disk: config.yaml, log.jsonl, evaluations.jsonl, tensorboard/, pictures/, checkpoints/step-*/ and at the
    end the model.

    Args:
        path: made if need be.
        settings: the resolved config as plain values.
        allow_changes: go on with a run that has other settings.

    Raises:
        ValueError: the folder holds a run with other settings; the message names them.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], allow_changes: bool = False):
        self.path = Path(path)
        self.settings = settings
        self.checkpoints = self.path / "checkpoints"
        self.log_file = self.path / LOG
        self.evaluations_file = self.path / EVALUATIONS
        config_file = self.path / "config.yaml"
        if config_file.exists():
            before = flatten(read_yaml(config_file))
            now = flatten(settings)
            changed = [k for k in {**before, **now} if before.get(k) != now.get(k) and k not in HARMLESS]
            if changed:
                differences = ", ".join(f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in changed)
                if not allow_changes:
                    raise ValueError(
                        f"{path} holds a run with other settings ({differences}): choose another --out, or go on with"
                        f" the new ones by --allow-changes"
                    )
                self._check_changes(changed, differences)
                logger.warning("%s goes on with other settings: %s", path, differences)

    def _check_changes(self, changed: list[str], differences: str) -> None:
        """Refuse what a run with checkpoints cannot go on with.

        Raises:
            ValueError: another model, or fewer steps than are done.
        """
        saved = self.saved()
        shape = [k for k in changed if k.startswith("model.") and k.partition(".")[2] not in SHAPELESS]
        if saved and shape:
            raise ValueError(
                f"{self.path} holds checkpoints of another model ({differences}), which --allow-changes cannot change:"
                f" choose another --out"
            )
        done, steps = int(saved[0].name.removeprefix("step-")) if saved else 0, self.settings["train"]["steps"]
        if done > steps:
            raise ValueError(f"{self.path} has done {done} steps: train.steps must be at least that, not {steps}")

    def prepare(self) -> None:
        """Make the folder, note the settings, and clear what a killed run left half-written."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in [*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")]:
            _remove(leftover)
        with checkpoint.atomic_file(self.path / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(self.settings, sort_keys=False))

    def saved(self) -> list[Path]:
        """The checkpoints' folders, newest first."""
        return sorted(self.checkpoints.glob("step-*"), reverse=True)

    def save(self, snapshot: Snapshot, save_model: Callable[[Path], None], keep: int) -> None:
        """Write a checkpoint whole or not at all, then drop the oldest ones.

        Args:
            snapshot: what a resumed run needs.
            save_model: writes the averaged model into the folder that it is given.
            keep: how many checkpoints stay.
        """
        with checkpoint.atomic_folder(self.checkpoints / f"step-{snapshot.counters['step']:08d}") as folder:
            save_model(folder)
            for name, weights in snapshot.weights.items():
                checkpoint.save_tensors(weights, folder / f"{name}.safetensors")
            for name, state in snapshot.optimizers.items():
                with (folder / f"{name}-optimizer.pt").open("wb") as file:
                    torch.save(state, file)
            (folder / "counters.json").write_text(json.dumps(snapshot.counters))
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            checksums = {path.relative_to(folder).as_posix(): checkpoint.file_sha256(path) for path in files}
            (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        for old in self.saved()[keep:]:
            _remove(old)

    def newest(self) -> Path | None:
        """The newest checkpoint that is intact; a damaged one is passed over with a warning. None: none was written.

        Raises:
            TrainingError: there are checkpoints, and all are damaged.
        """
        folders = self.saved()
        for folder in folders:
            damage = find_damage(folder)
            if damage is None:
                return folder
            logger.warning("%s is damaged (%s) and passed over", folder, damage)
        if folders:
            raise TrainingError(f"every checkpoint in {self.checkpoints} is damaged: remove them to start anew")
        return None

    def load(self, folder: Path) -> Snapshot:
        """What an intact checkpoint holds, on the CPU."""
        files = sorted(folder.glob("*.safetensors"))
        optimizers = sorted(folder.glob("*-optimizer.pt"))
        return Snapshot(
            json.loads((folder / "counters.json").read_text()),
            {path.stem: checkpoint.read_tensors(path) for path in files},
            {
                path.stem.removesuffix("-optimizer"): torch.load(path, map_location="cpu", weights_only=True)
                for path in optimizers
            },
        )

    def truncate_logs(self, step: int) -> None:
        """Forget what was logged after the checkpoint that the run resumes from."""
        for path in (self.log_file, self.evaluations_file):
            records = [r for r in read_lines(path) if r["step"] <= step]
            with checkpoint.atomic_file(path) as temporary:
                temporary.write_text("".join(json.dumps(r) + "\n" for r in records))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, by their SHA-256; None if nothing is."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        for name, expected in checksums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if checkpoint.file_sha256(folder / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError):
        return f"{CHECKSUMS} is missing or unreadable"
    return None


class Log:
    """log.jsonl, TensorBoard and pictures/ of a run; written by the main process."""

    def __init__(self, run: RunFolder, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        self.file = run.log_file.open("a", buffering=1)
        self.evaluations = run.evaluations_file.open("a", buffering=1)
        events = run.path / "tensorboard"
        events.mkdir(exist_ok=True)
        self.links = contextlib.ExitStack()  # TensorBoard too refuses names that are no UTF-8
        folder = self.links.enter_context(checkpoint.utf8_path(events))
        self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: dict[str, float]) -> None:
        """One interval's numbers."""
        self.file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "images"):
                self.tensorboard.add_scalar(name, value, int(record["step"]))

    def evaluation(self, record: dict[str, float]) -> None:
        """One evaluation's numbers."""
        self.evaluations.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "images"):
                self.tensorboard.add_scalar(f"evaluation/{name}", value, int(record["step"]))

    def picture(self, picture: Image.Image, step: int) -> None:
        """A contact sheet of what the averaged model does."""
        import numpy as np

        folder = self.run.path / "pictures"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{step:08d}.png")
        self.tensorboard.add_image("pictures", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Flush everything."""
        self.file.close()
        self.evaluations.close()
        self.tensorboard.close()
        self.links.close()


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings -> {"train.steps": ...}."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as what YAML and JSON hold: nested dicts, lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a line cut off by a crash is passed over."""
    records = []
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
