"""Photos that visitors of the app send: kept for a while, within limits, and checked before anything is decoded."""

import os
import secrets
import shutil
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hieratok.core.pictures import to_pil
from hieratok.core.pixels import BadImageError, TooManyPixels, TooManyScans, decode_image, open_image

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 25_000_000  # a 24-megapixel photo; decoding takes at most some 400 MB
MAX_ASPECT = 20  # longer side over shorter side
KINDS = "JPEG, PNG, WebP, BMP, TIFF, AVIF or GIF"

KEPT_SECONDS = 1800  # how long an upload is kept at most
CLIENT_BYTES = 100 * 2**20  # of one address's uploads; then its oldest go
TOTAL_BYTES = 2**30  # of all uploads; then the oldest go
LEAST_BYTES = 2**16  # that an upload is counted as, so that there are not too many of them
GONE = "the photo is not here, or not any longer: send it again"  # whatever else lies there


@dataclass(frozen=True)
class Kept:
    """An upload that is still there."""

    client: str
    size: int
    since: float


class Uploads:
    """The folder of photos that were sent; the only files that the app reads for a visitor.

    Args:
        folder: exists, is empty, and belongs to this object alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._kept: dict[Path, Kept] = {}  # the oldest first
        self._lock = threading.Lock()

    def keep(self, content: BinaryIO, client: str) -> Path:
        """Write a photo under a name that cannot be guessed; older ones make room for it.

        Args:
            content: of the file, at its start.
            client: the sender's address.

        Raises:
            OSError: the disk is full.
        """
        path = self.folder / secrets.token_hex(16)
        try:
            with path.open("xb") as file:
                shutil.copyfileobj(content, file)
                size = max(file.tell(), LEAST_BYTES)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        with self._lock:
            self._kept[path] = Kept(client, size, time.monotonic())
        self.remove_old()
        return path

    def find(self, path: object) -> Path | None:
        """The photo that was kept as `path`; None for everything else, without a look at the disk."""
        known = Path(path) if isinstance(path, str) else None
        with self._lock:
            return known if known in self._kept else None

    def remove_old(self) -> None:
        """Remove what is too old, and the oldest of what is too much."""
        with self._lock:
            total = sum(kept.size for kept in self._kept.values())
            of_client: dict[str, int] = {}
            for kept in self._kept.values():
                of_client[kept.client] = of_client.get(kept.client, 0) + kept.size
            now = time.monotonic()
            for path, kept in list(self._kept.items()):
                too_much = total > TOTAL_BYTES or of_client[kept.client] > CLIENT_BYTES
                if too_much or now - kept.since > KEPT_SECONDS:
                    del self._kept[path]
                    path.unlink(missing_ok=True)
                    total -= kept.size
                    of_client[kept.client] -= kept.size


def read_upload(path: object, name: str, max_side: int, folder: Path) -> Tensor:
    """A photo that somebody sent, upright (EXIF) and scaled down if need be.

    Args:
        path: as a request names it.
        name: as the sender calls it, for messages.
        max_side: of what is returned, in pixels.
        folder: of uploads; nothing outside of it is read.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadImageError: one line that says what is wrong.
    """
    data = content_of(path, name, folder)
    check_image(data, name)
    return at_most(decode_image(data, name), max_side)


def content_of(path: object, name: str, folder: Path) -> bytes:
    """The bytes of an upload.

    Raises:
        BadImageError: too large; or no regular file inside the folder, with the same words whatever it is.
    """
    try:
        real = Path(path).resolve(strict=True) if isinstance(path, str) else None
        if real is None or not real.is_relative_to(folder.resolve()):
            raise BadImageError(GONE)
        # What is no regular file is not waited for: the path of a FIFO would block this process for good.
        file = os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError, RuntimeError):  # missing, not readable, no path at all, links in a circle
        raise BadImageError(GONE) from None
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        raise BadImageError(GONE)
    with open(file, "rb") as opened:
        if status.st_size > MAX_BYTES:
            size = f"{status.st_size / 2**20:,.1f} MB"
            raise BadImageError(f"{name} has {size}; the limit is {MAX_BYTES // 2**20} MB")
        return opened.read(MAX_BYTES)


def check_image(data: bytes, name: str) -> None:
    """Refuse a file by what its first bytes say of it; no pixel is decoded.

    Raises:
        BadImageError: too many pixels or scans, too narrow, or not an image of a known kind.
    """
    try:
        with open_image(data) as picture:
            width, height = picture.size
    except TooManyPixels:
        raise BadImageError(f"{name} has more pixels than the limit, {MAX_PIXELS // 10**6} million") from None
    except TooManyScans as error:
        raise BadImageError(f"cannot read {name}: {error}") from None
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
