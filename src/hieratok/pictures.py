"""Pictures made of images: contact sheets of pyramids. Used by training, `reconstruct` and the report."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

MARGIN = 4
BACKGROUND = (255, 255, 255)
INK = (60, 60, 60)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> PIL."""
    assert image.dtype == torch.uint8, image.dtype
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def pyramid_sheet(originals: Tensor, pyramid: list[Tensor]) -> Image.Image:
    """A row per image: every scale's reconstruction, coarse to fine and enlarged to one size, then the original.

    Args:
        originals: uint8 (B, 3, H, W).
        pyramid: uint8 (B, 3, H_k, W_k), coarse to fine.
    """
    return picture_table({**{f"{p.shape[-1]} px": p for p in pyramid}, "original": originals})


def picture_table(columns: dict[str, Tensor]) -> Image.Image:
    """A row per image, a titled column per kind, all enlarged to the size of the largest.

    Args:
        columns: uint8 (B, 3, H_k, W_k) by title.
    """
    side, width = max((p.shape[-2], p.shape[-1]) for p in columns.values())
    num_rows = len(next(iter(columns.values())))
    header = 16
    sheet = Image.new(
        "RGB",
        (len(columns) * (width + MARGIN) + MARGIN, header + num_rows * (side + MARGIN) + MARGIN),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(columns.items()):
        x = MARGIN + column * (width + MARGIN)
        draw.text((x, 3), title, fill=INK)
        for row, image in enumerate(images):
            picture = to_pil(fit(image, side))
            sheet.paste(picture, (x, header + row * (side + MARGIN)))
    return sheet


def fit(image: Tensor, side: int) -> Tensor:
    """uint8 (3, h, w) -> uint8 (3, side, ...), by repeating pixels: a coarse scale is shown as coarse as it is."""
    h, w = image.shape[-2:]
    return F.interpolate(image[None], (side, side * w // h), mode="nearest")[0]
