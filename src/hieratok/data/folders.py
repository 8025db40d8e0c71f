"""Image files in a folder and its sub-folders, and a count of files left out, so that none is left out silently."""

import functools
import heapq
import logging
import os
from collections import Counter

from hieratok.core.files import shown
from hieratok.core.pixels import has_image_suffix, is_image

MOST_KINDS = 8
"""Kinds that are named; the rest are counted together."""
LONGEST_SUFFIX = 12
TRAIN_NAMES = {"train", "training"}
HELD_OUT_NAMES = {"val", "valid", "validation", "test"}
HEIC = {".heic", ".heif"}

logger = logging.getLogger(__name__)


class LeftOut:
    """Number of files left out, by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, kind: str, number: int = 1) -> None:
        """Count more files of a kind."""
        if number:
            self.counts[kind] += number

    def add(self, other: "LeftOut") -> None:
        """Add another count."""
        self.counts.update(other.counts)

    def words(self, before: str = "") -> str:
        """`before` and then such as `.heic (3), broken links (1)`; empty if nothing was left out."""
        most = self.counts.most_common(MOST_KINDS)
        rest = self.counts.total() - sum(count for _, count in most)
        parts = [f"{kind} ({count:,})" for kind, count in [*most, *([("other kinds", rest)] if rest else [])]]
        advice = "; .heic: convert them to JPEG" if HEIC & set(self.counts) else ""
        return before + ", ".join(parts) + advice if parts else ""

    def say(self, where: str) -> None:
        """Warn if anything was left out, once per process and place."""
        if self.counts:
            _warn_once(f"{shown(where)}: not taken for images: {self.words()}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def kind_left_out(path: str) -> str:
    """The kind of a file that is left out, in words; empty if it is an image. Decided by the suffix, or without one by
    the first bytes."""
    if not os.path.isfile(path):
        return "special files" if os.path.exists(path) else "broken links"
    if has_image_suffix(path):
        return ""
    suffix = os.path.splitext(path)[1].lower()
    return kind_of_suffix(suffix) if suffix or not is_image(path) else ""


def kind_of_suffix(suffix: str) -> str:
    """The kind of files with a suffix, which includes its dot."""
    if not suffix:
        return "no suffix"
    return shown(suffix) if len(suffix) <= LONGEST_SUFFIX else "long suffixes"


def images_below(folder: str) -> tuple[list[str], LeftOut]:
    """Sorted relative paths of all images in a folder and its sub-folders, and the count of other files.

    Hidden files and folders are left out. Links are followed, but each folder is read once: at its real place, if that
    is below `folder`, else at the first link to it.

    Raises:
        OSError: a folder that may not be read.
    """
    names, left_out = [], LeftOut()
    seen: set[tuple[int, int]] = set()
    folders: list[str] = [""]
    links: list[str] = []  # a heap: of several links to a folder, the first by name is taken
    while folders or links:
        below = folders.pop() if folders else heapq.heappop(links)
        here = os.path.join(folder, below)
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            left_out.count("links to folders that are read anyway")
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(here) as entries:
            for entry in entries:
                name, is_hidden = os.path.join(below, entry.name), entry.name.startswith(".")
                if entry.is_dir():
                    if not is_hidden and entry.is_symlink():
                        heapq.heappush(links, name)
                    elif not is_hidden:
                        folders.append(name)
                elif is_hidden:
                    left_out.count("hidden files", has_image_suffix(name))
                elif entry.is_file() and has_image_suffix(name):
                    names.append(name)  # without another disk access: there may be millions
                elif kind := kind_left_out(entry.path):
                    left_out.count(kind)
                else:
                    names.append(name)
    return sorted(names), left_out


def listdir(folder: str) -> list[str]:
    """The names in a folder.

    Raises:
        PermissionError: it may not be read.
    """
    try:
        return os.listdir(folder)
    except PermissionError:
        raise PermissionError(f"{shown(folder)} may not be read: permission denied") from None
