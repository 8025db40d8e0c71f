"""What the app shows: pieces of HTML that hold their own pictures, so that no file is written for them.

Colours, fonts and corners are the variables of gradio's theme, which follow the reader's light or dark setting.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from hieratok.data.pixels import to_uint8
from hieratok.evaluation.pixels import SSIM_WINDOW, psnr, ssim
from hieratok.evaluation.reconstruction import area_resize, one_colour_per_token
from hieratok.pictures import to_pil

ERROR_CEILING = 64  # grey levels of 255 at which the error map is at its brightest


@dataclass(frozen=True)
class Picture:
    """A picture and what is said of it."""

    image: Tensor
    """uint8 (3, H, W)."""
    title: str
    detail: str = ""

    @property
    def html(self) -> str:
        """A figure whose picture has the width that the page gives it, with pixels as they are."""
        H, W = self.image.shape[-2:]
        detail = f"<small>{escape(self.detail)}</small>" if self.detail else ""
        alt = escape(f"{self.title}. {self.detail}".strip())
        return (
            f'<figure><img src="{data_uri(self.image)}" alt="{alt}" width="{W}" height="{H}">'
            f"<figcaption>{escape(self.title)}{detail}</figcaption></figure>"
        )


def data_uri(image: Tensor) -> str:
    """uint8 (3, H, W) as the address of a lossless WebP that lies in the page itself."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="WEBP", lossless=True, method=0)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def judge(image: Tensor, original: Tensor, patch_size: int | None = None) -> str:
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


def error_map(image: Tensor, original: Tensor) -> Tensor:
    """Mean absolute difference over red, green and blue, from black (none) to light yellow (`ERROR_CEILING` levels).

    Args:
        image, original: uint8 (3, H, W).

    Returns:
        uint8 (3, H, W).
    """
    from matplotlib import colormaps

    levels = (image.float() - original.float()).abs().mean(0) / ERROR_CEILING
    colors = colormaps["magma"](levels.clamp(max=1).numpy())[..., :3]  # (H, W, 3)
    return torch.from_numpy(colors * 255).round().to(torch.uint8).permute(2, 0, 1)


def section(title: str, note: str, *parts: str) -> str:
    """A heading, a sentence below it, and what it is about."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(note)}</p>{''.join(parts)}</section>"


def row(pictures: Sequence[Picture], pending: Sequence[tuple[str, int, int]] = ()) -> str:
    """Pictures side by side, all of one width, and frames (title, H, W) for those that are still to come."""
    frames = "".join(
        f'<figure class="pending"><div style="aspect-ratio: {W} / {H}"></div>'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, H, W in pending
    )
    columns = len(pictures) + len(pending)
    return f'<div class="pictures" style="--columns: {columns}">{"".join(p.html for p in pictures)}{frames}</div>'


def before_after(before: Picture, after: Picture) -> str:
    """Two pictures of one size, one over the other, and a slider that moves the border between them."""
    H, W = before.image.shape[-2:]
    images = "".join(
        f'<img src="{data_uri(picture.image)}" alt="{escape(picture.title)}">' for picture in (before, after)
    )
    return (
        f'<figure class="compare" style="--cut: 50%; aspect-ratio: {W} / {H}">{images}<div class="cut"></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="Border between {escape(before.title)} (left) and'
        f' {escape(after.title)} (right), in percent of the width"'
        """ oninput="this.parentElement.style.setProperty('--cut', this.value + '%')">"""
        f"<span>{escape(before.title)}</span><span>{escape(after.title)}</span></figure>"
    )


def frames(pictures: Sequence[Picture], label: str) -> str:
    """One picture at a time, chosen by a slider; all lie in the page, so that it moves without delay."""
    figures = "".join(
        picture.html.replace("<figure>", "<figure hidden>") if i else picture.html for i, picture in enumerate(pictures)
    )
    return (
        f'<div class="frames"><label><span>{escape(label)}</span>'
        f'<input type="range" min="0" max="{len(pictures) - 1}" value="0" aria-valuetext="{escape(pictures[0].title)}"'
        """ oninput="const figures = [...this.closest('.frames').querySelectorAll('figure')];"""
        """ figures.forEach((figure, i) => figure.hidden = i != this.value);"""
        """ this.ariaValueText = figures[this.value].querySelector('img').alt"></label>"""
        f"{figures}</div>"
    )


def status(text: str) -> str:
    """A line that tells how far things are; screen readers say it when it changes."""
    return f'<p class="status" role="status">{escape(text)}</p>'


def message(text: str) -> str:
    """A line that tells what went wrong."""
    return f'<p class="message" role="alert">{escape(text)}</p>'


STYLE = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto; }
.results .html-container { padding: 0; }
.results h1, .results h2 { color: var(--body-text-color); line-height: 1.25; }
.results h1 { font-size: 1.75rem; font-weight: 600; margin: 8px 0 4px; }
.results h2 { font-size: 1.125rem; font-weight: 600; margin: 0 0 4px; }
.results p { margin: 0 0 12px; color: var(--body-text-color-subdued); max-width: 75ch; line-height: 1.5; }
.results section { margin: 0 0 36px; }
.results figure { margin: 0; min-width: 0; }
.results img { display: block; width: 100%; height: auto; max-width: none; border-radius: 4px;
  image-rendering: pixelated; }
.results figcaption { margin-top: 6px; font-size: 0.875rem; line-height: 1.4; color: var(--body-text-color);
  font-variant-numeric: tabular-nums; }
.results small { display: block; font-size: 0.8125rem; color: var(--body-text-color-subdued); }
.results h3 { font-size: 0.9375rem; font-weight: 600; margin: 16px 0 8px; color: var(--body-text-color); }
.pictures { display: grid; gap: 12px; align-items: start;
  grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.pending div { border: 1px dashed var(--border-color-primary); border-radius: 4px; }
.compare { position: relative; overflow: hidden; border-radius: 4px; max-width: 720px; }
.compare img { position: absolute; inset: 0; height: 100%; }
.compare img:nth-of-type(2) { clip-path: inset(0 0 0 var(--cut)); }
.compare .cut { position: absolute; top: 0; bottom: 0; left: var(--cut); width: 2px; margin-left: -1px;
  background: #ffffff; box-shadow: 0 0 3px rgb(0 0 0 / 0.7); }
.compare .cut::after { content: "↔"; position: absolute; top: 50%; left: 50%; width: 34px; height: 34px; margin: -17px;
  line-height: 34px; text-align: center; border-radius: 50%; background: #ffffff; color: #1b1f24;
  box-shadow: 0 1px 4px rgb(0 0 0 / 0.5); }
.compare input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize;
  touch-action: pan-y; }
.compare:focus-within { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.compare span { position: absolute; bottom: 8px; left: 8px; padding: 2px 8px; border-radius: 4px; font-size: 0.8125rem;
  background: rgb(0 0 0 / 0.65); color: #ffffff; pointer-events: none; }
.compare span + span { left: auto; right: 8px; }
.frames { max-width: 420px; }
.frames label { display: block; margin-bottom: 10px; font-size: 0.875rem; color: var(--body-text-color); }
.frames input { display: block; width: 100%; margin: 8px 0 0; accent-color: var(--color-accent); }
.frames figure[hidden] { display: none; }
.results .message { color: var(--error-text-color); font-weight: 600; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  .gradio-container > .main { padding: 12px 16px; }
  .pictures { gap: 12px 8px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
"""
