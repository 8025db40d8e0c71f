"""The metrics of originals and reconstructions, at one or several scales."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from hieratok.core.estimates import Estimate
from hieratok.core.pictures import pyramid_sheet
from hieratok.evaluation.distribution import distances
from hieratok.evaluation.features import FeatureNetwork
from hieratok.evaluation.pixels import SSIM_WINDOW, Perceptual, PixelMetrics
from hieratok.evaluation.statistics import FeatureSet, pixels_sha256, set_sha256

# For the manifest. Not the patch size: tokenizers that are compared may differ in it.
BASELINE_PROTOCOL = {
    "baseline_psnr": "PSNR, as above, of the original at the scale with each token's patch in its mean colour, on uint8"
}
Value = TypeVar("Value")
SHOWN = 4  # number of worst and best reconstructions in the picture


@dataclass(frozen=True)
class Numbers:
    """Metrics by name (see `hieratok.core.glossary`), at one or several scales."""

    finest: dict[str, float]
    """Numbers of the finest scale, with `n`, the number of images."""
    scales: dict[str, dict[str, float]] = field(default_factory=dict)
    """Numbers of every scale by its side in pixels, coarse to fine; empty for a single scale."""

    def to_json(self) -> dict[str, Any]:
        """The form in `metrics.json`."""
        return {**self.finest, "scales": self.scales} if self.scales else {**self.finest}


class ReconstructionMetrics:
    """Collects the metrics of originals and their reconstructions, at one or several scales, batch after batch.

    The Frechet distance is the only distance of sets: KID, precision and recall compare independent sets,
    but a reconstruction depends on its image (KID would be far below zero, precision and recall 1).

    Args:
        network: for the Frechet distance; None for none.
        perceptual: perceptual distances (`PerceptualLoss` objects).
        patch_size: f, side of a token's patch in pixels, for `baseline_psnr`, the PSNR of one colour per token; None:
            no baseline.
    """

    def __init__(
        self,
        network: FeatureNetwork | None = None,
        perceptual: Sequence[Perceptual] = (),
        patch_size: int | None = None,
    ):
        self.network = network
        self.perceptual = perceptual
        self.patch_size = patch_size
        self.scales: dict[tuple[int, int], _Scale] = {}
        self.shown = Shown()
        self.digests: dict[str, str] = {}  # name: SHA-256 of the original's pixels

    def update(self, names: Sequence[str], originals: Tensor, reconstructions: Tensor | Sequence[Tensor]) -> None:
        """Add a batch: the B images' names, uint8 (B, 3, H, W), and uint8 reconstructions: (B, 3, H, W), or coarse to
        fine one (B, 3, h, w) for each scale, of which the last has the originals' size.

        Raises ValueError for another dtype or shape, a repeated name, and outputs of networks that are not finite.
        """
        pyramid = [reconstructions] if isinstance(reconstructions, Tensor) else list(reconstructions)
        if not pyramid or pyramid[-1].shape != originals.shape:
            raise ValueError(
                f"{names[0]}: the finest reconstruction must have the original's shape {tuple(originals.shape)}, "
                f"not {tuple(pyramid[-1].shape) if pyramid else 'none'}"
            )
        for images in pyramid:
            scale = self._scale((images.shape[-2], images.shape[-1]))
            scale.update(area_resize(originals, images.shape[-2:]), images, names)
        self.digests.update({name: pixels_sha256(image) for name, image in zip(names, originals.cpu())})
        self.shown.update(self._finest().pixels, names, originals, pyramid)

    def _scale(self, size: tuple[int, int]) -> "_Scale":
        if size not in self.scales:
            self.scales[size] = _Scale(self.network, self.perceptual, min(size) >= SSIM_WINDOW, self.patch_size)
        return self.scales[size]

    def _finest(self) -> "_Scale":
        return self.scales[max(self.scales)]

    def state(self) -> dict[str, Any]:
        """Everything collected, without the networks: what other processes need for `merge_state`."""
        scales = {size: scale.state() for size, scale in self.scales.items()}
        return {"scales": scales, "shown": self.shown, "digests": self.digests}

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """Add what another process collected; ValueError for an image both have seen."""
        for size, scale in state["scales"].items():
            self._scale(size).merge_state(scale)
        self.shown.merge(state["shown"])
        self.digests.update(state["digests"])

    def merge(self, other: "ReconstructionMetrics") -> None:
        """Add what `other` collected; ValueError for an image both have seen."""
        self.merge_state(other.state())

    def compute(self) -> Numbers:
        """The metrics of every scale.

        Raises ValueError without images, and below two with a feature network.
        """
        if not self.scales:
            raise ValueError("no images were compared")
        results = {size: scale.compute() for size, scale in sorted(self.scales.items())}
        finest = results[max(results)]
        return Numbers(finest, {_side(size): result for size, result in results.items()} if len(results) > 1 else {})

    def of_image(self, name: str) -> dict[str, dict[str, float]]:
        """The pixel metrics of one image at every scale, coarse to fine, {side in pixels: metrics}.

        Raises KeyError for a name that was not seen.
        """
        return {_side(size): scale.of_image(name) for size, scale in sorted(self.scales.items())}

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """The means over images with their 95% intervals, of every scale, coarse to fine, {side in pixels: {metric:
        estimate}}. Distances between sets of images have none."""
        return {_side(size): scale.estimates() for size, scale in sorted(self.scales.items())}

    def psnr_of_images(self) -> list[float]:
        """PSNR of the finest scale in dB, in the order of the images' names; infinite for identical images."""
        return [row["psnr"] for _, row in sorted(self._finest().pixels.rows.items())]

    def reference(self) -> str:
        """SHA-256 of the originals, independent of their order."""
        return set_sha256(self.digests.values())

    def dimensions(self) -> int | None:
        """Dimensions of the features; None without a network."""
        originals = self._finest().originals
        return originals.pool.width() if originals else None

    def picture(self) -> Image.Image:
        """The worst and the best reconstructions by PSNR, beside their originals."""
        return self.shown.picture()


class _Scale:
    """The metrics of one scale."""

    def __init__(
        self, network: FeatureNetwork | None, perceptual: Sequence[Perceptual], ssim: bool, patch_size: int | None
    ):
        self.network = network
        self.patch_size = patch_size
        self.pixels = PixelMetrics(perceptual, ssim)
        self.baseline = PixelMetrics(ssim=False) if patch_size else None
        self.originals = FeatureSet(network) if network else None
        self.reconstructions = FeatureSet(network) if network else None

    def _parts(self) -> list[PixelMetrics | FeatureSet]:
        parts = (self.pixels, self.baseline, self.originals, self.reconstructions)
        return [part for part in parts if part is not None]

    def update(self, originals: Tensor, reconstructions: Tensor, names: Sequence[str]) -> None:
        self.pixels.update(originals, reconstructions, names)
        if self.baseline and self.patch_size:
            self.baseline.update(originals, one_colour_per_token(originals, self.patch_size), names)
        if self.originals and self.reconstructions:
            self.originals.update(originals, names)
            self.reconstructions.update(reconstructions, names)

    def state(self) -> list[Any]:
        return [part.state() for part in self._parts()]

    def merge_state(self, states: list[Any]) -> None:
        for part, state in zip(self._parts(), states, strict=True):
            part.merge_state(state)

    def of_image(self, name: str) -> dict[str, float]:
        return self.pixels.rows[name] | self._baseline(self.baseline.rows[name] if self.baseline else {})

    @staticmethod
    def _baseline(psnr: Mapping[str, Value]) -> dict[str, Value]:
        return {f"baseline_{key}": value for key, value in psnr.items() if key != "n"}

    def estimates(self) -> dict[str, Estimate]:
        return self.pixels.estimates() | self._baseline(self.baseline.estimates() if self.baseline else {})

    def compute(self) -> dict[str, float]:
        pixels = self.pixels.compute()
        baseline = self._baseline(self.baseline.compute() if self.baseline else {})
        result = {"n": pixels["n"], "psnr": pixels["psnr"], **baseline, **pixels}  # compared numbers side by side
        if self.network and self.originals and self.reconstructions:
            result |= distances(self.reconstructions.compute(), self.originals.compute(), self.network)
        return result


class Pair(NamedTuple):
    """One image and its reconstruction."""

    psnr: float
    """In dB; infinite for identical images."""
    name: str
    original: Tensor
    """uint8 (3, H, W)."""
    reconstruction: Tensor
    """The same."""
    coarse: Sequence[Tensor] = ()
    """Its coarser scales if it has any, coarse to fine; uint8 (3, H_k, W_k)."""


class Shown:
    """The worst and the best pairs so far, by PSNR."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def update(self, pixels: PixelMetrics, names: Sequence[str], originals: Tensor, pyramid: Sequence[Tensor]) -> None:
        """Add a batch, with its PSNR in `pixels`; uint8 (B, 3, H, W) and, coarse to fine, (B, 3, H_k, W_k)."""
        *coarse, finest = pyramid
        new = [
            Pair(pixels.rows[name]["psnr"], name, originals[i].cpu(), finest[i].cpu(), [x[i].cpu() for x in coarse])
            for i, name in enumerate(names)
        ]
        self._select(new)

    def merge(self, other: "Shown") -> None:
        """Add those of another process."""
        self._select(other.pairs)

    def _select(self, new: list[Pair]) -> None:
        everything = self.pairs + new
        worst = heapq.nsmallest(SHOWN, everything, key=lambda item: item[:2])
        best = heapq.nlargest(SHOWN, everything, key=lambda item: item[:2])
        self.pairs = list({item.name: item for item in worst + best}.values())

    def worst_and_best(self) -> dict[str, list[Pair]]:
        """The worst pairs, worst first, and the best, best first, without a pair in both; empty groups are left out."""
        ordered = sorted(self.pairs, key=lambda item: item[:2])
        half = min(SHOWN, (len(ordered) + 1) // 2)
        parts = {"worst by PSNR": ordered[:half], "best by PSNR": ordered[half:][-half:][::-1]}
        return {title: part for title, part in parts.items() if part}

    def picture(self) -> Image.Image:
        """A sheet of the worst and the best, next to their originals."""
        sheets = []
        for title, part in self.worst_and_best().items():
            originals, reconstructions = (torch.stack(images) for images in list(zip(*part))[2:4])
            sheets.append((title, pyramid_sheet(originals, [reconstructions])))
        header = 16
        width, height = sum(sheet.width for _, sheet in sheets), max(sheet.height for _, sheet in sheets)
        picture = Image.new("RGB", (width, height + header), (255, 255, 255))
        left = 0
        for title, sheet in sheets:
            ImageDraw.Draw(picture).text((left + 4, 2), title, fill=(0, 0, 0))
            picture.paste(sheet, (left, header))
            left += sheet.width
        return picture


def area_resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """T_k of eqs. 8 and 9 on uint8 images: area interpolation to (h, w), rounded to uint8."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images.float(), tuple(size), mode="area").round().to(torch.uint8)


def one_colour_per_token(images: Tensor, patch_size: int) -> Tensor:
    """Each token's patch in its mean colour, rounded to uint8: a baseline. A scale that is not better draws nothing
    within its patches. [ours]

    Args:
        images: uint8 (B, 3, H, W), at the scale's size. Patches begin at the upper left corner, as in the tokenizer;
            those cut by the right and lower border have the mean of their pixels.
        patch_size: f, in pixels.

    Returns:
        uint8 (B, 3, H, W).
    """
    height, width = images.shape[-2:]
    colours = F.avg_pool2d(images.float(), patch_size, ceil_mode=True).round().to(torch.uint8)
    return colours.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)[..., :height, :width]


def _side(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
