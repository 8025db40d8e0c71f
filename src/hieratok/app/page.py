"""What the app shows: pieces of HTML that hold their own pictures, so that no file is written for them.

Their templates are in `reports/templates/app.html`. Colours, fonts and corners are the variables of gradio's theme,
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
    """A picture and what is said of it."""

    image: Tensor
    """uint8 (3, H, W)."""
    title: str
    detail: str = ""

    @functools.cached_property
    def inline(self) -> Inline:
        """The picture as it lies in the page: quick to make, as a visitor waits for it."""
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

    Components keep their proportions: the strongest one's range of ±2.5 standard deviations fills the scale, weaker
    ones stay greyer. Signs are fixed by each component's largest loading, so that the same z gives the same picture.

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
    """What the app is."""
    return block(TEMPLATE, "heading")


def limits(megabytes: int, megapixels: int, max_side: int, minutes: int) -> Html:
    """What may be sent, and what becomes of it."""
    return block(TEMPLATE, "limits", megabytes=megabytes, megapixels=megapixels, max_side=max_side, minutes=minutes)


def section(title: str, note: str, *parts: Html) -> Html:
    """A heading, a sentence below it, and what it is about."""
    return block(TEMPLATE, "section", title=title, note=note, parts=parts)


def row(pictures: Sequence[Picture], pending: Sequence[tuple[str, int, int]] = (), title: str = "") -> Html:
    """Pictures side by side, all of one width, and frames (title, H, W) for those that are still to come."""
    return block(TEMPLATE, "row", title=title, pictures=pictures, pending=pending)


def before_after(before: Picture, after: Picture) -> Html:
    """Two pictures of one size, one over the other, and a slider that moves the border between them."""
    return block(TEMPLATE, "before_after", before=before, after=after)


def frames(pictures: Sequence[Picture], label: str) -> Html:
    """One picture at a time, chosen by a slider; all lie in the page, so that it moves without delay."""
    return block(TEMPLATE, "frames", pictures=pictures, label=label)


def status(text: str) -> Html:
    """A line that tells how far things are; screen readers say it when it changes."""
    return block(TEMPLATE, "status", text=text)


def message(text: str) -> Html:
    """A line that tells what went wrong."""
    return block(TEMPLATE, "message", text=text)
