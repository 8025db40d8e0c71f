"""Trackers of a run's numbers and pictures: TensorBoard, Weights & Biases."""

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hieratok.core import checkpoint
from hieratok.core.extras import needs_extras
from hieratok.core.typed import flatten
from hieratok.training.config import TrackerName

PROJECT = "hieratok"
"""Project of Weights & Biases, unless WANDB_PROJECT is set."""


class Tracker(Protocol):
    """A tracker of a run."""

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Record values by name."""

    def picture(self, picture: Image.Image, step: int) -> None:
        """Record a contact sheet of the averaged model's outputs."""

    def close(self) -> None:
        """Flush everything."""


class TensorBoard:
    """TensorBoard's event files, in `tensorboard/` of a run's folder.

    Args:
        folder: the run's.
        step: the run's present step: records of later steps are dropped.
    """

    def __init__(self, folder: Path, step: int):
        with needs_extras():
            from torch.utils.tensorboard import SummaryWriter

        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        self.links = contextlib.ExitStack()  # TensorBoard, too, refuses names that are not UTF-8
        self.writer = SummaryWriter(str(self.links.enter_context(checkpoint.utf8_path(events))), purge_step=step + 1)

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Write one scalar each."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, picture: Image.Image, step: int) -> None:
        """An image."""
        self.writer.add_image("pictures", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Flush everything."""
        self.writer.close()
        self.links.close()


class WeightsAndBiases:
    """A run of Weights & Biases; account, project and network are set by the environment, as wandb documents.

    Steps are logged as a value, so that a run which resumes at an earlier step may log it again.

    Args:
        folder: the run's; wandb's files go to `wandb/` in it.
        settings: of the run, shown with its curves.
        identity: the run's id, by which wandb recognises it after a resume; None: it has none.

    Raises:
        MissingPackageError: wandb is not installed.
        ValueError: wandb does not start.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], identity: str | None):
        with needs_extras():
            import wandb  # type: ignore[import-not-found]

        self.image = wandb.Image
        try:
            self.run = wandb.init(
                project=None if "WANDB_PROJECT" in os.environ else PROJECT,
                name=folder.name,
                id=identity,
                resume="allow",
                dir=str(folder),
                config=flatten(settings),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"wandb did not start ({reason}): log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Add a line to the history."""
        self.run.log({"step": step, **values})

    def picture(self, picture: Image.Image, step: int) -> None:
        """Add an image to the history."""
        self.run.log({"step": step, "pictures": self.image(picture)})

    def close(self) -> None:
        """Flush everything."""
        self.run.finish()


def open_tracker(name: TrackerName, folder: Path, settings: dict[str, Any], identity: str | None, step: int) -> Tracker:
    """The tracker of a run that stands at `step`.

    Raises:
        MissingPackageError: its package is not installed.
        ValueError: it does not start.
    """
    if name == "wandb":
        return WeightsAndBiases(folder, settings, identity)
    return TensorBoard(folder, step)
