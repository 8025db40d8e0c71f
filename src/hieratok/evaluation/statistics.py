"""Statistics of a set of images: means and covariances of features in float64, batch by batch, and the features
themselves if a metric needs them; to and from .npz files.

Memory grows only by a hash per image, and by features for metrics that need them (KID, precision and recall, Inception
Score).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hieratok.core.checkpoint import atomic_file, file_sha256
from hieratok.core.files import parse_json, read_npz, shown
from hieratok.evaluation.features import FeatureNetwork

SEED = 2020  # seed of all random choices: torch-fidelity's default
MOST_IMAGES = 10**12  # limit of a file's count: far beyond any real set
REFERENCE_FEATURES = 10_000  # of a reference, at most: the number of images in ADM's file for precision and recall


def check_features(features: Tensor, what: str = "features") -> None:
    """Raise ValueError unless `features` is a finite floating-point tensor of shape (n, D)."""
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        raise ValueError(f"{what} must be (images, dimensions) float, got {tuple(features.shape)} {features.dtype}")
    if not features.isfinite().all():
        raise ValueError(f"{what} of image {int((~features.isfinite()).any(1).nonzero()[0])} are not finite")


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance (ddof 1) of the features of n images, on the CPU in float64.

    The covariance is held in one of two forms: as such or, if there are not more images than dimensions and it is
    singular, as the centred features, which give distances faster and more exactly.
    """

    mu: Tensor
    """(D,)"""
    n: int | None
    """Number of images; None if not in the file."""
    covariance: Tensor | None = None
    """(D, D), or None: then `centred` is set."""
    centred: Tensor | None = None
    """(n, D) features minus their mean."""

    def sigma(self) -> Tensor:
        """The covariance, (D, D)."""
        if self.covariance is not None:
            return self.covariance
        assert self.centred is not None
        assert self.n is not None
        return self.centred.T @ self.centred / (self.n - 1)

    def total_variance(self) -> float:
        """The trace of the covariance."""
        if self.covariance is not None:
            return self.covariance.trace().item()
        assert self.centred is not None
        assert self.n is not None
        return self.centred.square().sum().item() / (self.n - 1)


class Moments:
    """Mean and covariance of features in float64, batch by batch.

    Features are collected until there are more than D, their dimension, and then added to the sums in one matrix
    product. So memory is bounded by two D x D matrices, batches of 1 cost no more than others, and for n <= D the
    features themselves are kept. Sums are of deviations from the running mean, which is accurate for large means.
    """

    def __init__(self) -> None:
        self.n = 0
        """Images in the sums; those collected but not added yet are not counted."""
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None  # (D, D) sum of outer products of deviations from the mean
        self.waiting: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        """Add features, (B, D) float. Raises ValueError for another shape and for values that are not finite."""
        check_features(features)
        width = self.width()
        if width is not None and features.shape[1] != width:
            raise ValueError(f"features have {features.shape[1]} dimensions, those before had {width}")
        self.waiting.append(features.detach())
        self._fold_if_many()

    def width(self) -> int | None:
        """Dimensions of the features; None before the first."""
        if self.mean is not None:
            return len(self.mean)
        return self.waiting[0].shape[1] if self.waiting else None

    def _fold_if_many(self) -> None:
        if self.waiting and sum(map(len, self.waiting)) > self.waiting[0].shape[1]:
            self._fold()

    def _fold(self) -> None:
        rows = float64(torch.cat(self.waiting))
        mean = rows.mean(0)
        centred = rows - mean
        self._combine(len(rows), mean, centred.T @ centred)
        self.waiting = []

    def _combine(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        """Add sums of other images (Chan, Golub and LeVeque 1979)."""
        if self.mean is None or self.scatter is None:
            self.n, self.mean, self.scatter = n, mean, scatter
            return
        difference = mean.to(self.mean.device) - self.mean
        total = self.n + n
        outer = torch.outer(difference, difference) * (self.n * n / total)
        self.scatter = self.scatter + scatter.to(self.scatter.device) + outer
        self.mean = self.mean + difference * (n / total)
        self.n = total

    def state(self) -> dict[str, Any]:
        """Everything collected, on the CPU, for `merge_state` in another process."""
        return {
            "n": self.n,
            "mean": None if self.mean is None else self.mean.cpu(),
            "scatter": None if self.scatter is None else self.scatter.cpu(),
            "waiting": [rows.cpu() for rows in self.waiting],
        }

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """Add what another process collected."""
        if state["n"]:
            self._combine(state["n"], state["mean"], state["scatter"])
        for rows in state["waiting"]:
            self.waiting.append(rows.to(self.waiting[0].device) if self.waiting else rows)
        self._fold_if_many()

    def statistics(self) -> Statistics:
        """Statistics of everything added so far. Raises ValueError below two images: there is no covariance."""
        n = self.n + sum(map(len, self.waiting))
        if n < 2:
            raise ValueError(f"a distance needs at least 2 images, got {n}")
        if self.mean is None:
            return statistics_of(torch.cat(self.waiting))
        if self.waiting:
            self._fold()
        assert self.mean is not None
        assert self.scatter is not None
        return Statistics(self.mean.cpu(), n, covariance=self.scatter.cpu() / (n - 1))


def statistics_of(features: Tensor) -> Statistics:
    """Statistics of not more images than dimensions, (n, D), as centred features."""
    rows = float64(features).cpu()
    mu = rows.mean(0)
    return Statistics(mu, len(rows), centred=rows - mu)


def float64(x: Tensor) -> Tensor:
    """To float64; on the CPU if the device (Apple's GPU) does not have it."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


class FeatureSet:
    """Collects the features of a set of images, batch after batch.

    Args:
        network: gives the features.
        keep: number of images whose features are kept, for KID, precision and recall, and the Inception Score: 0 none,
            None all. If there are more images, those with the smallest hashes of names are kept: a random choice, but
            the same for any order and number of processes.
    """

    def __init__(self, network: FeatureNetwork, keep: int | None = 0):
        self.network = network
        self.keep = keep
        self.pool = Moments()
        self.spatial = Moments()
        self.kept: dict[str, Tensor] = {}  # name: float32 (D,)
        self.digests: dict[str, str] = {}  # name: SHA-256 of the pixels
        self.size: tuple[int, int] | None = None  # of the images

    def update(self, images: Tensor, names: Sequence[str]) -> None:
        """Add a batch: uint8 (B, 3, H, W) and the B images' names.

        Raises ValueError for another dtype, shape or size than before, a repeated name and features that are not
        finite.
        """
        features = self.network(images)
        self._check_size((images.shape[2], images.shape[3]))
        if len(names) != len(images):
            raise ValueError(f"{len(names)} names for {len(images)} images")
        for name, finite in zip(names, features.pool.isfinite().all(1).tolist()):
            if not finite:
                raise ValueError(f"{shown(name)}: the features of {self.network.name} are not finite")
        digests = {name: pixels_sha256(image) for name, image in zip(names, images.cpu())}
        if len(digests) < len(names):
            raise ValueError(f"{shown(max(names, key=list(names).count))}: this name stands twice in one batch")
        self._add_names(digests)
        self.pool.update(features.pool)
        if features.spatial is not None:
            self.spatial.update(features.spatial)
        self._keep(dict(zip(names, features.pool.cpu())))

    def _check_size(self, size: tuple[int, int] | None) -> None:
        if self.size is not None and size is not None and self.size != size:
            raise ValueError(f"images of {_times(self.size)} and {_times(size)} pixels are not one set")
        self.size = self.size or size

    def _add_names(self, digests: Mapping[str, str]) -> None:
        twice = digests.keys() & self.digests.keys()
        if twice:
            raise ValueError(f"{shown(min(twice))}: this image was already counted")
        self.digests.update(digests)

    def _keep(self, features: Mapping[str, Tensor]) -> None:
        if self.keep == 0:
            return
        self.kept.update({name: row.clone() for name, row in features.items()})
        if self.keep is not None and len(self.kept) > 2 * self.keep:
            self.kept = self._chosen()

    def _chosen(self) -> dict[str, Tensor]:
        """The kept features, of at most `keep` images, sorted by name."""
        names = sorted(
            self.kept, key=lambda name: hashlib.sha256(f"{SEED} {name}".encode(errors="surrogateescape")).digest()
        )[: self.keep]
        return {name: self.kept[name] for name in sorted(names)}

    def state(self) -> dict[str, Any]:
        """Everything collected, without the network, for `merge_state` in another process."""
        return {
            "pool": self.pool.state(),
            "spatial": self.spatial.state(),
            "kept": self._chosen(),
            "digests": self.digests,
            "size": self.size,
        }

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """Add what another process collected; ValueError for an image both have seen."""
        self._check_size(state["size"])
        self._add_names(state["digests"])
        self.pool.merge_state(state["pool"])
        self.spatial.merge_state(state["spatial"])
        self._keep(state["kept"])

    def merge(self, other: "FeatureSet") -> None:
        """Add what `other` collected. ValueError for an image both have seen, or another network."""
        if other.network.description() != self.network.description() or other.keep != self.keep:
            raise ValueError("only feature sets of one network, both with or both without features kept, can be merged")
        self.merge_state(other.state())

    def compute(self) -> "SetStatistics":
        """Statistics of everything added so far. Raises ValueError below two images."""
        return SetStatistics(
            network=self.network.description(),
            images=set_sha256(self.digests.values()),
            size=None if self.size is None else _times(self.size),
            pool=self.pool.statistics(),
            spatial=self.spatial.statistics() if self.spatial.width() else None,
            features=torch.stack(list(self._chosen().values())) if self.kept else None,
        )


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def pixels_sha256(image: Tensor) -> str:
    """SHA-256 of an image's shape and pixels, uint8."""
    digest = hashlib.sha256(str(tuple(image.shape)).encode())
    digest.update(image.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def set_sha256(digests: Iterable[str]) -> str:
    """SHA-256 of a set of images, from those of the images in any order."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


@dataclass(frozen=True)
class SetStatistics:
    """The statistics of a set of images that distances need."""

    network: dict[str, str]
    """`FeatureNetwork.description()`."""
    images: str
    """SHA-256 of the images' pixels, independent of their order; of the file, for statistics of other programs."""
    size: str | None
    """Height x width in pixels; None if not in the file."""
    pool: Statistics
    spatial: Statistics | None = None
    features: Tensor | None = None
    """float32 (at most n, D), in the order of the images' names, if they were kept."""

    def save(self, path: str | Path) -> None:
        """Write an .npz in the layout of ADM's evaluation suite, which can read it (mu, sigma, mu_s, sigma_s), plus
        n, `features` if they were kept, and a `manifest`. The file is written atomically."""
        arrays: dict[str, Any] = {"mu": self.pool.mu.numpy(), "sigma": self.pool.sigma().numpy()}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mu.numpy(), "sigma_s": self.spatial.sigma().numpy()}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        arrays["n"] = self.pool.n
        arrays["manifest"] = json.dumps(self.network | {"images sha256": self.images, "image size": self.size})
        with atomic_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path, network: FeatureNetwork) -> "SetStatistics":
        """Read an .npz of `save`, of ADM's suite or of pytorch-fid (mu, sigma). The last two do not name their
        network: it is Inception.

        Raises:
            ValueError: damaged, not statistics, numbers that cannot be a mean, a covariance and a count, or of another
                network or preprocessing than `network`.
            FileNotFoundError, PermissionError: no file, or one that may not be read.
        """
        where = shown(path)
        arrays = read_npz(path, leave_out=("arr_0",))  # images, possibly many
        if "mu" not in arrays or "sigma" not in arrays:
            raise ValueError(f"{where} holds no statistics (mu, sigma): write them with `hieratok evaluate stats`")
        n = _count(arrays["n"], where) if "n" in arrays else None
        if "manifest" in arrays:
            images, size = _read_manifest(arrays["manifest"], network, where)
        else:
            images, size = file_sha256(Path(path)), None
            if not network.is_fid:
                raise ValueError(
                    f"{where} does not name its network, so it is FID's Inception: it cannot be compared "
                    f"with features of {network.name}"
                )
        pool = _checked(arrays["mu"], arrays["sigma"], n, where)
        features = _features(arrays["features"], len(pool.mu), n, where) if "features" in arrays else None
        if features is not None and n == len(features) <= features.shape[1]:
            pool = statistics_of(features)
        spatial = None
        if "mu_s" in arrays or "sigma_s" in arrays:
            if not {"mu_s", "sigma_s"} <= arrays.keys():
                raise ValueError(f"{where} has one of mu_s and sigma_s, which belong together")
            spatial = _checked(arrays["mu_s"], arrays["sigma_s"], n, where)
        return cls(network.description(), images, size, pool, spatial, features)


def _read_manifest(array: np.ndarray, network: FeatureNetwork, where: str) -> tuple[str, str | None]:
    """The images' SHA-256 and size, of statistics of this network."""
    manifest = parse_json(str(array), f"the manifest of {where}")
    if not isinstance(manifest, dict):
        manifest = {}
    images, size = manifest.get("images sha256"), manifest.get("image size")
    if not isinstance(images, str) or not isinstance(size, str | None):
        raise ValueError(f"{where} has a damaged manifest: write the statistics again")
    for key, value in network.description().items():
        if manifest.get(key) != value:
            have = shown(repr(manifest.get(key)))
            raise ValueError(f"{where} is of another network: its {key} is {have}, not {value!r}")
    return images, size


def _count(array: np.ndarray, where: str) -> int:
    if array.shape != () or array.dtype.kind not in "iu" or not 2 <= array <= MOST_IMAGES:
        raise ValueError(f"{where}: n, the number of images, must be one whole number from 2 on")
    return int(array)


def _features(array: np.ndarray, width: int, n: int | None, where: str) -> Tensor:
    if array.dtype.kind != "f" or array.ndim != 2 or array.shape[1] != width or len(array) > (n or len(array)):
        raise ValueError(
            f"{where}: features {array.shape} {array.dtype} are not those of {n or 'any number of'} images in {width}"
            " dimensions"
        )
    features = torch.from_numpy(array).float()
    check_features(features, f"{where}: features")
    return features


def _checked(mu: np.ndarray, sigma: np.ndarray, n: int | None, where: str) -> Statistics:
    """A mean and its covariance: finite, symmetric and positive semi-definite up to rounding."""
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise ValueError(f"{where}: mu and sigma must be floating-point numbers, not {mu.dtype} and {sigma.dtype}")
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{where}: mu {mu.shape} and sigma {sigma.shape} are not a mean and its covariance")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{where}: its mean or covariance is not finite")
    if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * np.abs(sigma).max()):
        raise ValueError(f"{where}: sigma is not symmetric, so not a covariance")
    covariance = torch.from_numpy(sigma).double()
    variances = covariance.diagonal()
    slack = 1e-6 * variances.abs().sum() + 1e-300  # for float32's rounding; a zero matrix is a covariance too
    if (variances < 0).any() or int(
        torch.linalg.cholesky_ex(covariance + slack * torch.eye(len(mu), dtype=torch.float64)).info
    ):
        raise ValueError(f"{where}: sigma has negative eigenvalues, so it is not a covariance")
    return Statistics(torch.from_numpy(mu).double(), n, covariance=covariance)
