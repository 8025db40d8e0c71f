"""Contact sheets and error maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from hieratok.core import checkpoint

MARGIN = 4
MAX_CELL = 256
BACKGROUND = (255, 255, 255)
INK = (60, 60, 60)
ERROR_CEILING = 64
"""Grey levels of 255 at which an error map is brightest. The same everywhere, so that maps can be compared."""
ERROR_COLOURS = "magma"


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> PIL."""
    assert image.dtype == torch.uint8, image.dtype
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def save_png(picture: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> Path:
    """Write a PNG atomically, with text entries if given."""
    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_text(name, value)
    with checkpoint.atomic_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
    return path


def pyramid_sheet(originals: Tensor, pyramid: Sequence[Tensor]) -> Image.Image:
    """A row per image: every scale's reconstruction, coarse to fine and enlarged to one size, then the original.

    Args:
        originals: uint8 (B, 3, H, W).
        pyramid: uint8 (B, 3, H_k, W_k), coarse to fine.
    """
    return picture_table({**{f"{p.shape[-1]} px": p for p in pyramid}, "original": originals})


def picture_table(columns: Mapping[str, Tensor | Sequence[Tensor]]) -> Image.Image:
    """A row per image, a titled column per kind, all in cells of one size: that of the largest, 256 px at most.

    Args:
        columns: uint8 (3, H, W) each, by title.
    """
    pictures = [list(images) for images in columns.values()]
    height, width = (min(MAX_CELL, max(image.shape[dim] for row in pictures for image in row)) for dim in (-2, -1))
    header = 16
    sheet = Image.new(
        "RGB",
        (len(columns) * (width + MARGIN) + MARGIN, header + len(pictures[0]) * (height + MARGIN) + MARGIN),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(zip(columns, pictures, strict=True)):
        x = MARGIN + column * (width + MARGIN)
        draw.text((x, 3), title, fill=INK)
        for row, image in enumerate(images):
            picture = to_pil(fit(image, height, width))
            left, top = (width - picture.width) // 2, (height - picture.height) // 2
            sheet.paste(picture, (x + left, header + row * (height + MARGIN) + top))
    return sheet


def fit(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, h, w) -> uint8, as large as fits into height x width with its proportions kept: enlarged by repeating
    pixels, so that a coarse scale is shown as coarse as it is, or reduced by area."""
    h, w = image.shape[-2:]
    factor = min(height / h, width / w)
    size = (max(1, round(h * factor)), max(1, round(w * factor)))
    if factor >= 1:
        return F.interpolate(image[None], size, mode="nearest")[0]
    return F.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8)


def error_map(image: Tensor, original: Tensor) -> Tensor:
    """Mean absolute difference over red, green and blue, from black (none) to light yellow (`ERROR_CEILING` levels).

    Args:
        image, original: uint8 (3, H, W).

    Returns:
        uint8 (3, H, W).
    """
    from matplotlib import colormaps

    levels = (image.float() - original.float()).abs().mean(0) / ERROR_CEILING
    colors = colormaps[ERROR_COLOURS](levels.clamp(max=1).numpy())[..., :3]  # (H, W, 3)
    return torch.from_numpy(colors * 255).round().to(torch.uint8).permute(2, 0, 1)


def error_colours(num: int = 9) -> list[str]:
    """The colours of an error map, evenly from no error to `ERROR_CEILING`, as hexadecimal numbers such as #fcfdbf."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[ERROR_COLOURS](i / (num - 1))) for i in range(num)]
