"""One image: from the bytes of a file to uint8 RGB, and the two crops. Any trouble with a file is a `BadImageError`."""

import contextlib
import io
import math
import os

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from hieratok.errors import NotFinite

# What is looked for in folders, globs and shards. A file's content, not its name, then says how it is decoded.
SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "avif", "gif")

# Pillow would also open PostScript (by starting another program) and many formats which no photo comes in.
Image.init()
FORMATS = [name for name in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF") if name in Image.OPEN]

TORCHVISION_RGB = 3  # torchvision.io.ImageReadMode.RGB
CROP_TRIES = 10


class BadImageError(ValueError):
    """An image that cannot be read, or cannot be cropped as asked; the message is one line and names it."""

    def __init__(self, message: str):
        # A DataLoader raises a worker's error anew with the worker's traceback as the message; its last line is ours.
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__name__}: "))


def has_image_suffix(name: str) -> bool:
    """Whether a file name looks like an image's."""
    return os.path.splitext(name)[1].lower().removeprefix(".") in SUFFIXES


def decode_image(data: bytes, name: str) -> Tensor:
    """Decode an image file's bytes.

    JPEG goes through torchvision, which is faster than Pillow and gives the same pixels; all else, and JPEGs that it
    refuses, through Pillow. The EXIF rotation is applied, colour profiles are ignored. Grey, palette and CMYK become
    RGB, 16 bits become 8 by rounding, transparent parts lie on white, and the first frame of several counts.

    Args:
        data: the whole file.
        name: for messages.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadImageError: not an image, truncated, floating-point pixels, or more than twice `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header and refuses a decompression bomb
        if picture.format in ("JPEG", "MPO"):
            # RuntimeError: truncated, or an encoding that it does not know; Pillow then tells which. AttributeError: a
            # later torchvision: 0.29 announced that its decoders will go, and its Python function warns at each call.
            with contextlib.suppress(RuntimeError, AttributeError):
                buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return torch.ops.image.decode_jpeg(buffer, TORCHVISION_RGB, True)  # True: apply the EXIF rotation
        return _rgb_from_pillow(picture)
    except UnidentifiedImageError:
        reason = "not an image of a known format" if data else "the file is empty"
        raise BadImageError(f"cannot read {name}: {reason}") from None
    except Exception as error:  # damaged files make decoders raise errors of every type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(f"cannot read {name}: {reason}") from error


def _rgb_from_pillow(picture: Image.Image) -> Tensor:
    """Any mode of Pillow's -> uint8 (3, H, W)."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixels of more than 16 bits, whose range is not known")
        picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # round(grey / 257): 65535 becomes 255
    elif picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return _from_pillow(picture.convert("RGB"))


def _from_pillow(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def center_crop(image: Tensor, size: int) -> Tensor:
    """The crop of every evaluation, as the ADM code base defined it: halve with a box filter while the shorter side is
    at least twice `size`, resize the shorter side to `size` with Pillow's antialiased bicubic filter, cut the middle.

    Args:
        image: uint8 (3, H, W).
        size: side of the result in pixels.

    Returns:
        uint8 (3, size, size); it may share memory with `image`.

    Raises:
        BadImageError: the image is so narrow that its resized version would not fit in memory.
        ValueError: another dtype or shape, or a size below 2.
    """
    _check(image, size)
    if image.shape[1:] == (size, size):
        return image
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise BadImageError(f"an image of {image.shape[2]} x {image.shape[1]} pixels is too narrow for a square crop")
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return _from_pillow(picture.crop((left, top, left + size, top + size)))


def random_resized_crop(
    image: Tensor, size: int, generator: torch.Generator, scale: tuple[float, float] = (0.5, 1.0)
) -> Tensor:
    """A random part of the image, resized to a square with torchvision's antialiased bicubic filter.

    The part's share of the area is uniform in `scale` and its aspect ratio log-uniform in (3/4, 4/3), as in
    torchvision's transform of that name; where no such part fits in 10 tries, the largest middle part of a permitted
    aspect ratio is taken.

    Args:
        image: uint8 (3, H, W).
        size: side of the result in pixels.
        generator: of the CPU; every call draws the same number of values from it.
        scale: least and greatest share of the area.

    Returns:
        uint8 (3, size, size).

    Raises:
        ValueError: another dtype or shape, or a size below 2.
    """
    _check(image, size)
    height, width = image.shape[1:]
    shortest, longest = 3 / 4, 4 / 3
    draws = torch.rand(CROP_TRIES, 4, generator=generator, dtype=torch.float64).tolist()
    for area_draw, aspect_draw, top_draw, left_draw in draws:
        area = (scale[0] + (scale[1] - scale[0]) * area_draw) * height * width
        aspect = shortest * (longest / shortest) ** aspect_draw
        part_width, part_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            top, left = int(top_draw * (height - part_height + 1)), int(left_draw * (width - part_width + 1))
            break
    else:
        part_width = max(1, min(width, round(height * longest)))
        part_height = max(1, min(height, round(width / shortest)))
        top, left = (height - part_height) // 2, (width - part_width) // 2
    return functional.resized_crop(
        image, top, left, part_height, part_width, [size, size], functional.InterpolationMode.BICUBIC, antialias=True
    )


def _check(image: Tensor, size: int) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}")
    if size < 2:  # torch 2.14 fails to resize uint8 to 1 x 1
        raise ValueError(f"the size of a crop must be at least 2, not {size}")


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1], any shape and device; with `to_uint8` the one place of conversion.

    Raises:
        ValueError: the input is not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> the nearest uint8; values outside are clamped.

    Args:
        images: floating-point (B, 3, H, W) or any other shape whose first axis counts images.

    Raises:
        ValueError: not floating-point.
        NotFinite: NaN or infinite values, which would become plausible pixels.
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point, not {images.dtype}")
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images)).reshape(len(images), -1).any(1).nonzero().flatten().tolist()
        raise NotFinite(f"images {bad} of a batch of {len(images)} hold NaN or infinite values")
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
