"""Evenness of the distribution of latent vectors: t-SNE, kernel density, CV, Gini, entropy (table 5).

The procedure is VA-VAE's: one latent vector per image, standardised per channel, is embedded in the plane by t-SNE;
each point's density is estimated with a Gaussian kernel; three numbers say how uneven the densities are. Each has a
floor for comparison: its value for as many vectors of N(0, I) in as many dimensions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hieratok.core.checkpoint import atomic_file
from hieratok.core.extras import needs_extras
from hieratok.core.files import read_npz, shown
from hieratok.core.progress import progress
from hieratok.core.seeding import numpy_generator

PERPLEXITY = 30
ITERATIONS = 1_000
MIN_POINTS = 3 * PERPLEXITY + 2  # t-SNE uses 3 x perplexity + 1 neighbours of every point
ENTROPY_EPSILON = 1e-10


class DensityMetrics(NamedTuple):
    """Unevenness of densities."""

    density_cv: float
    """Coefficient of variation: standard deviation over mean; 0 when all are equal."""
    gini: float
    """Gini coefficient: 0 when all are equal, towards 1 when few points have almost all density."""
    normalized_entropy: float
    """Entropy of the densities' shares over that of equal shares: 1 when all are equal."""


@dataclass(frozen=True)
class Embedding:
    """t-SNE's points with their densities and classes."""

    points: np.ndarray
    """(N, 2)."""
    density: np.ndarray
    """(N,)."""
    labels: np.ndarray | None = None
    """(N,) class indices, -1: none; or None."""
    classes: Sequence[str] = ()
    """Names of the classes, if any."""

    def save(self, path: Path) -> None:
        """Write an .npz atomically, without the classes' names."""
        labels = self.labels if self.labels is not None else np.full(len(self.points), -1)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, points=self.points, density=self.density, labels=labels)

    @classmethod
    def load(cls, path: Path) -> "Embedding":
        """Read a file of `save`.

        Raises:
            FileNotFoundError, PermissionError, ValueError: missing, unreadable, or not such a file.
        """
        arrays = read_npz(path)
        if not {"points", "density", "labels"} <= arrays.keys():
            raise ValueError(f"{shown(path)} holds no embedding: points, density and labels")
        return cls(arrays["points"], arrays["density"], arrays["labels"])


@dataclass(frozen=True)
class DensityReport:
    """The metrics over several draws of points."""

    mean: DensityMetrics
    std: DensityMetrics | None
    """Standard deviation over the draws; None for a single one."""
    draws: int
    embedding: np.ndarray
    """Of the first draw, (N, 2)."""
    density: np.ndarray
    """At the first draw's points, (N,)."""


def evenness(density: ArrayLike) -> DensityMetrics:
    """CV, Gini coefficient and normalised entropy of densities (N,), as VA-VAE defines them.

    Raises:
        ValueError: fewer than two, negative or not finite, or all zero.
    """
    rho = np.sort(np.asarray(density, dtype=np.float64).ravel())
    n = len(rho)
    if n < 2 or not np.isfinite(rho).all() or rho[0] < 0 or rho[-1] == 0:
        raise ValueError("densities must be at least two finite numbers, none negative and not all zero")
    shares = rho / rho.sum()
    ranks = np.arange(1, n + 1)
    return DensityMetrics(
        float(rho.std() / rho.mean()),
        float(((2 * ranks - n - 1) * shares).sum() / n),
        float(-(shares * np.log2(shares + ENTROPY_EPSILON)).sum() / np.log2(n)),
    )


def kernel_density(embedding: ArrayLike) -> np.ndarray:
    """Density at each of the points (N, 2), estimated from all of them: Gaussian kernel, Scott's bandwidth.

    Raises:
        ValueError: another shape, values that are not finite, or points on one line.
    """
    with needs_extras():
        from scipy.stats import gaussian_kde

    points = np.asarray(embedding, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"an embedding must have shape (points, 2), not {points.shape}")
    if len(points) < 3:
        raise ValueError(f"{len(points)} points are too few for a density: at least 3")
    if not np.isfinite(points).all():
        raise ValueError("the embedding holds NaN or infinite values")
    try:
        return gaussian_kde(points.T)(points.T)
    except np.linalg.LinAlgError:
        raise ValueError("the embedding's points lie on one line: there is no density in the plane") from None


def embed(points: ArrayLike, seed: int = 0) -> np.ndarray:
    """t-SNE of vectors (N, d) to (N, 2): perplexity 30, 1,000 iterations, started from the principal components.

    Takes about a minute for 10,000 points. The choice of points changes the densities more than the seed.

    Raises:
        ValueError: another shape, too few points, or values that are not finite or all the same.
    """
    with needs_extras():
        from sklearn.manifold import TSNE

    x = np.asarray(points, dtype=np.float32)
    if x.ndim != 2 or x.shape[1] < 2:
        raise ValueError(f"t-SNE takes vectors of shape (points, channels), at least 2 channels, not {x.shape}")
    if len(x) < MIN_POINTS:
        raise ValueError(f"{len(x)} points are too few: t-SNE at perplexity {PERPLEXITY} needs at least {MIN_POINTS}")
    if not np.isfinite(x).all():
        raise ValueError("the points hold NaN or infinite values")
    if (x == x[0]).all():
        raise ValueError("all points are the same: there is nothing to embed")
    tsne = TSNE(2, perplexity=PERPLEXITY, max_iter=ITERATIONS, init="pca", learning_rate="auto", random_state=seed)
    return tsne.fit_transform(x)


def draw_points(latents: np.ndarray, num: int, seed: int, draw: int, mirrored: np.ndarray | None = None) -> np.ndarray:
    """One latent vector from each of up to `num` images, at a uniformly random position.

    Args:
        latents: (N, d, h, w).
        num: largest number of images, drawn without replacement.
        seed, draw: images and positions depend on both.
        mirrored: latents of the mirrored images, each of which replaces its image with probability one half.

    Returns:
        (min(N, num), d).
    """
    n, _, h, w = latents.shape
    rng = numpy_generator("points", seed, draw)
    images = np.arange(n) if n <= num else rng.permutation(n)[:num]
    y, x = rng.integers(h, size=len(images)), rng.integers(w, size=len(images))
    points = latents[images, :, y, x]
    if mirrored is None:
        return points
    flip = rng.random(len(images)) < 0.5
    return np.where(flip[:, None], mirrored[images, :, y, x], points)


def gaussian_points(num: int, channels: int, seed: int, draw: int) -> np.ndarray:
    """N(0, I): (num, channels) float32, for the floor."""
    return numpy_generator("noise", seed, draw).standard_normal((num, channels), dtype=np.float32)


def measure_density(point_sets: Iterable[np.ndarray], total: int, title: str = "t-SNE") -> DensityReport:
    """The metrics of every set of points (N, d), their mean and deviation, with a progress bar.

    Raises:
        ValueError: no sets, or as `embed`.
    """
    metrics, first = [], None
    for points in progress(point_sets, total=total, title=title, unit="draws"):
        embedding = embed(points)
        density = kernel_density(embedding)
        metrics.append(evenness(density))
        first = first or (embedding, density)
    if first is None:
        raise ValueError("no points to embed")
    values = np.array(metrics)
    std = DensityMetrics(*values.std(0, ddof=1).tolist()) if len(values) > 1 else None
    return DensityReport(DensityMetrics(*values.mean(0).tolist()), std, len(values), *first)
