"""Where a run's numbers and pictures go besides its own files."""

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
"""Of Weights & Biases, unless WANDB_PROJECT says otherwise."""


class Tracker(Protocol):
    """Something that draws curves."""

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Values by name."""

    def picture(self, picture: Image.Image, step: int) -> None:
        """A contact sheet of what the averaged model does."""

    def close(self) -> None:
        """Flush everything."""


class TensorBoard:
    """Event files in `tensorboard/` of a run's folder.

    Args:
        folder: the run's.
        step: that the run stands at: what was written of later ones is forgotten.
    """

    def __init__(self, folder: Path, step: int):
        with needs_extras():
            from torch.utils.tensorboard import SummaryWriter

        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        self.links = contextlib.ExitStack()  # TensorBoard too refuses names that are no UTF-8
        self.writer = SummaryWriter(str(self.links.enter_context(checkpoint.utf8_path(events))), purge_step=step + 1)

    def numbers(self, values: dict[str, float], step: int) -> None:
        """A scalar each."""
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
    """A run of Weights & Biases; the environment decides about account, project and network, as wandb documents it.

    Steps are a value of their own, so that a run which resumes at an earlier step may log it again.

    Args:
        folder: the run's; wandb's files go to `wandb/` in it.
        settings: of the run, shown beside its curves.
        identity: of the run, by which wandb knows it again when it resumes; None: it has none.

    Raises:
        MissingPackageError: wandb is not installed.
        ValueError: it does not start; says why.
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
                f"wandb did not start ({reason}): log in by `wandb login`, or WANDB_MODE=offline"
            ) from error
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def numbers(self, values: dict[str, float], step: int) -> None:
        """A line of its history."""
        self.run.log({"step": step, **values})

    def picture(self, picture: Image.Image, step: int) -> None:
        """An image in its history."""
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
