"""Photos that visitors of the app send: checked before anything is decoded, then scaled down to what is shown."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hieratok.data.pixels import FORMATS, BadImageError, decode_image
from hieratok.pictures import to_pil

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 25_000_000  # a 24-megapixel photo; decoding takes at most some 400 MB
MAX_ASPECT = 20  # longer side over shorter side
KINDS = "JPEG, PNG, WebP, BMP, TIFF, AVIF or GIF"


def read_upload(path: Path, name: str, max_side: int) -> Tensor:
    """A photo that somebody sent, upright (EXIF) and scaled down if need be.

    Args:
        path: the file as it lies on the server.
        name: as the sender calls it, for messages.
        max_side: of what is returned, in pixels.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadImageError: one line that names the file and says what is wrong with it.
    """
    check_upload(path, name)
    return at_most(decode_image(path.read_bytes(), name), max_side)


def check_upload(path: Path, name: str) -> None:
    """Refuse a file by its size and by what its first bytes say of it; no pixel is decoded.

    Raises:
        BadImageError: too large in bytes or pixels, too narrow, or not an image of a known kind.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise BadImageError(f"{name} has {size / 2**20:,.1f} MB; the limit is {MAX_BYTES // 2**20} MB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower than Pillow's
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
    except Image.DecompressionBombError:
        raise BadImageError(f"{name} has more pixels than the limit, {MAX_PIXELS // 10**6} million") from None
    except Exception as error:  # damaged headers make Pillow raise errors of many types
        raise BadImageError(f"{name} is not an image that can be read: send {KINDS}") from error
    if width * height > MAX_PIXELS:
        raise BadImageError(
            f"{name} has {width:,} x {height:,} pixels; the limit is {MAX_PIXELS // 10**6} million in all"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImageError(
            f"{name} is too narrow with {width:,} x {height:,} pixels: one side may be {MAX_ASPECT} times the other"
        )


def at_most(image: Tensor, side: int) -> Tensor:
    """uint8 (3, H, W), reduced with Pillow's antialiased bicubic filter if its longer side is above `side`."""
    H, W = image.shape[-2:]
    if max(H, W) <= side:
        return image
    factor = side / max(H, W)
    picture = to_pil(image).resize((max(1, round(W * factor)), max(1, round(H * factor))), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
