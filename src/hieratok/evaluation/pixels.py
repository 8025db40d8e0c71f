"""PSNR, SSIM and perceptual distances of 8-bit images, one value per image.

Every function takes uint8 tensors (B, 3, H, W): a model's output is first clamped, checked for NaN and rounded
(`hieratok.core.pixels.to_uint8`), as in a file.

An image's value does not depend on its batch (PSNR and SSIM on a CPU: to the last bit).
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from hieratok.core.estimates import Estimate

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5

# Definitions for the manifest: public SSIM variants differ by up to 0.08.
PIXEL_PROTOCOL = {
    "psnr": "per image on uint8, mean over images; identical images counted apart",
    "ssim": f"per image on uint8, per RGB channel, gaussian {SSIM_WINDOW}x{SSIM_WINDOW} sigma {SSIM_SIGMA}, "
    "population covariance, data_range 255, borders cropped",
}


class Perceptual(Protocol):
    """A perceptual distance for `PixelMetrics`, such as `hieratok.losses.lpips.PerceptualLoss`."""

    name: str

    def __call__(self, images: Tensor, targets: Tensor, /) -> Tensor:
        """(B, 3, H, W) float images in [-1, 1], twice -> (B,) distances."""
        ...


def check_images(images: Tensor, what: str = "images") -> None:
    """Raise ValueError unless `images` is a uint8 tensor of shape (B, 3, H, W) with at least one pixel."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{what} must be a uint8 tensor with values 0-255, got {kind}: quantise with to_uint8 first")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"{what} must have shape (batch, 3, height, width), got {tuple(images.shape)}")


def _check_pair(images: Tensor, references: Tensor) -> None:
    check_images(images)
    check_images(references, "references")
    if images.shape != references.shape:
        raise ValueError(f"images {tuple(images.shape)} and references {tuple(references.shape)} differ in shape")


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(255^2 / mean squared error).

    Args:
        images, references: uint8 (B, 3, H, W).

    Returns:
        float64 (B,); infinite where an image equals its reference.

    Raises:
        ValueError: another dtype or shape.
    """
    _check_pair(images, references)
    squared = (images.to(torch.int32) - references.to(torch.int32)).square().flatten(1).sum(1)  # exact, in int64
    mse = squared.cpu().double() / images[0].numel()
    return 10 * torch.log10(255.0**2 / mse)


@lru_cache(maxsize=32)
def _blur_matrix(size: int, device: torch.device) -> Tensor:
    """(size - 10, size) float64: row i holds the gaussian window at position i, so that a matrix product blurs."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    rows = size - SSIM_WINDOW + 1
    matrix = torch.zeros(rows, size, dtype=torch.float64)
    for i in range(rows):
        matrix[i, i : i + SSIM_WINDOW] = window
    return matrix.to(device)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): gaussian 11 x 11 window with sigma 1.5, population
    covariance, each RGB channel by itself, data range 255, mean over channels and over the windows inside the image.

    Equals `skimage.metrics.structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=255)`. Computed in float64: the variances are differences of large numbers.

    Args:
        images, references: uint8 (B, 3, H, W), at least 11 pixels a side.

    Returns:
        float64 (B,).

    Raises:
        ValueError: another dtype or shape.
    """
    _check_pair(images, references)
    height, width = images.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {height} x {width}")
    if images.device.type == "mps":  # Apple's GPUs have no float64
        images, references = images.cpu(), references.cpu()
    rows, columns = _blur_matrix(height, images.device), _blur_matrix(width, images.device).T
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def blur(x: Tensor) -> Tensor:
        return rows @ (x @ columns)

    values = []
    for x, y in zip(images, references):  # single images stay in the CPU's cache: 1.5 times as fast as the batch
        x, y = x.double(), y.double()
        mean_x, mean_y = blur(x), blur(y)
        mean_xy, mean_squares = mean_x * mean_y, mean_x.square() + mean_y.square()
        covariance = blur(x * y) - mean_xy
        variances = blur(x.square() + y.square()) - mean_squares  # of x plus of y: only their sum is needed
        similarity = (2 * mean_xy + c1) * (2 * covariance + c2) / ((mean_squares + c1) * (variances + c2))
        values.append(similarity.mean())
    return torch.stack(values).cpu()


class PixelMetrics:
    """Collects the pixel metrics of pairs of images, batch after batch.

    Keeps one row of numbers per image, by name, so that the result does not depend on order, batches or processes, and
    no image is counted twice.

    Args:
        perceptual: perceptual distances (`PerceptualLoss` objects) to compute too, by their `.name`.
        ssim: False for images smaller than SSIM's window of 11 pixels.
    """

    def __init__(self, perceptual: Sequence[Perceptual] = (), ssim: bool = True):
        names = [distance.name for distance in perceptual]
        if len(set(names)) < len(names):
            raise ValueError(f"perceptual distances must have different names, got {names}")
        self.perceptual = tuple(perceptual)
        self.ssim = ssim
        self.rows: dict[str, dict[str, float]] = {}

    def update(self, originals: Tensor, reconstructions: Tensor, names: Sequence[str]) -> None:
        """Add a batch: uint8 tensors (B, 3, H, W) and the B images' names.

        Raises ValueError for another dtype or shape, for a name seen before and for a distance that is not finite.
        """
        columns = {"psnr": psnr(reconstructions, originals)}
        if len(names) != len(originals):
            raise ValueError(f"{len(names)} names for {len(originals)} images")
        if self.ssim:
            columns["ssim"] = ssim(reconstructions, originals)
        if self.perceptual:
            x, y = (images.float() / 127.5 - 1 for images in (reconstructions, originals))
            with torch.inference_mode(), torch.autocast(x.device.type, enabled=False):
                for distance in self.perceptual:
                    columns[distance.name] = distance(x, y).double().cpu()
        rows: dict[str, dict[str, float]] = {}
        for i, name in enumerate(names):
            if name in rows:
                raise ValueError(f"{name}: this name stands twice in one batch")
            rows[name] = {key: float(values[i]) for key, values in columns.items()}
            for key, value in rows[name].items():
                if math.isnan(value) or (math.isinf(value) and key != "psnr"):
                    raise ValueError(f"{name}: {key} is {value}")
        self.merge_state(rows)

    def state(self) -> dict[str, dict[str, float]]:
        """The numbers collected, {name: {metric: value}}: what other processes need for `merge_state`."""
        return self.rows

    def merge_state(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Add what another process collected; ValueError for an image both have seen."""
        twice = rows.keys() & self.rows.keys()
        if twice:
            raise ValueError(f"{min(twice)}: this image was already counted")
        self.rows.update({name: dict(row) for name, row in rows.items()})

    def merge(self, other: "PixelMetrics") -> None:
        """Add what `other` collected; ValueError for an image both have seen."""
        self.merge_state(other.state())

    def compute(self) -> dict[str, float]:
        """Means over the images: `psnr` (dB, over the images that differ from their original; infinite if none does),
        `psnr_identical` (how many do not differ), `ssim`, and each perceptual distance under its name; and `n`.

        Sums are exact (`math.fsum`): any order gives the same number. Raises ValueError without images.
        """
        result: dict[str, float] = {}
        for key, estimate in self.estimates().items():
            result |= {"n": len(self.rows), key: estimate.mean}
            if key == "psnr":
                result["psnr_identical"] = sum(math.isinf(row[key]) for row in self.rows.values())
        return result

    def estimates(self) -> dict[str, Estimate]:
        """The same means with their 95% intervals. Raises ValueError without images."""
        if not self.rows:
            raise ValueError("no images were compared")
        rows = list(self.rows.values())
        return {key: Estimate.of([row[key] for row in rows]) for key in rows[0]}

    def ranked(self, metric: str) -> list[str]:
        """The images' names from best to worst by `metric`."""
        sign = -1 if metric in ("psnr", "ssim") else 1
        return sorted(self.rows, key=lambda name: (sign * self.rows[name][metric], name))
