"""The index of a WebDataset shard: the place of each image, and its class.

One pass over the tar headers gives the index; reading an image is then one `pread`. Python's `tarfile` takes three
times as long for the headers (`benchmarks/data.py`). Shards are not trusted: only regular files of bounded size are
read, and nothing is written to disk.
"""

import posixpath
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hieratok.core.files import shown
from hieratok.core.pixels import SUFFIXES
from hieratok.data.folders import LeftOut, kind_of_suffix
from hieratok.data.image_index import ImageIndex, check_name
from hieratok.data.ranges import RangeFile

BLOCK = 512  # bytes: a tar archive is a sequence of blocks
READ_BYTES = 4096  # one page of the file cache, which often holds the next small member and the header after it
MAX_TEXT_BYTES = 1 << 16  # of a label, a long name or a pax header


def index_tar(file: RangeFile, path: str) -> ImageIndex:
    """The index of one shard, in the order of the archive.

    Raises:
        ValueError: truncated, damaged or not a tar file, two members with the same name, a label that is not a class
            index, or a name that leads outside the archive.
    """
    images: dict[str, tuple[int, int]] = {}  # name -> offset, size
    labels: dict[str, int] = {}  # name without .cls
    links: list[tuple[str, str]] = []  # names of a link and of its target
    left_out = LeftOut()
    for member in _members(file, path):
        name, base = member.name, member.name[member.name.rfind("/") + 1 :]
        suffix = base[base.rfind(".") :].lower() if "." in base[1:] else ""
        is_image = suffix[1:] in SUFFIXES
        if not (is_image or suffix == ".cls") or base.startswith("."):
            if member.kind != "folder" and not (base.startswith(".") and not is_image):
                left_out.count("hidden files" if base.startswith(".") else kind_of_suffix(suffix))
            continue
        check_name(name, path)
        key = name.removesuffix(base[-4:]) if suffix == ".cls" else name
        if key in (labels if suffix == ".cls" else images):
            raise ValueError(f"{shown(path)} has two members named {shown(name)}")
        if member.kind == "file" and suffix == ".cls":
            labels[key] = _label(file.read(min(member.size, MAX_TEXT_BYTES), member.offset), f"{path}/{name}")
        elif member.kind == "file":
            images[name] = (member.offset, member.size)
        elif member.kind == "link" and is_image:
            images[name] = (-1, -1)  # keeps its position
            links.append((name, member.target))
        else:
            left_out.count(member.kind)
    for name, target in links:  # a link may come before its target; links to links must lead to earlier ones
        images[name] = images.get(target, (-1, -1))
    for name, _ in links:
        if images[name][0] < 0:
            del images[name]
            left_out.count("broken links")
    _leave_out_other_fields(images, left_out)
    return ImageIndex(
        path,
        file.version(),
        np.array([_encode(name) for name in images], dtype=np.bytes_),
        np.array([offset for offset, _ in images.values()], dtype=np.int64),
        np.array([size for _, size in images.values()], dtype=np.int64),
        np.array([_label_of(name, labels) for name in images], dtype=np.int64),
        left_out,
    )


def _leave_out_other_fields(images: dict[str, tuple[int, int]], left_out: LeftOut) -> None:
    """In a sample with an image KEY.jpg, an image KEY.seg.png is another field, such as a mask."""
    plain = {name[: name.rfind(".")] for name in images if _key(name) == name[: name.rfind(".")]}
    for name in [name for name in images if _key(name) != name[: name.rfind(".")] and _key(name) in plain]:
        del images[name]
        left_out.count(kind_of_suffix(name[len(_key(name)) :].lower()))


def _key(name: str) -> str:
    """WebDataset's key of a sample: the path up to the first dot of the file's name."""
    base = name.rfind("/") + 1
    return name[: name.index(".", base + 1)]


def _label_of(name: str, labels: dict[str, int]) -> int:
    """An image's label: the one with the longest name that ends at one of the image's dots. -1: none."""
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
        raise ValueError(f"{shown(name)} is not a class index: {text[:40]!r}")
    return label


class _Member(NamedTuple):
    """A member of a tar archive."""

    name: str
    kind: str
    """file, link, folder, or another kind in words."""
    offset: int
    """Offset of its data in the archive."""
    size: int
    target: str = ""
    """A link's target, as a member's name."""


class _Extended(NamedTuple):
    """Values for the next member from extended headers."""

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


def _members(file: RangeFile, path: str) -> Iterator[_Member]:
    """Each member of a tar archive of any dialect: v7, ustar, GNU, pax.

    Raises:
        ValueError: truncated, damaged or not a tar archive.
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
        if letter == b"S":  # blocks with more entries of the sparse map come before the data
            has_more = header[482]
            while has_more:
                block = file.read(BLOCK, offset)
                if len(block) < BLOCK:
                    raise ValueError(f"{shown(path)} is truncated: it has no end-of-archive mark")
                has_more, offset = block[504], offset + BLOCK
        has_data = letter not in b"123456"  # links, devices, folders and pipes have none, whatever their size field
        position = offset + (-(-size // BLOCK) * BLOCK if has_data else 0)
        if position > end:
            raise ValueError(f"{shown(path)} is truncated: a member ends at byte {position}, the file at {end}")

        if letter in b"KLxX":
            extended = _extend(extended, letter, file.read(min(size, MAX_TEXT_BYTES), offset), path)
        elif letter != b"g":  # which has defaults for the whole archive
            name, target = _names(header, extended)
            yield _Member(name, "sparse files" if extended.is_sparse else kind, offset, size, target)
            extended = _Extended()


def _extend(extended: _Extended, letter: bytes, text: bytes, path: str) -> _Extended:
    """Values for the next member, with those of one more extended header, of GNU or pax."""
    if letter == b"L":
        return extended._replace(name=_decode(text.split(b"\0", 1)[0]))
    if letter == b"K":
        return extended._replace(target=_decode(text.split(b"\0", 1)[0]))
    return _read_pax(text, path)


def _names(header: bytes, extended: _Extended) -> tuple[str, str]:
    """A member's name, and its link's target if it is a link."""
    name = _decode(header[:100].split(b"\0", 1)[0])
    if header[257:263] == b"ustar\0" and header[345]:
        name = _decode(header[345:500].split(b"\0", 1)[0]) + "/" + name
    name = _inside(extended.name or name)
    letter = header[156:157]
    if MEMBER_KINDS.get(letter) != "link":
        return name, ""
    target = extended.target or _decode(header[157:257].split(b"\0", 1)[0])
    if letter == b"2":  # a hard link names a member, a symbolic link is relative to its own folder
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    return name, _inside(target)


def _inside(name: str) -> str:
    """A member's name without ./ and / at its beginning."""
    return name.removeprefix("./").lstrip("/")


def _checksum_fits(header: bytes) -> bool:
    """A header's checksum is the sum of its bytes with spaces in the checksum's place; the lower half of Adler-32 is a
    sum of bytes too (plus one, modulo 65521), and much faster than Python's `sum`."""
    total = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
    return total == (_number(header[148:156]) + 1) % 65521


def _number(field: bytes) -> int:
    """An octal number, or a binary one if it was too large."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _read_pax(text: bytes, path: str) -> _Extended:
    """A pax header's values for the next member, in records "LENGTH KEY=VALUE\n"; LENGTH counts the whole record."""
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
