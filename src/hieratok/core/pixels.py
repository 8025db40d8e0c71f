"""One image: from a file or a Pillow image to uint8 RGB, the two crops, and conversion between uint8 and [-1, 1].

Every error of an image is a `BadImageError`.

Pictures are opened here only: known formats alone, whatever the file's name, and with a limit on their pixels.
"""

import contextlib
import io
import math
import os
import re
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from hieratok.core.errors import NotFinite
from hieratok.core.files import read_bytes, read_start, shown

# Suffixes looked for in folders, globs and shards. How a file is decoded depends on its content, not its name.
SUFFIXES = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "avif", "gif", "ppm", "pgm", "pbm", "pnm"
)  # fmt: skip

# Pillow would also open PostScript (by starting another program) and many formats that photos do not have.
Image.init()
FORMATS = [name for name in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF", "PPM") if name in Image.OPEN]

# Pillow warns before it refuses, and our limit is below the one at which it refuses. Set once, for all threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

MAX_IMAGE_BYTES = 1 << 28
HEADER_BYTES = 1 << 20  # enough to find an image's format and size
MAX_PIXELS = 1 << 27
"""134 million, the images of the largest cameras; decoding takes about 7 bytes per pixel."""
MAX_SCANS = 100
"""Of a JPEG. Each scan covers the whole image: a small file of thousands would decode for minutes. Cameras and
programs write about ten; libtiff has the same limit."""
MAX_SEGMENTS = 10_000
"""Of a JPEG: the parts that begin with a marker."""
BAND_ROWS = 256  # of a decoded image that are converted at a time

JPEG_START = b"\xff\xd8"
JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)  # of markers without a length, only the end's
JPEG_END, JPEG_SCAN = b"\xd9", b"\xda"
JPEG_SEQUENTIAL = (b"\xc0", b"\xc1", b"\xc9")  # frames whose scans each hold whole components

TORCHVISION_RGB = 3  # torchvision.io.ImageReadMode.RGB
CROP_TRIES = 10

# EXIF's orientation -> how to make the image upright: whether to transpose, and then which axes of (3, H, W) to flip
UPRIGHT: dict[int, tuple[bool, list[int]]] = {
    2: (False, [2]),
    3: (False, [1, 2]),
    4: (False, [1]),
    5: (True, []),
    6: (True, [2]),
    7: (True, [1, 2]),
    8: (True, [1]),
}

Rows = Callable[[int, int], np.ndarray]  # the rows of an image from the first up to the second


class TooManyPixels(ValueError):
    """An image with more pixels than the limit."""


class TooManyScans(ValueError):
    """A JPEG that would take very long to decode."""


class BadImageError(ValueError):
    """An image that cannot be read, or cannot be cropped as asked; the message is one line and names it."""

    def __init__(self, message: str):
        # A DataLoader raises a worker's error again, with the traceback as its message; the last line is ours.
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__name__}: "))


def has_image_suffix(name: str) -> bool:
    """Whether a file name looks like an image's."""
    return os.path.splitext(name)[1].lower().removeprefix(".") in SUFFIXES


def is_image(path: str) -> bool:
    """Whether a file's first bytes are an image's, whatever its name; False also if it cannot be read."""
    try:
        open_image(read_start(path, HEADER_BYTES))
    except Exception:  # damaged headers make Pillow raise errors of many types
        return False
    return True


def read_image(path: str | os.PathLike) -> Tensor:
    """An image file -> uint8 (3, H, W), as `decode_image`.

    Raises:
        BadImageError: no such file, not a regular one, one that may not be read, or not an image; names the file.
    """
    try:
        data = read_bytes(path, MAX_IMAGE_BYTES)
    except (OSError, ValueError) as error:
        raise BadImageError(f"cannot read {shown(path)}: {str(error).removeprefix(f'{shown(path)} ')}") from error
    return decode_image(data, os.fspath(path))


def decode_image(data: bytes, name: str) -> Tensor:
    """Decode an image file's bytes.

    JPEG is decoded by torchvision, which is faster than Pillow and gives the same pixels; other formats, and JPEGs that
    it refuses, by Pillow. The image is turned upright (by EXIF, or else XMP), colour profiles are ignored. Grey,
    palette and CMYK become RGB, 16 bits become 8 by rounding, transparent parts become white, and of several frames
    the first is taken.

    Args:
        data: the whole file.
        name: for messages.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadImageError: not an image, truncated, floating-point pixels, more than 134 million pixels, or a JPEG of more
            than 100 scans.
    """
    try:
        picture = open_image(data)
        if picture.format in ("JPEG", "MPO"):
            # RuntimeError: truncated or an unknown encoding; Pillow then says which. AttributeError: a later
            # torchvision, as 0.29 announced to remove its decoders (its Python function warns at each call).
            with contextlib.suppress(RuntimeError, AttributeError):
                buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                image = torch.ops.image.decode_jpeg(buffer, TORCHVISION_RGB, False)  # upright below: False
                return _upright(image, _orientation(picture))
        return _upright(_rgb(picture, data), _orientation(picture))
    except UnidentifiedImageError:
        reason = "not an image of a known format" if data else "the file is empty"
        raise BadImageError(f"cannot read {shown(name)}: {reason}") from None
    except Exception as error:  # damaged files make decoders raise errors of every type
        reason = shown(" ".join(str(error).split())) or type(error).__name__
        raise BadImageError(f"cannot read {shown(name)}: {reason}") from error


def from_picture(picture: Image.Image) -> Tensor:
    """A Pillow image as `decode_image` decodes its file: RGB, turned upright, transparent parts white.

    Pillow itself cuts colours of 16 bits to 8; `read_image` rounds them.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadImageError: it cannot be decoded, or has floating-point pixels.
    """
    try:
        return _upright(_rgb(picture), _orientation(picture))
    except Exception as error:  # an opened image that was not read yet may be damaged
        reason = shown(" ".join(str(error).split())) or type(error).__name__
        raise BadImageError(f"cannot read a Pillow image of mode {picture.mode}: {reason}") from error


def open_image(data: bytes, with_texts: bool = False) -> ImageFile.ImageFile:
    """An image of a known format and a size that can be decoded; its pixels are not decoded yet.

    Args:
        data: of a file, at least its beginning.
        with_texts: keep a PNG's texts, which Pillow then limits.

    Raises:
        UnidentifiedImageError: not an image of a known format.
        TooManyPixels, TooManyScans: more than the limits.
        ...: whatever Pillow raises for a damaged header.
    """
    if data.startswith(JPEG_START):
        _check_scans(data)
    try:
        picture = Image.open(io.BytesIO(data if with_texts else _without_text(data)), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooManyPixels(f"it has more than {MAX_PIXELS:,} pixels") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise TooManyPixels(f"it has {picture.width:,} x {picture.height:,} pixels, and {MAX_PIXELS:,} are the limit")
    return picture


def _check_scans(data: bytes) -> None:
    """Refuse a small JPEG that would take very long to decode."""
    scans, position, components = 0, len(JPEG_START), None
    for _ in range(MAX_SEGMENTS):
        found = JPEG_MARKER.search(data, position)
        if found is None or found[1] == JPEG_END:
            return
        content = found.end() + 2  # after its length
        if found[1] in JPEG_SEQUENTIAL:
            components = data[content + 5 : content + 6]
        if found[1] == JPEG_SCAN:
            if scans == 0 and data[content : content + 1] == components:
                return  # most photos: one scan holds everything, and decoders read no other
            scans += 1
            if scans > MAX_SCANS:
                raise TooManyScans(f"it is a JPEG of more than {MAX_SCANS} scans, which would take very long to decode")
        position = found.end() + int.from_bytes(data[found.end() : content], "big")
    raise TooManyScans(f"it is a JPEG of more than {MAX_SEGMENTS:,} segments, which no photo has")


def _without_text(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, which are not used: Pillow refuses an intact image with a text of
    more than a megabyte. XMP, a text that may hold the orientation, stays."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    dropped = [
        (start, end)
        for kind, start, end in _png_chunks(data)
        if kind in (b"tEXt", b"zTXt", b"iCCP")
        or (kind == b"iTXt" and not data.startswith(b"XML:com.adobe.xmp\0\0", start + 8))
    ]
    kept, position = [], 0
    for start, end in dropped:
        kept.append(data[position:start])
        position = end
    return b"".join([*kept, data[position:]]) if dropped else data


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each complete chunk."""
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            return
        yield kind, position, end
        position = end


def _orientation(picture: Image.Image) -> int:
    """Orientation of the camera, 1 to 8, by EXIF or else XMP; 1, upright, if missing or damaged."""
    with contextlib.suppress(Exception):  # a damaged EXIF says nothing about the pixels
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _upright(image: Tensor, orientation: int) -> Tensor:
    is_turned, flipped = UPRIGHT.get(orientation, (False, []))
    image = image.transpose(1, 2) if is_turned else image
    return (image.flip(flipped) if flipped else image).contiguous() if is_turned or flipped else image


def _rgb(picture: Image.Image, data: bytes | None = None) -> Tensor:
    """Any of Pillow's modes -> uint8 (3, H, W), not turned; `data` is the file, for all bits of 16-bit colour."""
    if picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    wide = None
    if picture.mode.startswith("I"):
        wide = _grey_rows(picture)
    elif data is not None and isinstance(picture, ImageFile.ImageFile):
        wide = _wide_rows(picture, data)
    if wide is not None:
        transparent = picture.info.get("transparency")
        return _in_bands(picture, lambda top, bottom: _from_16_bits(wide(top, bottom).astype(np.int64), transparent))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return _from_pillow(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _grey_rows(picture: Image.Image) -> Rows:
    """Of grey with more than 8 bits, which Pillow's own conversion would clip at 255: (rows, W, 1)."""

    def rows(top: int, bottom: int) -> np.ndarray:
        grey = _rows(picture, top, bottom).astype(np.int64)[..., None]
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixels of more than 16 bits, whose range is not known")
        return grey

    return rows


def _wide_rows(picture: ImageFile.ImageFile, data: bytes) -> Rows | None:
    """Of 16-bit colour, (rows, W, 2, 3 or 4): grey or RGB, possibly with opacity. None: the image has 8 bits.

    Pillow keeps only the upper byte of each number. A second decoding with the opposite byte order keeps the lower one.
    """
    arguments = picture.tile[0].args if picture.tile else None
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    if not isinstance(raw, str) or raw.partition(";")[2] not in ("16B", "16L", "16N"):
        return None
    again = open_image(data)
    other = raw[:-1] + ("L" if raw.endswith("B") or (raw.endswith("N") and sys.byteorder == "big") else "B")
    if raw == "LA;16B":  # no mode of the opposite order; RGBA of 8 bits has as many bytes
        again._mode, other = "RGBA", "RGBA"
    again.tile = [
        tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other) for tile in again.tile
    ]

    def rows(top: int, bottom: int) -> np.ndarray:
        lower = _rows(again, top, bottom).astype(np.int64)
        if raw == "LA;16B":
            return lower[..., ::2] * 256 + lower[..., 1::2]
        return _rows(picture, top, bottom).astype(np.int64) * 256 + lower

    return rows


def _from_16_bits(values: np.ndarray, transparent: Any) -> np.ndarray:
    """int64 (H, W, C) up to 65535, on white -> uint8 (H, W, 1 or 3), rounded.

    C is 1 or 3, or 2 or 4 with opacity; `transparent` is the colour that counts as transparent, if there is one.
    """
    if values.shape[2] in (2, 4):
        opacity = values[..., -1:]
        values = (values[..., :-1] * opacity + 65535 * (65535 - opacity) + 32767) // 65535
    elif isinstance(transparent, int | tuple):
        values = np.where((values == transparent).all(axis=2, keepdims=True), 65535, values)
    return ((values + 128) // 257).astype(np.uint8)  # round(value / 257): 65535 becomes 255


def _from_pillow(picture: Image.Image) -> Tensor:
    """RGB -> uint8 (3, H, W)."""
    return _in_bands(picture, lambda top, bottom: _rows(picture, top, bottom))


def _in_bands(picture: Image.Image, rows: Rows) -> Tensor:
    """uint8 (3, H, W) from rows of (rows, W, 1 or 3), band by band: whole copies would need much memory."""
    image = np.empty((picture.height, picture.width, 3), np.uint8)
    for top in range(0, picture.height, BAND_ROWS):
        bottom = min(picture.height, top + BAND_ROWS)
        image[top:bottom] = rows(top, bottom)
    return torch.from_numpy(image).permute(2, 0, 1)


def _rows(picture: Image.Image, top: int, bottom: int) -> np.ndarray:
    return np.asarray(picture.crop((0, top, picture.width, bottom)))


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
    if width * height > MAX_PIXELS:
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
