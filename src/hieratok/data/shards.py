"""WebDataset shards read map-style: any image in any order, which makes shuffling complete and resuming exact.

One pass over the tar headers gives an index of where each image lies; an image is then one `pread`. Python's `tarfile`
reads the same archives but takes three times as long for the headers (`benchmarks/data.py`). A shard may come from
anywhere, so nothing in it is trusted: only regular files are read, of bounded size, and nothing is written to disk.
"""

import functools
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hieratok.data.pixels import SUFFIXES, BadImageError, decode_image

BLOCK = 512  # bytes: a tar archive is a sequence of blocks
READ_BYTES = 4096  # one page of the file cache: often holds the next small member and the header after it
MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 16  # of a label, a long name or a pax header
MAX_NAME_LENGTH = 1024
MAX_OPEN_SHARDS = 256
INDEX_THREADS = 16  # they wait for the disk; the parsing itself is not parallel


class TarShards:
    """Images and class labels in WebDataset shards: a `Source`.

    Members whose paths agree up to the first dot of the file name are one sample. Its image is the member with an
    image's suffix, its label the `.cls` member, which holds the class index as text; other members are ignored.

    Args:
        paths: tar files, uncompressed.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is truncated or no tar file, a sample has two images or a label that is no class index,
            a member's name leads outside the archive, a shard is listed twice, or there are no images.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = [os.path.abspath(path) for path in paths]
        if not self.paths:
            raise ValueError("no shards given")
        if len(set(self.paths)) < len(self.paths):
            raise ValueError(f"{max(self.paths, key=self.paths.count)} is listed twice")
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            shards = list(pool.map(_index_shard, self.paths))
        self._folder = os.path.commonpath([os.path.dirname(path) for path in self.paths])
        self._versions = [shard.version for shard in shards]
        # Arrays and not lists of objects: forked workers then share them, and the index of a million images is small.
        self._shards = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.names) for shard in shards])
        self._names = np.concatenate([shard.names for shard in shards])
        self._offsets = np.concatenate([shard.offsets for shard in shards])
        self._sizes = np.concatenate([shard.sizes for shard in shards])
        self._labels = np.concatenate([shard.labels for shard in shards])
        if not len(self):
            raise ValueError(f"no images in {self.paths[0]}{' and the other shards' if len(self.paths) > 1 else ''}")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Shard and member, such as `train-000000.tar/n03028079_39506.jpg`."""
        shard = os.path.relpath(self.paths[self._shards[index]], self._folder)
        return f"{shard}/{_decode(self._names[index])}"

    def label(self, index: int) -> int:
        """Class index, -1 where the sample has none."""
        return int(self._labels[index])

    def image(self, index: int) -> Tensor:
        """uint8 (3, H, W).

        Raises:
            BadImageError: the image is damaged or larger than 256 MiB, or its shard was changed or removed.
        """
        shard = self._shards[index]
        path, size = self.paths[shard], int(self._sizes[index])
        name = f"{path}/{_decode(self._names[index])}"
        if size > MAX_IMAGE_BYTES:
            raise BadImageError(f"cannot read {name}: {size} bytes are more than an image should have")
        try:
            data = _open_shard(path, self._versions[shard]).read(size, int(self._offsets[index]))
        except OSError as error:
            raise BadImageError(f"cannot read {name}: {error.strerror}") from error
        return decode_image(data, name)


class _Version(NamedTuple):
    """What changes when a file is written to."""

    size: int
    modified: int  # in ns


class _OpenFile:
    """A file open for positional reads, which threads and forked processes may share. It is closed when the last user
    lets go of it, as another thread may be reading when it leaves the cache."""

    def __init__(self, path: str):
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):
        if self._descriptor >= 0:
            close(self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def version(self) -> _Version:
        status = os.fstat(self._descriptor)
        return _Version(status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(path: str, version: _Version) -> _OpenFile:
    file = _OpenFile(path)
    if file.version() != version:
        raise BadImageError(f"{path} was changed since it was indexed")
    return file


class _ShardIndex(NamedTuple):
    version: _Version
    names: np.ndarray  # (n,) bytes
    offsets: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n,) int64
    labels: np.ndarray  # (n,) int64, -1: none


def _index_shard(path: str) -> _ShardIndex:
    """Where each sample's image lies in one shard, in the order of the archive."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    images: dict[str, tuple[str, int, int]] = {}  # key -> name, offset, size
    labels: dict[str, int] = {}
    file = _OpenFile(path)
    for name, offset, size in _regular_files(file, path):
        base = name[name.rfind("/") + 1 :]
        stem, _, suffix = base.partition(".")
        suffix = suffix.lower()
        if not stem or not (suffix == "cls" or suffix in SUFFIXES):
            continue
        key = name[: len(name) - len(base) + len(stem)]
        if ".." in name.split("/") or len(name) > MAX_NAME_LENGTH:
            raise ValueError(f"{path}: the name {name[:80]!r} leads outside the archive or is too long")
        if key in (labels if suffix == "cls" else images):
            raise ValueError(f"{path}: the sample {key!r} has two {'labels' if suffix == 'cls' else 'images'}")
        if suffix == "cls":
            labels[key] = _label(file.read(min(size, MAX_TEXT_BYTES), offset), f"{path}/{name}")
        else:
            images[key] = (name, offset, size)
    return _ShardIndex(
        file.version(),
        np.array([_encode(name) for name, _, _ in images.values()], dtype=np.bytes_),
        np.array([offset for _, offset, _ in images.values()], dtype=np.int64),
        np.array([size for _, _, size in images.values()], dtype=np.int64),
        np.array([labels.get(key, -1) for key in images], dtype=np.int64),
    )


def _label(text: bytes, name: str) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < 1 << 63:
        raise ValueError(f"{name} holds no class index: {text[:40]!r}")
    return label


def _regular_files(file: _OpenFile, path: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular file in a tar archive of any dialect: v7, ustar, GNU, pax.

    Raises:
        ValueError: truncated, damaged or no tar archive.
    """
    end = file.version().size
    chunk, chunk_start = b"", 0
    position = 0
    long_name, long_size = None, None  # from the extended header before a member
    while True:
        at = position - chunk_start
        if at + BLOCK > len(chunk):
            chunk, chunk_start, at = file.read(READ_BYTES, position), position, 0
        header = chunk[at : at + BLOCK]
        if len(header) < BLOCK:
            raise ValueError(f"{path} is truncated: it has no end-of-archive mark")
        if not any(header):
            return
        try:
            if not _checksum_fits(header):
                raise ValueError
            size = _number(header[124:136])
        except ValueError:
            what = f"damaged at byte {position}" if position else "not an (uncompressed) tar file"
            raise ValueError(f"{path} is {what}") from None
        kind, offset = header[156:157], position + BLOCK
        is_file = kind in b"07\0"  # plain, "contiguous", and the oldest archives' plain
        if is_file and long_size is not None:
            size = long_size
        if size < 0:
            raise ValueError(f"{path} is damaged at byte {position}")
        has_data = kind not in b"123456"  # links, devices, folders and pipes have none whatever their size field says
        position = offset + (-(-size // BLOCK) * BLOCK if has_data else 0)
        if position > end:
            raise ValueError(f"{path} is truncated: a member ends at byte {position}, the file at {end}")

        if kind in b"LxX":
            text = file.read(min(size, MAX_TEXT_BYTES), offset)
            if kind == b"L":  # GNU: the next member's long name
                long_name = _decode(text.split(b"\0", 1)[0])
            else:  # pax: the next member's name and size, among other things
                long_name, long_size = _pax_name_and_size(text, path)
            continue
        if kind in b"Kg":  # a long link target, defaults for the whole archive
            continue
        if is_file:
            name = _decode(header[:100].split(b"\0", 1)[0])
            if header[257:263] == b"ustar\0" and header[345]:
                name = _decode(header[345:500].split(b"\0", 1)[0]) + "/" + name
            yield (long_name or name).removeprefix("./").lstrip("/"), offset, size
        long_name, long_size = None, None


def _checksum_fits(header: bytes) -> bool:
    """A header's checksum is the sum of its bytes with spaces in the checksum's place; the lower half of Adler-32 is a
    sum of bytes too (plus one, modulo 65521), and much faster than Python's `sum`."""
    total = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
    return total == (_number(header[148:156]) + 1) % 65521


def _number(field: bytes) -> int:
    """An octal number, or a binary one where it did not fit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _pax_name_and_size(text: bytes, path: str) -> tuple[str | None, int | None]:
    """What a pax header says about the next member, in records "LENGTH KEY=VALUE\n"; LENGTH counts the whole record."""
    name, size = None, None
    try:
        while text.strip(b"\0"):
            length = int(text.split(b" ", 1)[0])
            key, value = text[:length].removesuffix(b"\n").split(b" ", 1)[1].split(b"=", 1)
            if key == b"path":
                name = _decode(value)
            elif key == b"size":
                size = int(value)
            text = text[length:]
    except (ValueError, IndexError):
        raise ValueError(f"{path} is damaged: it has an extended header that cannot be read") from None
    return name, size


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
