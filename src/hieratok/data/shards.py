"""WebDataset shards read map-style: any image in any order, which makes shuffling complete and resuming exact.

One pass over the tar headers gives an index of where each image lies; an image is then one `pread`. Python's `tarfile`
reads the same archives but takes three times as long for the headers (`benchmarks/data.py`). A shard may come from
anywhere, so nothing in it is trusted: only regular files are read, of bounded size, and nothing is written to disk.
"""

import functools
import os
import posixpath
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hieratok.core.files import open_regular, shown
from hieratok.core.pixels import MAX_IMAGE_BYTES, SUFFIXES, BadImageError, decode_image
from hieratok.data.folders import LeftOut, kind_of_suffix

BLOCK = 512  # bytes: a tar archive is a sequence of blocks
READ_BYTES = 4096  # one page of the file cache: often holds the next small member and the header after it
MAX_TEXT_BYTES = 1 << 16  # of a label, a long name or a pax header
MAX_NAME_LENGTH = 1024
MAX_OPEN_SHARDS = 256
INDEX_THREADS = 16  # they wait for the disk; the parsing itself is not parallel


class TarShards:
    """Images and class labels in WebDataset shards: a `Source`.

    Members whose paths agree up to the first dot of the file name are one sample. Its images are those called
    KEY.SUFFIX with an image's suffix, or where there is none those with more between, such as `7.input.jpg`; links to
    members in the archive count as what they lead to. The label is the `.cls` member of the same path up to the suffix
    or to an earlier dot; it holds the class index as text. Other members are left out: counted, and said once.

    Args:
        paths: tar files, uncompressed.

    Raises:
        FileNotFoundError, PermissionError: a shard is missing or may not be read.
        ValueError: a shard is truncated or no tar file, two members have one name, a label is no class index,
            a member's name leads outside the archive, a shard is listed twice, or there are no images.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = [os.path.abspath(path) for path in paths]
        if not self.paths:
            raise ValueError("no shards given")
        if len(set(self.paths)) < len(self.paths):
            raise ValueError(f"{shown(max(self.paths, key=self.paths.count))} is listed twice")
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
        left_out = LeftOut()
        for shard in shards:
            left_out.add(shard.left_out)
        others = " and the other shards" if len(self.paths) > 1 else ""
        if not len(self):
            raise ValueError(f"no images in {shown(self.paths[0])}{others}{left_out.words('; there are ')}")
        left_out.say(self.paths[0] + others)

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
            raise BadImageError(f"cannot read {shown(name)}: {size} bytes are more than an image should have")
        try:
            data = _open_shard(path, self._versions[shard]).read(size, int(self._offsets[index]))
        except OSError as error:
            raise BadImageError(f"cannot read {shown(name)}: {error.strerror or error}") from error
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
        self._descriptor = open_regular(path)

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
        raise BadImageError(f"{shown(path)} was changed since it was indexed")
    return file


class _ShardIndex(NamedTuple):
    version: _Version
    names: np.ndarray  # (n,) bytes
    offsets: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n,) int64
    labels: np.ndarray  # (n,) int64, -1: none
    left_out: LeftOut


def _index_shard(path: str) -> _ShardIndex:
    """Where each image lies in one shard, in the order of the archive."""
    file = _OpenFile(path)
    images: dict[str, tuple[int, int]] = {}  # name -> offset, size
    labels: dict[str, int] = {}  # name without .cls
    links: list[tuple[str, str]] = []  # names of a link and of what it leads to
    left_out = LeftOut()
    for member in _members(file, path):
        name, base = member.name, member.name[member.name.rfind("/") + 1 :]
        suffix = base[base.rfind(".") :].lower() if "." in base[1:] else ""
        is_image = suffix[1:] in SUFFIXES
        if not (is_image or suffix == ".cls") or base.startswith("."):
            if member.kind != "folder" and not (base.startswith(".") and not is_image):
                left_out.count("hidden files" if base.startswith(".") else kind_of_suffix(suffix))
            continue
        if ".." in name.split("/") or len(name) > MAX_NAME_LENGTH or "\0" in name:
            raise ValueError(
                f"{shown(path)}: the name {shown(repr(name[:80]))} leads outside the archive or is too long"
            )
        key = name.removesuffix(base[-4:]) if suffix == ".cls" else name
        if key in (labels if suffix == ".cls" else images):
            raise ValueError(f"{shown(path)} has two members called {shown(name)}")
        if member.kind == "file" and suffix == ".cls":
            labels[key] = _label(file.read(min(member.size, MAX_TEXT_BYTES), member.offset), f"{path}/{name}")
        elif member.kind == "file":
            images[name] = (member.offset, member.size)
        elif member.kind == "link" and is_image:
            images[name] = (-1, -1)  # holds its place
            links.append((name, member.target))
        else:
            left_out.count(member.kind)
    for name, target in links:  # a link may come before what it leads to; of links to links, only to earlier ones
        images[name] = images.get(target, (-1, -1))
    for name, _ in links:
        if images[name][0] < 0:
            del images[name]
            left_out.count("links to nothing")
    _leave_out_other_fields(images, left_out)
    return _ShardIndex(
        file.version(),
        np.array([_encode(name) for name in images], dtype=np.bytes_),
        np.array([offset for offset, _ in images.values()], dtype=np.int64),
        np.array([size for _, size in images.values()], dtype=np.int64),
        np.array([_label_of(name, labels) for name in images], dtype=np.int64),
        left_out,
    )


def _leave_out_other_fields(images: dict[str, tuple[int, int]], left_out: LeftOut) -> None:
    """Of a sample with an image KEY.jpg, an image KEY.seg.png is another field, such as a mask."""
    plain = {name[: name.rfind(".")] for name in images if _key(name) == name[: name.rfind(".")]}
    for name in [name for name in images if _key(name) != name[: name.rfind(".")] and _key(name) in plain]:
        del images[name]
        left_out.count(kind_of_suffix(name[len(_key(name)) :].lower()))


def _key(name: str) -> str:
    """WebDataset's name of a sample: up to the first dot of the file's name."""
    base = name.rfind("/") + 1
    return name[: name.index(".", base + 1)]


def _label_of(name: str, labels: dict[str, int]) -> int:
    """The label that belongs to an image: of the longest name before one of its dots. -1: none."""
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        if (label := labels.get(folder + slash + base)) is not None:
            return label
    return -1


def _label(text: bytes, name: str) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < 1 << 63:
        raise ValueError(f"{shown(name)} holds no class index: {text[:40]!r}")
    return label


class _Member(NamedTuple):
    """Of a tar archive."""

    name: str
    kind: str
    """file, link, folder, or what else in words."""
    offset: int
    """Of its data in the archive."""
    size: int
    target: str = ""
    """Of a link: the name of the member that it leads to."""


class _Extended(NamedTuple):
    """What the headers before a member say of it."""

    name: str | None = None
    size: int | None = None
    target: str | None = None
    is_sparse: bool = False


MEMBER_KINDS = {
    **dict.fromkeys((b"0", b"7", b"\0"), "file"),  # plain, "contiguous", and the oldest archives' plain
    **dict.fromkeys((b"1", b"2"), "link"),
    b"5": "folder",
    b"S": "sparse files",
}


def _members(file: _OpenFile, path: str) -> Iterator[_Member]:
    """Each member of a tar archive of any dialect: v7, ustar, GNU, pax.

    Raises:
        ValueError: truncated, damaged or no tar archive.
    """
    end = file.version().size
    chunk, chunk_start = b"", 0
    position = 0
    extended = _Extended()
    while True:
        at = position - chunk_start
        if at + BLOCK > len(chunk):
            chunk, chunk_start, at = file.read(READ_BYTES, position), position, 0
        header = chunk[at : at + BLOCK]
        if len(header) < BLOCK:
            raise ValueError(f"{shown(path)} is truncated: it has no end-of-archive mark")
        if not any(header):
            return
        try:
            if not _checksum_fits(header):
                raise ValueError
            size = _number(header[124:136])
        except ValueError:
            what = f"damaged at byte {position}" if position else "not an (uncompressed) tar file"
            raise ValueError(f"{shown(path)} is {what}") from None
        letter, offset = header[156:157], position + BLOCK
        kind = MEMBER_KINDS.get(letter, "special files")
        if kind == "file" and extended.size is not None:
            size = extended.size
        if size < 0:
            raise ValueError(f"{shown(path)} is damaged at byte {position}")
        if letter == b"S":  # blocks that say where more holes are come before the data
            has_more = header[482]
            while has_more:
                block = file.read(BLOCK, offset)
                if len(block) < BLOCK:
                    raise ValueError(f"{shown(path)} is truncated: it has no end-of-archive mark")
                has_more, offset = block[504], offset + BLOCK
        has_data = letter not in b"123456"  # links, devices, folders and pipes have none whatever their size field says
        position = offset + (-(-size // BLOCK) * BLOCK if has_data else 0)
        if position > end:
            raise ValueError(f"{shown(path)} is truncated: a member ends at byte {position}, the file at {end}")

        if letter in b"KLxX":
            text = file.read(min(size, MAX_TEXT_BYTES), offset)
            if letter == b"L":  # GNU: the next member's long name
                extended = extended._replace(name=_decode(text.split(b"\0", 1)[0]))
            elif letter == b"K":  # and where it leads
                extended = extended._replace(target=_decode(text.split(b"\0", 1)[0]))
            else:  # pax: the next member's name and size, among other things
                extended = _read_pax(text, path)
            continue
        if letter == b"g":  # defaults for the whole archive
            continue
        name = _decode(header[:100].split(b"\0", 1)[0])
        if header[257:263] == b"ustar\0" and header[345]:
            name = _decode(header[345:500].split(b"\0", 1)[0]) + "/" + name
        name = _inside(extended.name or name)
        target = ""
        if kind == "link":
            target = extended.target or _decode(header[157:257].split(b"\0", 1)[0])
            if letter == b"2":  # a hard link names a member, a symbolic one leads on from its own folder
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            target = _inside(target)
        yield _Member(name, "sparse files" if extended.is_sparse else kind, offset, size, target)
        extended = _Extended()


def _inside(name: str) -> str:
    """A member's name as it lies in the archive: without ./ and / at its beginning."""
    return name.removeprefix("./").lstrip("/")


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


def _read_pax(text: bytes, path: str) -> _Extended:
    """What a pax header says about the next member, in records "LENGTH KEY=VALUE\n"; LENGTH counts the whole record."""
    extended = _Extended()
    try:
        while text.strip(b"\0"):
            length = int(text.split(b" ", 1)[0])
            key, value = text[:length].removesuffix(b"\n").split(b" ", 1)[1].split(b"=", 1)
            if length < 1:
                raise ValueError
            if key in (b"path", b"GNU.sparse.name"):
                extended = extended._replace(name=_decode(value))
            elif key == b"size":
                extended = extended._replace(size=int(value))
            elif key == b"linkpath":
                extended = extended._replace(target=_decode(value))
            if key.startswith(b"GNU.sparse."):
                extended = extended._replace(is_sparse=True)
            text = text[length:]
    except (ValueError, IndexError):
        raise ValueError(f"{shown(path)} is damaged: it has an extended header that cannot be read") from None
    return extended


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
