"""The drawings in this folder, made from the code they show: `python docs/drawings.py`.

Each SVG brings its own background and follows the reader's light or dark setting.
"""

import base64
import io
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

from hieratok import TokenizerConfig
from hieratok.data.images import center_crop
from hieratok.evaluation.reconstruction import area_resize
from hieratok.tokenizer.scales import Scales

HERE = Path(__file__).parent
CONFIG = TokenizerConfig()  # the paper's f16d16
SIDES = CONFIG.scales
SCALES = Scales.of(SIDES, CONFIG.grid)

STYLE = """
svg { --paper: #ffffff; --panel: #f1f3f5; --ink: #1b1f24; --muted: #59636e; --line: #aab2ba;
  --s0: #b5179e; --s1: #7b3fd6; --s2: #2f6fdb; --s3: #0e8f9c; --s4: #2e8b3d; }
@media (prefers-color-scheme: dark) { svg { --paper: #14171b; --panel: #22272d; --ink: #e6e9ec; --muted: #9aa4ae;
  --line: #5a646e; --s0: #ff79d8; --s1: #b590ff; --s2: #74a9ff; --s3: #4fd0dc; --s4: #74d483; } }
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--ink); }
.muted { fill: var(--muted); font-size: 13px; }
.strong { font-weight: 600; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
image { image-rendering: pixelated; }
"""


def document(width: int, height: int, title: str, *parts: str) -> str:
    """A whole SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img"><title>{title}</title><style>{STYLE}</style>'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0.5 8 4 0 7.5z" fill="var(--line)"/></marker></defs>'
        f'<rect width="{width}" height="{height}" rx="10" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def text(x: float, y: float, content: str, kind: str = "") -> str:
    """One line of text whose baseline is at y."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{content}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight arrow."""
    return path(f"M{x1:g} {y1:g}L{x2:g} {y2:g}")


def path(data: str) -> str:
    """A line that ends in an arrow's head."""
    return f'<path d="{data}" fill="none" stroke="var(--line)" stroke-width="1.6" marker-end="url(#head)"/>'


def grid(x: float, y: float, size: float, side: int, color: str) -> str:
    """A square of side x side tokens."""
    cell = size / side
    lines = "".join(f"M{x + i * cell:g} {y:g}v{size:g}M{x:g} {y + i * cell:g}h{size:g}" for i in range(1, side))
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="1.5" fill="{color}"/>'
        f'<path d="{lines}" stroke="var(--paper)" stroke-width="{min(1.2, cell / 5):g}"/>'
    )


def picture(x: float, y: float, size: float, image: torch.Tensor) -> str:
    """A uint8 image (3, H, W), drawn with visible pixels."""
    buffer = io.BytesIO()
    small = image.shape[-1] <= 64
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "WEBP", quality=80, lossless=small, method=6)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<image x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" href="data:image/webp;base64,{data}"/>'


def architecture() -> str:
    """Image -> encoder -> z -> tokens of every scale -> decoder -> an image per scale."""
    from skimage.data import chelsea

    photo = center_crop(torch.from_numpy(chelsea().copy()).permute(2, 0, 1), CONFIG.image_size)
    f, d, h = CONFIG.patch_size, CONFIG.latent_channels, SIDES[-1]
    heights = [26, 30, 44, 72, 132]  # of the rows, one per scale
    gap, top = 12, 64
    rows = [top + sum(heights[:k]) + k * gap + heights[k] / 2 for k in range(len(SIDES))]
    bottom = top + sum(heights) + gap * (len(SIDES) - 1)
    middle = (top + bottom) / 2
    parts = []

    # image, encoder, z
    parts += [picture(24, middle - 64, 128, photo), text(88, middle + 86, "image", "middle strong")]
    parts += [text(88, middle + 105, f"{CONFIG.image_size} × {CONFIG.image_size}", "middle muted")]
    parts += [arrow(158, middle, 182, middle)]
    parts += [f'<rect x="186" y="{middle - 64:g}" width="100" height="128" rx="8" fill="var(--panel)"/>']
    parts += [text(236, middle - 4, "encoder", "middle strong")]
    parts += [text(236, middle + 16, f"{CONFIG.encoder_depth} ViT blocks", "middle muted")]
    parts += [arrow(290, middle, 314, middle)]
    parts += [grid(320, middle - 44, 88, h, "var(--muted)"), text(364, middle + 66, "latent z", "middle strong")]
    parts += [text(364, middle + 85, f"{h} × {h} × {d}", "middle muted")]
    parts += [text(364, middle + 104, "all a generator sees", "middle muted")]

    # z -> tokens of every scale -> decoder -> images
    left, box, right = 470, 576, 812
    parts += [f'<rect x="{box}" y="{top - 12}" width="186" height="{bottom - top + 24}" rx="8" fill="var(--panel)"/>']
    parts += [text(box + 93, 24, "scale-causal decoder", "middle strong")]
    parts += [text(box + 93, 42, f"{CONFIG.decoder_depth} ViT blocks, {SCALES.num_tokens} tokens", "middle muted")]
    parts += [
        text(left + 32, 24, "tokens", "middle strong"),
        text(left + 32, 42, "pooled or convolved", "middle muted"),
    ]
    parts += [text(right + 64, 24, "images", "middle strong"), text(right + 64, 42, "at every scale", "middle muted")]
    for k, (side, y) in enumerate(zip(SIDES, rows)):
        color = f"var(--s{k})"
        size = max(8, 4 * side)
        target = area_resize(photo[None], (f * side, f * side))[0]
        shown = max(heights[k] - 4, 8) if k < 2 else {2: 40, 3: 68, 4: 128}[k]
        parts += [path(f"M412 {middle:g}C440 {middle:g} 436 {y:g} {left + 28 - size / 2:g} {y:g}")]
        parts += [grid(left + 34 - size / 2, y - size / 2, size, side, color)]
        parts += [arrow(left + 40 + size / 2, y, box + 28, y)]
        parts += [f'<rect x="{box + 32}" y="{y - 12:g}" width="122" height="24" rx="5" fill="{color}"/>']
        label = f"{side} × {side} token{'s' * (side > 1)}"
        parts += [f'<text x="{box + 93}" y="{y + 4.5:g}" class="middle" style="fill: var(--paper)">{label}</text>']
        parts += [arrow(box + 158, y, right + 58 - shown / 2, y)]
        parts += [picture(right + 64 - shown / 2, y - shown / 2, shown, target)]
        parts += [text(right + 142, y + 4.5, f"{f * side} px", "muted")]
    for upper, lower in pairwise(rows):
        parts += [arrow(box + 93, upper + 12, box + 93, lower - 13)]
    parts += [text(24, bottom + 44, "Tokens see their own scale and all coarser ones.", "muted")]
    parts += [
        text(1000, bottom + 44, "Drawn with the area-downsampled photo, which each scale learns to match.", "muted end")
    ]
    return document(1024, int(bottom + 62), "HieraTok: a multi-scale tokenizer", *parts)


def attention() -> str:
    """Who sees whom among the decoder's tokens, to scale, from the masks that define it."""
    size, top = 270.0, 64.0
    unit = size / SCALES.num_tokens
    starts = [sum(SCALES.lengths[:k]) for k in range(len(SIDES))]
    captions = {
        "independent": ("scale-independent", "own scale only (eq. 6)"),
        "causal": ("scale-causal", "own and coarser scales (eq. 7)"),
        "full": ("full", "every scale"),
    }
    parts = []
    for i, (mode, (name, meaning)) in enumerate(captions.items()):
        x = 112 + i * (size + 32)
        mask = SCALES.mask(mode)
        parts += [text(x + size / 2, 28, name, "middle strong"), text(x + size / 2, 47, meaning, "middle muted")]
        parts += [f'<rect x="{x:g}" y="{top:g}" width="{size:g}" height="{size:g}" fill="var(--panel)"/>']
        for q, (row, rows) in enumerate(zip(starts, SCALES.lengths)):
            for column, columns in zip(starts, SCALES.lengths):
                block = mask[row : row + rows, column : column + columns]
                assert block.all() or not block.any()
                if block.any():
                    parts += [
                        f'<rect x="{x + column * unit:.2f}" y="{top + row * unit:.2f}" width="{columns * unit:.2f}"'
                        f' height="{rows * unit:.2f}" fill="var(--s{q})"/>'
                    ]
        edges = "".join(
            f"M{x + start * unit:.2f} {top:g}v{size:g}M{x:g} {top + start * unit:.2f}h{size:g}" for start in starts[2:]
        )
        parts += [f'<path d="{edges}" stroke="var(--paper)" stroke-width="1"/>']
        share = mask.float().mean().item()
        parts += [text(x + size / 2, top + size + 24, f"{share:.0%} of {SCALES.num_tokens}² pairs", "middle muted")]
    for k, (start, length) in enumerate(zip(starts, SCALES.lengths)):
        if k >= 2:  # the two coarsest are five tokens together: one label for both
            parts += [text(102, top + (start + length / 2) * unit + 4.5, f"{SIDES[k]} × {SIDES[k]}", "end")]
    parts += [text(102, top - 4, "1 × 1, 2 × 2", "end")]
    parts += [
        text(512, top + size + 52, "Rows are queries, columns are keys, coarse to fine; to scale.", "middle muted")
    ]
    return document(1024, int(top + size + 70), "Attention between the decoder's tokens", *parts)


def main() -> None:
    """Write the drawings."""
    for name, drawing in (("architecture", architecture()), ("attention", attention())):
        path = HERE / f"{name}.svg"
        path.write_text(drawing, encoding="utf-8")
        print(f"{path}: {len(drawing) / 1000:.1f} kB")


if __name__ == "__main__":
    main()
