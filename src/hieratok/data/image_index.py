"""The index of images within a larger file, and its cache for files that are read over the network."""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hieratok.core.extras import needs_extras
from hieratok.core.files import read_npz, shown
from hieratok.data.folders import LeftOut
from hieratok.data.ranges import Version

FORMAT = 1
"""Version of the cached files; those of another version are not found and made again."""
MAX_NAME_LENGTH = 1024
UNUSED_DAYS = 30
"""Days after which unused files of the cache are removed."""


class ImageIndex(NamedTuple):
    """The images of one file, in order."""

    path: str
    """Path or address of the file that holds the images."""
    version: Version
    names: np.ndarray
    """(n,) bytes: names of members or rows."""
    offsets: np.ndarray
    """(n,) int64: offset of an image's bytes; in a zip, of its member's header."""
    sizes: np.ndarray
    """(n,) int64: size of the image in the file, in bytes."""
    labels: np.ndarray
    """(n,) int64: the class index, -1: none."""
    left_out: LeftOut
    classes: tuple[str, ...] | None = None
    """The names of the labels, if the file has them."""


def check_name(name: str, path: str) -> None:
    """Refuse a member's name that is not a path below a folder.

    Raises:
        ValueError: it leads outside the archive or is too long.
    """
    if ".." in name.split("/") or len(name) > MAX_NAME_LENGTH or "\0" in name:
        raise ValueError(f"{shown(path)}: the name {shown(repr(name[:80]))} leads outside the archive or is too long")


def cache_folder() -> Path:
    """$HIERATOK_CACHE, or hieratok in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("HIERATOK_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hieratok"


def kept_file(kind: str, path: str, version: Version, suffix: str, make: Callable[[Path], None]) -> Path:
    """A cached file that belongs to one version of a source file; made if missing.

    Other processes wait while one makes it; it is written atomically. Whenever one is made, files that were not used
    for 30 days are removed.

    Args:
        kind: sub-folder of the cache.
        path: path or address of the source file.
        version: of the source file.
        suffix: of the cached file.
        make: writes the cached file to the given path.

    Raises:
        OSError: the cache cannot be written to.
        ...: as `make`.
    """
    key = hashlib.sha256(json.dumps([FORMAT, path, *version]).encode(errors="surrogateescape")).hexdigest()[:40]
    place = cache_folder() / kind / f"{key}{suffix}"
    if place.is_file():
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(place)  # it is in use
        return place
    with needs_extras():
        from filelock import FileLock
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not place.is_file():
            part = place.with_suffix(".part")  # a killed process's file is overwritten
            try:
                make(part)
                os.replace(part, place)
            finally:
                part.unlink(missing_ok=True)
            _remove_unused()
    return place


def _remove_unused() -> None:
    """Remove this module's files of the cache, whole or not, that were not used for 30 days."""
    oldest = time.time() - UNUSED_DAYS * 86_400
    for file in cache_folder().glob("*/*"):
        with contextlib.suppress(OSError):  # another process was faster, or it is not ours to remove
            if re.fullmatch(r"[0-9a-f]{40}\.(npz|arrow|lock|part)", file.name) and file.stat().st_mtime < oldest:
                file.unlink()


def kept_index(path: str, version: Version, make: Callable[[], ImageIndex]) -> ImageIndex:
    """The index of one version of a file, from the cache if it is there.

    Raises:
        OSError: the cache cannot be written to.
        ...: as `make`.
    """
    place = kept_file("index", path, version, ".npz", lambda to: _save(make(), to))
    try:
        return _load(path, version, place)
    except (ValueError, KeyError):  # damaged
        place.unlink(missing_ok=True)
        place = kept_file("index", path, version, ".npz", lambda to: _save(make(), to))
        return _load(path, version, place)


def _save(index: ImageIndex, to: Path) -> None:
    facts = {"left out": index.left_out.counts, "classes": index.classes}
    text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    with to.open("wb") as file:
        np.savez(file, names=index.names, offsets=index.offsets, sizes=index.sizes, labels=index.labels, facts=text)


def _load(path: str, version: Version, place: Path) -> ImageIndex:
    arrays = read_npz(place)
    facts = json.loads(arrays["facts"].tobytes())
    left_out = LeftOut()
    for kind, count in facts["left out"].items():
        left_out.count(kind, count)
    classes = None if facts["classes"] is None else tuple(facts["classes"])
    return ImageIndex(
        path,
        version,
        arrays["names"],
        arrays["offsets"],
        arrays["sizes"],
        arrays["labels"],
        left_out,
        classes,
    )
