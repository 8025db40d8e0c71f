"""Images within larger files, read in any order: shuffling is complete and resuming exact.

The files are WebDataset shards (`shards`), zips (`zips`), Arrow and Parquet files (`tables`), on this machine or,
except Arrow, on the network (`remote`). Over the network the index is read once and cached, and images are read
ahead.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from torch import Tensor

from hieratok.core.files import shown
from hieratok.core.pixels import MAX_IMAGE_BYTES, BadImageError, decode_image
from hieratok.data.folders import LeftOut
from hieratok.data.image_index import ImageIndex, kept_index
from hieratok.data.ranges import RangeFile, Windowed, open_ranges, open_version
from hieratok.data.remote import RemoteError, is_address
from hieratok.data.shards import index_tar
from hieratok.data.tables import index_arrow, unpacked_parquet
from hieratok.data.zips import index_zip, read_member

SUFFIXES = (".tar", ".zip", ".arrow", ".parquet")
INDEX_THREADS = 16  # they wait for the disk or the network; the parsing is not parallel
READ_AHEAD_THREADS = 32
READ_AHEAD_BYTES = 64 << 20
"""Limit per process for images that are being read or wait to be decoded."""


def packed_suffix(file: str) -> str:
    """A file's suffix if it is one of files with many images; else empty."""
    suffix = os.path.splitext(file)[1].lower()
    return suffix if suffix in SUFFIXES else ""


class PackedImages:
    """Images and class labels in WebDataset shards, zips, Arrow or Parquet files: a `Source`.

    In a shard, members whose paths agree up to the first dot of the file name are one sample. Its images are named
    KEY.SUFFIX with an image's suffix or, if there is none, have more in between, such as `7.input.jpg`; links to
    members count as their targets. The label is the `.cls` member of the same path up to the suffix or to an earlier
    dot; it holds the class index as text. A zip counts as the folder that it was made from. In Arrow and Parquet files,
    images are a column of structs with `bytes`, as `datasets` writes them, or of bytes with a name such as `image`;
    labels are an integer column with a name such as `label`. Everything else is counted in one warning.

    Args:
        paths: files of one of these kinds, tar files uncompressed; paths or, but for Arrow, addresses.

    Raises:
        FileNotFoundError, PermissionError: a file is missing or may not be read.
        RemoteError: a server refuses or fails.
        ValueError: files of several kinds, a damaged or truncated file, two members with the same name, a label that
            is not a class index, a member's name that leads outside the archive, a file that is listed twice, an
            address that is not supported, or no images.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = [_absolute(os.fspath(path)) for path in paths]
        if not self.paths:
            raise ValueError("no shards given")
        if len(set(self.paths)) < len(self.paths):
            raise ValueError(f"{shown(max(self.paths, key=self.paths.count))} is listed twice")
        suffixes = {packed_suffix(path) or ".tar": path for path in self.paths}
        if len(suffixes) > 1:
            first, second = list(suffixes.values())[:2]
            raise ValueError(f"{shown(first)} and {shown(second)} are of different kinds: give only one kind")
        (self._suffix,) = suffixes
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            indexes = list(pool.map(lambda path: _index(path, self._suffix), self.paths))
        self._folder = os.path.commonpath([os.path.dirname(path) for path in self.paths])
        self._files = [(index.path, index.version) for index in indexes]
        # Arrays, not lists of objects: forked workers then share them, and the index of a million images is small.
        self._shards = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index.names) for index in indexes])
        self._names = np.concatenate([index.names for index in indexes])
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        self._labels = _common_labels(indexes)
        self._ahead = _Ahead()
        left_out = LeftOut()
        for index in indexes:
            left_out.add(index.left_out)
        kind = "shards" if self._suffix == ".tar" else "files"
        others = f" and the other {kind}" if len(self.paths) > 1 else ""
        if not len(self):
            raise ValueError(f"no images in {shown(self.paths[0])}{others}{left_out.words('; there are ')}")
        left_out.say(self.paths[0] + others)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """File and member, such as `train-000000.tar/n03028079_39506.jpg`; of tables, file and row."""
        file = os.path.relpath(self.paths[self._shards[index]], self._folder)
        return f"{file}/{_decode(self._names[index])}"

    def label(self, index: int) -> int:
        """Class index, -1 where there is none."""
        return int(self._labels[index])

    def image(self, index: int) -> Tensor:
        """uint8 (3, H, W).

        Raises:
            BadImageError: the image is damaged or larger than 256 MiB, or its file was changed or removed.
            RemoteError: the server fails, which says nothing about the image.
        """
        data = self._ahead.take(index)
        return decode_image(self._bytes(index) if data is None else data.result(), self._full_name(index))

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Start to read images over the network in parallel, for later calls of `image`; 64 MiB at most.

        It does nothing for files on this machine, which the operating system reads ahead.
        """
        if is_address(self._files[0][0]):
            for index in indices:
                self._ahead.begin(index, int(self._sizes[index]), self._bytes)

    def _full_name(self, index: int) -> str:
        return f"{self.paths[self._shards[index]]}/{_decode(self._names[index])}"

    def _bytes(self, index: int) -> bytes:
        size, offset = int(self._sizes[index]), int(self._offsets[index])
        name = shown(self._full_name(index))
        if size > MAX_IMAGE_BYTES:
            raise BadImageError(f"cannot read {name}: {size} bytes are more than an image should have")
        try:
            file = open_version(*self._files[self._shards[index]])
            if self._suffix == ".zip":
                return read_member(file, offset, size, len(self._names[index]))
            return file.read(size, offset)
        except (BadImageError, RemoteError):
            raise
        except OSError as error:
            raise BadImageError(f"cannot read {name}: {error.strerror or error}") from error
        except ValueError as error:
            raise BadImageError(f"cannot read {name}: {error}") from error


class _Ahead:
    """Images that are being read, by index. Empty in a forked process, as threads do not survive a fork."""

    def __init__(self) -> None:
        self._process = -1
        self._reset()

    def __reduce__(self) -> tuple[type, tuple]:
        return _Ahead, ()

    def _reset(self) -> None:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._lock = threading.Lock()
            self._pool = ThreadPoolExecutor(READ_AHEAD_THREADS)
            self._waiting: dict[int, tuple[Future[bytes], int]] = {}

    def begin(self, index: int, size: int, read: Callable[[int], bytes]) -> None:
        """Start to read an image, unless too much is being read."""
        self._reset()
        with self._lock:
            on_its_way = sum(other for _, other in self._waiting.values())
            if index not in self._waiting and on_its_way + size <= READ_AHEAD_BYTES:
                self._waiting[index] = (self._pool.submit(read, index), size)

    def take(self, index: int) -> "Future[bytes] | None":
        """An image that is being read, once; None if there is none."""
        self._reset()
        with self._lock:
            return self._waiting.pop(index, (None,))[0]


def _absolute(path: str) -> str:
    return path if is_address(path) else os.path.abspath(path)


def _index(path: str, suffix: str) -> ImageIndex:
    if suffix == ".arrow" and is_address(path):
        raise ValueError(f"{shown(path)}: Arrow files are read from this machine's disks only: save it as Parquet")
    file = open_ranges(path)
    if suffix == ".parquet":
        unpacked = unpacked_parquet(file, path)
        return _index(unpacked, ".arrow")
    if suffix == ".arrow":
        return index_arrow(file, path)
    read: Callable[[RangeFile, str], ImageIndex] = index_zip if suffix == ".zip" else index_tar
    return (
        kept_index(path, file.version(), lambda: read(Windowed(file), path)) if is_address(path) else read(file, path)
    )


def _common_labels(indexes: list[ImageIndex]) -> np.ndarray:
    """Labels that mean the same in all files: for zips, indices into the classes of all files."""
    classes = sorted({name for index in indexes for name in index.classes or ()})
    place = {name: i for i, name in enumerate(classes)}
    labels = []
    for index in indexes:
        if index.classes:
            to = np.array([*(place[name] for name in index.classes), -1], dtype=np.int64)
            labels.append(to[index.labels])  # the last one is for -1
        else:
            labels.append(index.labels)
    return np.concatenate(labels)


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
