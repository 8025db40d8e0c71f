"""Latents as data: their statistics, and folders of them that training reads instead of images.

A folder holds `manifest.json` and shards of consecutive images, `shard-00000/` and so on, each with

    mean.npy, logvar.npy   float32 (n, 2, d, h, w): raw, of each image and of its mirror image
    labels.npy             int64 (n,): class index, -1 where there is none
    names.npy              bytes (n,): the images' names in their source
    moments.npy            float64 (2, d): sums of z and of its square, for the statistics

float32, not float16: training is then the same as from the images, and reading is never the bottleneck.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hieratok.core import seeding
from hieratok.core.errors import NotFinite
from hieratok.core.files import read_json_table, read_npy, shown

MANIFEST = "manifest.json"
MOST = 10**12  # limit of all counts in a manifest


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of latents holds."""

    tokenizer: dict[str, Any]
    """`source` as given, `sha256` of its file, `encoder_sha256` (the latents depend on the encoder alone), and its
    `config`."""
    data: dict[str, Any]
    """`path` as given, the `crop`, `names_sha256` of the images' names and labels in order."""
    images: int
    """Number of images, without mirror images."""
    shape: tuple[int, int, int]
    """(d, h, w) of one latent."""
    shard_images: int
    """Images in each shard but the last."""
    mean: tuple[float, ...] | None = None
    """(d,): mean of every channel over all images and mirror images; None until the folder is finished."""
    std: tuple[float, ...] | None = None
    """(d,): standard deviation of every channel."""

    def __len__(self) -> int:
        """Shards."""
        return math.ceil(self.images / self.shard_images)

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Of a folder.

        Raises:
            FileNotFoundError: it holds no latents.
            ValueError: a damaged file, or impossible values.
        """
        path = Path(folder) / MANIFEST
        if not os.path.lexists(path):
            raise FileNotFoundError(
                f"{shown(folder)} holds no latents: `hieratok latents RUN --data PATH --out DIR` makes them"
            )
        values = read_json_table(path)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        try:
            manifest = cls(**{**values, **lists})
            problem = manifest.problem()
        except (TypeError, AttributeError, KeyError) as error:  # wrong names or types
            raise ValueError(f"{shown(path)} is damaged or of another version: write the latents again") from error
        if problem:
            raise ValueError(f"{shown(path)}: {problem}: write the latents again")
        return manifest

    def problem(self) -> str:
        """What is wrong with the values; empty if nothing is."""
        if not all(isinstance(self.tokenizer[name], str) for name in ("source", "sha256", "encoder_sha256")):
            return "its tokenizer lacks names"
        if not all(isinstance(self.data[name], str) for name in ("path", "crop", "names_sha256")):
            return "its data lacks names"
        if not isinstance(self.shape, tuple) or len(self.shape) != 3:
            return "shape must be three whole numbers"
        if not all(isinstance(n, int) and 1 <= n <= MOST for n in (*self.shape, self.images, self.shard_images)):
            return f"shape, images and shard_images must be whole numbers from 1 to {MOST:,}"
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and not (
                isinstance(numbers, tuple)
                and len(numbers) == self.shape[0]
                and all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
            ):
                return f"{name} must be {self.shape[0]} finite numbers"
        if (self.mean is None) != (self.std is None) or any(x < 0 for x in self.std or ()):
            return "mean and std belong together, and std is not negative"
        return ""


def whose(before: str | None, now: str) -> str:
    """Which tokenizer latents belong to if not to `now`, in words.

    Args:
        before: name of the tokenizer that made the latents; None: not known.
        now: name of the other tokenizer.
    """
    if before is not None and os.path.abspath(before) == os.path.abspath(now):
        return f"{shown(now)} with other weights than it has now"
    named = f", {shown(before)}," if before else ""
    return f"another tokenizer{named} than {shown(now)}"


def shard_folder(folder: str | Path, shard: int) -> Path:
    """A shard's folder."""
    return Path(folder) / f"shard-{shard:05d}"


class LatentDataset(Dataset):
    """Latents for training, read from memory-mapped files; the counterpart of `ImageDataset` with centre crops.

    An item's key is (index, epoch), and whether it is mirrored depends on (seed, epoch, index) alone, as there.

    Args:
        folder: of `hieratok latents`.
        flip: take the mirror image's latent with probability one half.
        seed: of that.

    Raises:
        FileNotFoundError: no latents there.
        ValueError: unfinished or damaged ones.
    """

    def __init__(self, folder: str | Path, flip: bool = True, seed: int = 0):
        self.folder = Path(folder)
        self.flip = flip
        self.seed = seed
        self.manifest = Manifest.read(folder)
        if self.manifest.mean is None:
            raise ValueError(f"the latents in {folder} are not finished: run the same `hieratok latents` again")
        self.labels = np.concatenate([self._load(shard, "labels") for shard in range(len(self.manifest))])
        """(N,) int64."""
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.manifest.images

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """Args: item: (index, epoch).

        Returns:
            `mean`, `logvar`: float32 (d, h, w), raw; `label`: class index or -1; `skipped`: 0, as for readable images.
        """
        index, epoch = item
        generator = seeding.generator("augmentation", self.seed, epoch, index)
        mirrored = self.flip and bool(torch.rand((), generator=generator) < 0.5)
        shard, row = divmod(index, self.manifest.shard_images)
        if shard not in self._open:
            self._open[shard] = (self._load(shard, "mean"), self._load(shard, "logvar"))
        mean, logvar = (torch.from_numpy(np.array(values[row, int(mirrored)])) for values in self._open[shard])
        return {"mean": mean, "logvar": logvar, "label": int(self.labels[index]), "skipped": 0}

    def _load(self, shard: int, name: str) -> np.ndarray:
        path = shard_folder(self.folder, shard) / f"{name}.npy"
        first = shard * self.manifest.shard_images
        count = min(self.manifest.shard_images, self.manifest.images - first)
        shape = (count,) if name == "labels" else (count, 2, *self.manifest.shape)
        values = read_shard(path, shape, np.int64 if name == "labels" else np.float32, name != "labels")
        if name == "labels" and (values < -1).any():
            raise ValueError(f"{shown(path)} holds a class index below -1: remove its folder and write it again")
        return values


class ImagesAndLatents(Dataset):
    """Images with their latents, mirrored alike: what trains a decoder without running the encoder again.

    Args:
        images: centre crops; none may be skipped.
        latents: of these images, in the same order, with the same `flip` and `seed`.
    """

    def __init__(self, images: Dataset, latents: LatentDataset):
        self.images = images
        self.latents = latents

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """Args: item: (index, epoch).

        Returns:
            What both give: `image`, `mean`, `logvar`, `label`, `skipped`.
        """
        return {**self.latents[item], **self.images[item]}


def read_shard(path: Path, shape: tuple[int, ...], dtype: type, mapped: bool = False) -> np.ndarray:
    """One array of a shard.

    Raises:
        ValueError: missing, damaged, or of another shape or type than the manifest says.
    """
    try:
        values = read_npy(path, mapped)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}: remove its folder and write it again") from error
    if values.shape != shape or values.dtype != dtype:
        raise ValueError(
            f"{shown(path)} does not fit {MANIFEST}: it is {values.dtype} {values.shape}, not {np.dtype(dtype)} {shape}"
        )
    return values


class LatentStatistics:
    """Mean and standard deviation of every latent channel, over images and positions, as float64 sums.

    They are those of z as sampled in training: the variance of the means plus the mean of the variances. [ours]

    Args:
        channels: d.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.sums = torch.zeros(2, channels, dtype=torch.float64)  # of z, and of its square

    def update(self, mean: Tensor, logvar: Tensor) -> None:
        """Add a batch's moments, each (B, d, h, w)."""
        mean, variance = mean.double().cpu(), logvar.double().exp().cpu()
        self.sums += torch.stack((mean.sum((0, 2, 3)), (mean.square() + variance).sum((0, 2, 3))))
        self.count += mean[:, 0].numel()

    def state(self) -> dict[str, Any]:
        """Everything collected, for `merge_state` in another process."""
        return {"count": self.count, "sums": self.sums}

    def merge_state(self, state: dict[str, Any]) -> None:
        """Add what another process collected."""
        self.count += state["count"]
        self.sums = self.sums + state["sums"]

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float64 (d,) each.

        Raises:
            ValueError: nothing was collected, or it is not finite.
        """
        if not self.count:
            raise ValueError("latent statistics of no images")
        mean, square = self.sums / self.count
        std = (square - mean.square()).clamp(min=0).sqrt()
        if not torch.isfinite(std).all():
            raise NotFinite("latents are not finite: no statistics")
        return mean, std
