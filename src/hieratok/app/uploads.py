"""Photos uploaded to the app: stored for a limited time, within limits, and checked before decoding."""

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
MAX_PIXELS = 25_000_000  # a 24-megapixel photo; decoding takes at most about 400 MB
MAX_ASPECT = 20  # longer side over shorter side
KINDS = "JPEG, PNG, WebP, BMP, TIFF, AVIF or GIF"

KEPT_SECONDS = 1800  # largest time that an upload is kept
CLIENT_BYTES = 100 * 2**20  # of one address's uploads; then its oldest are removed
TOTAL_BYTES = 2**30  # of all uploads; then the oldest are removed
LEAST_BYTES = 2**16  # smallest size that an upload counts as, which limits their number
GONE = "this photo is not stored here any more: send it again"  # the same for every other file


@dataclass(frozen=True)
class Kept:
    """A stored upload."""

    client: str
    size: int
    since: float


class Uploads:
    """The folder of uploaded photos, the only files that the app reads for a visitor.

    Args:
        folder: an existing empty folder, used by this object alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._kept: dict[Path, Kept] = {}  # oldest first
        self._lock = threading.Lock()

    def keep(self, content: BinaryIO, client: str) -> Path:
        """Store a photo under a name that cannot be guessed; older ones are removed if there is no room.

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
        """The photo stored as `path`; None for everything else, without a disk access."""
        known = Path(path) if isinstance(path, str) else None
        with self._lock:
            return known if known in self._kept else None

    def remove_old(self) -> None:
        """Remove photos that are too old, and the oldest beyond the limits."""
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
    """An uploaded photo, upright (EXIF) and scaled down if needed.

    Args:
        path: from the request.
        name: the file's name at the sender, for messages.
        max_side: of the result, in pixels.
        folder: of uploads; nothing outside of it is read.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadImageError: the photo cannot be read or exceeds a limit.
    """
    data = content_of(path, name, folder)
    check_image(data, name)
    return at_most(decode_image(data, name), max_side)


def content_of(path: object, name: str, folder: Path) -> bytes:
    """The bytes of an upload.

    Raises:
        BadImageError: too large, or not a regular file inside the folder, always with the same message.
    """
    try:
        real = Path(path).resolve(strict=True) if isinstance(path, str) else None
        if real is None or not real.is_relative_to(folder.resolve()):
            raise BadImageError(GONE)
        # Only regular files are opened: a FIFO would block this process.
        file = os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError, RuntimeError):  # missing, not readable, not a path, circular links
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
    """Check a file's header; no pixel is decoded.

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
