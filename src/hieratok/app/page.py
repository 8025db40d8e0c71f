"""The app's HTML. Pictures are inline, so that no file is written for them.

The templates are in `reports/templates/app.html`. Colours, fonts and corners are variables of gradio's theme,
which follow the reader's light or dark setting.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hieratok.core.pictures import to_pil
from hieratok.core.pixels import to_uint8
from hieratok.evaluation.pixels import SSIM_WINDOW, psnr, ssim
from hieratok.evaluation.reconstruction import area_resize, one_colour_per_token
from hieratok.reports.page import Inline, inline
from hieratok.reports.templating import Html, block

TEMPLATE = "app.html"


@dataclass(frozen=True)
class Picture:
    """A picture with title and detail."""

    image: Tensor
    """uint8 (3, H, W)."""
    title: str
    detail: str = ""

    @functools.cached_property
    def inline(self) -> Inline:
        """The picture for the page: encoded fast, as a visitor waits for it."""
        return inline(to_pil(self.image), effort=0)


def similarity(image: Tensor, original: Tensor, patch_size: int | None = None) -> str:
    """PSNR and SSIM of one scale, uint8 (3, h, w), against the original, (3, H, W), area-resized to its size; with the
    patch size also the PSNR of one colour per token."""
    reference = area_resize(original[None], image.shape[-2:])
    decibels = float(psnr(image[None], reference))
    likeness = f"{float(ssim(image[None], reference)):.3f}" if min(image.shape[-2:]) >= SSIM_WINDOW else "–"
    text = f"PSNR {decibels:.2f} dB, SSIM {likeness}" if math.isfinite(decibels) else "identical"
    if patch_size:
        baseline = float(psnr(one_colour_per_token(reference, patch_size), reference))
        text += "; one colour per token " + (f"{baseline:.2f} dB" if math.isfinite(baseline) else "identical")
    return text


def latent_picture(z: Tensor) -> Tensor:
    """The latent map's first three principal components as red, green and blue.

    Components keep their proportions: the range of the strongest, ±2.5 standard deviations, fills the scale, and weaker
    ones are greyer. Each component's sign is fixed by its largest loading: the same z gives the same picture.

    Args:
        z: (d, h, w).

    Returns:
        uint8 (3, h, w); with fewer than three channels the rest is mid-grey.
    """
    h, w = z.shape[1:]
    values = z.detach().cpu().double().flatten(1)  # (d, h w)
    values = values - values.mean(1, keepdim=True)
    variances, directions = torch.linalg.eigh(values @ values.T / (h * w))  # ascending
    strongest = directions.flip(1)[:, :3]  # (d, at most 3)
    loading = strongest.gather(0, strongest.abs().argmax(0, keepdim=True))
    components = (strongest * loading.sign()).T @ values
    scale = 2.5 * variances[-1].clamp(min=0).sqrt()
    picture = torch.zeros(3, h * w, dtype=torch.float64)
    if scale > 0:
        picture[: len(components)] = components / scale
    return to_uint8(picture.view(3, h, w))


def heading() -> Html:
    """The app's heading."""
    return block(TEMPLATE, "heading")


def limits(megabytes: int, megapixels: int, max_side: int, minutes: int) -> Html:
    """The limits of uploads, and how long they are kept."""
    return block(TEMPLATE, "limits", megabytes=megabytes, megapixels=megapixels, max_side=max_side, minutes=minutes)


def section(title: str, note: str, *parts: Html) -> Html:
    """A heading, a sentence, and content."""
    return block(TEMPLATE, "section", title=title, note=note, parts=parts)


def row(pictures: Sequence[Picture], pending: Sequence[tuple[str, int, int]] = (), title: str = "") -> Html:
    """Pictures side by side, all of the same width, and frames (title, H, W) for pending ones."""
    return block(TEMPLATE, "row", title=title, pictures=pictures, pending=pending)


def before_after(before: Picture, after: Picture) -> Html:
    """Two pictures of the same size, one over the other, with a slider that moves the border between them."""
    return block(TEMPLATE, "before_after", before=before, after=after)


def frames(pictures: Sequence[Picture], label: str) -> Html:
    """One picture at a time, chosen with a slider; all are in the page, so there is no delay."""
    return block(TEMPLATE, "frames", pictures=pictures, label=label)


def status(text: str) -> Html:
    """A line with the progress; screen readers read it when it changes."""
    return block(TEMPLATE, "status", text=text)


def message(text: str) -> Html:
    """A line with an error."""
    return block(TEMPLATE, "message", text=text)
