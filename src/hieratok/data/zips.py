"""A zip of images: the table of contents at its end is the index.

Python's `zipfile` takes a kilobyte of memory for each member, so a hostile table of contents of some megabytes would
take gigabytes. Nothing is unpacked to the disk.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hieratok.core.files import shown
from hieratok.core.pixels import MAX_IMAGE_BYTES, has_image_suffix
from hieratok.data.folders import HELD_OUT_NAMES, TRAIN_NAMES, LeftOut, kind_of_suffix
from hieratok.data.image_index import ImageIndex, check_name
from hieratok.data.ranges import RangeFile

END = struct.Struct("<4s4H2IH")  # magic, disk numbers and counts, size and offset of the table, length of a comment
END64_PLACE = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
ENTRY = struct.Struct("<4s6H3I5H2I")
HEADER = struct.Struct("<4s5H3I2H")
MAX_COMMENT = 1 << 16
MAX_TABLE_BYTES = 1 << 28
"""Limit of a table of contents: enough for more than a million members."""
MAX_EXTRA = 512
"""Bytes between a member's name and its content that are read at once; if there are more, a second read follows."""
STORED, DEFLATED = 0, 8
ENCRYPTED = 1
UTF8 = 1 << 11


class _Entry(NamedTuple):
    name: str
    flags: int
    method: int
    offset: int
    """Offset of the member's header."""
    stored_size: int
    """Size in the archive."""


def index_zip(file: RangeFile, path: str) -> ImageIndex:
    """The place of each image of a zip, in the order of names, and its class.

    A zip counts as the folder that it was made from: first-level folders are the classes. If all images are in one
    folder, that is the one.

    Raises:
        ValueError: damaged, split or not a zip, two members with the same name, a name that leads outside, or both
            training and held-out images.
    """
    places: dict[str, tuple[int, int]] = {}  # name -> offset, size
    left_out = LeftOut()
    for entry in _entries(file, path):
        name = entry.name
        base = name[name.rfind("/") + 1 :]
        if not base or name.startswith("__MACOSX/"):
            continue
        if base.startswith(".") or not has_image_suffix(base):
            suffix = base[base.rfind(".") :].lower() if "." in base else ""
            left_out.count("hidden files" if base.startswith(".") else kind_of_suffix(suffix))
            continue
        check_name(name, path)
        if entry.flags & ENCRYPTED or entry.method not in (STORED, DEFLATED):
            left_out.count("encrypted files" if entry.flags & ENCRYPTED else "files compressed in another way")
        elif name in places:
            raise ValueError(f"{shown(path)} has two members named {shown(name)}")
        else:
            places[name] = (entry.offset, entry.stored_size)
    names = sorted(places)
    classes, labels = _classes(names, path)
    return ImageIndex(
        path,
        file.version(),
        np.array([name.encode("utf-8", "surrogateescape") for name in names], dtype=np.bytes_),
        np.array([places[name][0] for name in names], dtype=np.int64),
        np.array([places[name][1] for name in names], dtype=np.int64),
        np.array(labels, dtype=np.int64),
        left_out,
        classes,
    )


def _classes(names: list[str], path: str) -> tuple[tuple[str, ...], list[int]]:
    """The first-level folders, and each image's index among them."""
    parts = [name.split("/") for name in names]
    depth = 0
    while parts and all(len(one) > depth + 1 and one[depth] == parts[0][depth] for one in parts):
        depth += 1
    folders = [one[depth] if len(one) > depth + 1 else "" for one in parts]
    classes = sorted(set(folders) - {""})
    lower = {name.lower() for name in classes}
    if lower & TRAIN_NAMES and lower & HELD_OUT_NAMES:
        raise ValueError(f"{shown(path)} holds several sets ({', '.join(map(shown, classes[:4]))}): make a zip of each")
    index = {"": -1, **{name: i for i, name in enumerate(classes)}}
    return tuple(classes), [index[folder] for folder in folders]


def read_member(file: RangeFile, offset: int, size: int, name_bytes: int) -> bytes:
    """A member's content, in one read of the file.

    Args:
        file: the zip.
        offset: of the member's header.
        size: of its content in the archive, in bytes.
        name_bytes: the length of its name.

    Raises:
        ValueError: damaged, or larger than an image should be.
    """
    data = file.read(HEADER.size + name_bytes + MAX_EXTRA + size, offset)
    if len(data) < HEADER.size or data[:4] != b"PK\3\4":
        raise ValueError("the archive is damaged")
    fields = HEADER.unpack_from(data)
    method, start = fields[3], HEADER.size + fields[9] + fields[10]
    content = data[start : start + size]
    if len(content) < size:
        content = file.read(size, offset + start)
    if len(content) < size:
        raise ValueError("the archive is cut short")
    if method == STORED:
        return content
    if method != DEFLATED:
        raise ValueError("the archive is damaged")
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plain = inflate.decompress(content, MAX_IMAGE_BYTES + 1)
    except zlib.error:
        raise ValueError("the archive is damaged") from None
    if len(plain) > MAX_IMAGE_BYTES:
        raise ValueError(f"more than {MAX_IMAGE_BYTES:,} bytes are more than an image should have")
    if not inflate.eof:
        raise ValueError("the archive is cut short")
    return plain


def _entries(file: RangeFile, path: str) -> Iterator[_Entry]:
    """The table of contents, without folders' content.

    Raises:
        ValueError: damaged, too large or not a zip.
    """
    table_size, table_offset, shift = _find_table(file, path)
    if table_size > MAX_TABLE_BYTES:
        raise ValueError(f"{shown(path)} has a table of contents of {table_size:,} bytes: {MAX_TABLE_BYTES:,} are read")
    table = file.read(table_size, table_offset)
    if len(table) < table_size:
        raise ValueError(f"{shown(path)} is damaged: its table of contents is cut short")
    position, end = 0, file.version().size
    while position + ENTRY.size <= len(table):
        fields = ENTRY.unpack_from(table, position)
        magic, flags, method, stored, size, offset = fields[0], fields[3], fields[4], fields[8], fields[9], fields[16]
        name_length, extra_length, comment_length = fields[10:13]
        name_start = position + ENTRY.size
        extra_start = name_start + name_length
        position = extra_start + extra_length + comment_length
        if magic != b"PK\1\2" or position > len(table):
            raise ValueError(f"{shown(path)} is damaged: its table of contents cannot be read")
        if 0xFFFFFFFF in (stored, size, offset):
            extra = table[extra_start : extra_start + extra_length]
            stored, offset = _large(extra, stored, size, offset, path)
        offset += shift
        if offset < 0 or offset + HEADER.size + stored > end:
            raise ValueError(f"{shown(path)} is damaged or truncated: a member lies outside of it")
        raw = table[name_start:extra_start]
        try:
            name = raw.decode("utf-8") if flags & UTF8 or raw.isascii() else raw.decode("cp437")
        except UnicodeDecodeError:
            name = raw.decode("utf-8", "surrogateescape")
        yield _Entry(name, flags, method, offset, stored)
    if position != len(table):
        raise ValueError(f"{shown(path)} is damaged: its table of contents cannot be read")


def _find_table(file: RangeFile, path: str) -> tuple[int, int, int]:
    """Size and offset of the table of contents, and the number of bytes before the archive, to add to its offsets."""
    end = file.version().size
    start = max(0, end - MAX_COMMENT - END.size - END64_PLACE.size - END64.size)
    tail = file.read(end - start, start)
    at = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - END.size + 4))
    if at < 0:
        raise ValueError(f"{shown(path)} is not a zip, or truncated: it has no table of contents")
    _, disk, table_disk, _, _, size, offset, _ = END.unpack_from(tail, at)
    if disk not in (0, 0xFFFF) or table_disk not in (0, 0xFFFF):
        raise ValueError(f"{shown(path)} is a part of a split zip: join the parts first (zip -s 0)")
    table_end = start + at
    place = at - END64_PLACE.size
    if place >= 0 and tail[place : place + 4] == b"PK\6\7":  # some programs write it even if it is not needed
        record = start + place - END64.size  # not where the record says, as there may be bytes before the archive
        data = file.read(END64.size, record) if record >= 0 else b""
        if len(data) < END64.size or data[:4] != b"PK\6\6":
            raise ValueError(f"{shown(path)} is damaged: its table of contents cannot be found")
        size, offset, table_end = *END64.unpack(data)[8:10], record
    shift = table_end - size - offset
    if shift < 0 or offset + shift < 0 or size > table_end:
        raise ValueError(f"{shown(path)} is damaged: its table of contents cannot be found")
    return size, offset + shift, shift


def _large(extra: bytes, stored: int, size: int, offset: int, path: str) -> tuple[int, int]:
    """Sizes and offsets that 32 bits do not hold: in field 1, each only if needed, in this order."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            numbers = list(struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4))
            if len(numbers) < [size, stored, offset].count(0xFFFFFFFF):
                break
            _ = numbers.pop(0) if size == 0xFFFFFFFF else size
            stored = numbers.pop(0) if stored == 0xFFFFFFFF else stored
            offset = numbers.pop(0) if offset == 0xFFFFFFFF else offset
            return stored, offset
        extra = extra[4 + length :]
    raise ValueError(f"{shown(path)} is damaged: its table of contents cannot be read")
