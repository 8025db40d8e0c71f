"""Reading untrusted files within limits: one reader for each kind.

A run's folder, a model, statistics or latents may come from anybody. So only regular files are opened (a FIFO would
block, a device may do anything), sizes are known before memory is taken, nesting is limited, and every error is one
line that begins with the file's name. Weights: `hieratok.core.checkpoint`; pictures: `hieratok.core.pixels`.

Every reader raises

    FileNotFoundError   the file does not exist
    PermissionError     it may not be read
    ValueError          not a regular file, too large, damaged, or of another kind
"""

import json
import math
import os
import stat
import zipfile
from collections.abc import Collection, Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import yaml

from hieratok.core.messages import shown

MAX_JSON_BYTES = 8 << 20
MAX_YAML_BYTES = 256 << 10
MAX_LOG_BYTES = 256 << 20
MAX_LINE_BYTES = 1 << 20
MAX_DEPTH = 32
"""Of nested lists and tables in JSON and YAML."""
MAX_ARRAY_BYTES = 2 << 30
"""Limit for an .npz or .npy that is read into memory, by the sizes in its headers."""
LARGEST_INTEGER_DIGITS = 18
KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


# --- Names ------------------------------------------------------------------------------------------------------------


# --- Bytes ------------------------------------------------------------------------------------------------------------


def check_regular(path: str | os.PathLike) -> os.stat_result:
    """The status of a regular file; links are followed. Nothing is opened.

    Raises:
        FileNotFoundError, PermissionError, ValueError: missing, in a folder that may not be read, or no regular file.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{shown(path)} does not exist") from None
    except OSError as error:
        raise _named(error, path) from None
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "special file")
        raise ValueError(f"{shown(path)} is a {kind}, not a regular file")
    return status


def open_regular(path: str | os.PathLike) -> int:
    """A descriptor of a regular file, open for reading; opening never blocks, even if the file has become a FIFO.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `check_regular`, or it may not be read.
    """
    check_regular(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise _named(error, path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{shown(path)} is no longer a regular file")
    return descriptor


def _named(error: OSError, path: str | os.PathLike) -> OSError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{shown(path)} does not exist")
    if isinstance(error, PermissionError):
        return PermissionError(f"{shown(path)} may not be read: permission denied")
    return OSError(f"{shown(path)} cannot be read: {str(error.strerror).lower()}")


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """A whole regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see above.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{shown(path)} has {size:,} bytes: at most {limit:,} are read")
        try:
            return file.read(limit)
        except OSError as error:
            raise _named(error, path) from None


def read_start(path: str | os.PathLike, count: int) -> bytes:
    """The first `count` bytes of a regular file, fewer if it has no more.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see above.
    """
    with open(open_regular(path), "rb") as file:
        return file.read(count)


# --- JSON and YAML ----------------------------------------------------------------------------------------------------


def read_json(path: str | os.PathLike) -> Any:
    """A JSON file's value.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see above.
    """
    return parse_json(read_bytes(path, MAX_JSON_BYTES), shown(path))


def read_json_table(path: str | os.PathLike) -> dict[str, Any]:
    """The same of a file that must hold a table (an object, in JSON's words)."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{shown(path)} holds no table of values by name")
    return value


def parse_json(text: str | bytes, where: str) -> Any:
    """JSON from text; whole numbers of more than 18 digits become floating-point.

    Args:
        text: the JSON.
        where: its file, for messages.

    Raises:
        ValueError: not JSON, or nested deeper than 32.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    _check_plain(value, where)
    return value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= LARGEST_INTEGER_DIGITS else float(digits)


def read_json_lines(path: str | os.PathLike) -> Iterator[dict[str, Any] | None]:
    """The tables in a JSON Lines file, in order; None for a line that is not one.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see above.
    """
    with open(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_LOG_BYTES:
            raise ValueError(f"{shown(path)} is larger than {MAX_LOG_BYTES:,} bytes")
        while line := file.readline(MAX_LINE_BYTES):
            try:
                value = parse_json(line, "")
            except ValueError:
                value = None
            yield value if isinstance(value, dict) else None


class _PlainLoader(yaml.SafeLoader):
    """Tables, lists, text, numbers, true, false and null. Aliases would let a short file stand for a huge one."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed", problem_mark=self.peek_event().start_mark
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH}", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


# dates stay text: no setting is a date
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The table in a YAML file: of text, numbers, true, false, null, lists and tables of these.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see above.
    """
    data = read_bytes(path, MAX_YAML_BYTES)
    where = shown(path)
    try:
        value = yaml.load(data.decode("utf-8"), _PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where} is not valid YAML: {line}{shown(error.problem)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as characters that YAML forbids
        raise ValueError(f"{where} is not valid YAML: {shown(' '.join(str(error).split()))}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no settings")
    _check_plain(value, where)
    return value


def _check_plain(value: Any, where: str) -> None:
    """Refuse deep nesting, keys that are not text, and values that JSON lacks (YAML's sets, bytes and dates)."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise ValueError(f"{where}: the name {shown(repr(key))} is not text: put it in quotes")
                following += item.values()
            elif isinstance(item, list):
                following += item
            elif not (item is None or isinstance(item, str | int | float | bool)):
                raise ValueError(f"{where} holds a {type(item).__name__}, which JSON does not have")
        if not following:
            return
        level = following
    raise ValueError(f"{where} is nested deeper than {MAX_DEPTH}")


# --- Arrays -----------------------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """The header of an array in numpy's format."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype
    data_bytes: int


def read_npy(path: str | os.PathLike, mapped: bool = False) -> np.ndarray:
    """A .npy, read into memory (2 GiB at most) or mapped.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see above.
    """
    where = shown(path)
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            header = _read_header(file, size)
            if mapped and header.data_bytes:
                order = "F" if header.is_fortran else "C"
                return np.memmap(file, header.dtype, "r", file.tell(), header.shape, order)
            _check_total(header.data_bytes)
            return _read_data(file, header)
        except Exception as error:  # numpy raises many types
            raise ValueError(f"{where} cannot be read as .npy: {_reason(error)}") from error


def npz_names(path: str | os.PathLike) -> list[str]:
    """The names of the arrays in an .npz, without their endings.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see above.
    """
    with _opened(path) as (archive, _):
        return [info.filename.removesuffix(".npy") for info in archive.infolist()]


def read_npz(path: str | os.PathLike, leave_out: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays in an .npz by name, all of them in memory: 2 GiB at most, by the sizes that the file declares.

    Args:
        path: of the file.
        leave_out: names of arrays that are not read.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see above.
    """
    with _opened(path) as (archive, _):
        infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        wanted = {name: info for name, info in infos.items() if name not in leave_out}
        _check_total(sum(info.file_size for info in wanted.values()))
        return {name: _read_member(archive, info) for name, info in wanted.items()}


def map_npz(path: str | os.PathLike, name: str) -> np.ndarray | None:
    """One array of an .npz: mapped if stored uncompressed, else read (2 GiB at most); None: there is none of this name.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see above.
    """
    with _opened(path) as (archive, file):
        info = next((info for info in archive.infolist() if info.filename == f"{name}.npy"), None)
        if info is None:
            return None
        with _open_member(archive, info) as member:
            header = _read_header(member, info.file_size)
            header_bytes = member.tell()
        if info.compress_type != zipfile.ZIP_STORED or header.is_fortran or not header.data_bytes:
            _check_total(info.file_size)
            return _read_member(archive, info)
        # A zip member is a header of 30 bytes, its name, an extra field, and then the content.
        file.seek(info.header_offset + 26)
        name_length, extra_length = (int.from_bytes(file.read(2), "little") for _ in range(2))
        offset = info.header_offset + 30 + name_length + extra_length + header_bytes
        return np.memmap(file, header.dtype, "r", offset, header.shape)


class _opened:
    """An .npz open for reading, as (archive, file); errors inside become one line that names the file."""

    def __init__(self, path: str | os.PathLike):
        self.path = path

    def __enter__(self) -> tuple[zipfile.ZipFile, IO[bytes]]:
        self.file = open(open_regular(self.path), "rb")
        try:
            return zipfile.ZipFile(self.file), self.file
        except Exception as error:
            self.file.close()
            raise self._named(error) from error

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.file.close()
        if isinstance(error, Exception):  # zipfile, zlib and numpy each raise their own
            raise self._named(error) from error

    def _named(self, error: Exception) -> ValueError:
        return ValueError(f"{shown(self.path)} cannot be read as .npz: {_reason(error)}")


class _Refused(ValueError):
    """An error with a message of ours, which may be shown."""


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, _Refused) else "damaged, or of another kind"


def _check_total(size: int) -> None:
    if size > MAX_ARRAY_BYTES:
        raise _Refused(
            f"its arrays would take {size / 2**30:,.1f} GiB of memory, and {MAX_ARRAY_BYTES / 2**30:,.1f} GiB are the"
            " limit (images stored uncompressed, as numpy's savez does, are read in parts)"
        )


def _open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # numpy writes no others
        raise _Refused(f"{shown(info.filename)} is compressed in a way that numpy does not use")
    return archive.open(info)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with _open_member(archive, info) as file:
        return _read_data(file, _read_header(file, info.file_size))


def _read_header(file: IO[bytes], size: int) -> _Header:
    """An array's header; the array must fit in what is left of `size` bytes."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise _Refused("it holds pickled objects, which could run code")
    if any(n < 0 for n in shape):
        raise _Refused(f"its shape is {shape}")
    data_bytes = math.prod(shape) * dtype.itemsize
    if data_bytes > size - file.tell():
        raise _Refused(f"it is cut short: shape {shape} of {dtype} needs {data_bytes:,} bytes")
    return _Header(shape, is_fortran, dtype, data_bytes)


def _read_data(file: IO[bytes], header: _Header) -> np.ndarray:
    if not header.data_bytes:
        return np.empty(header.shape, header.dtype)
    buffer = bytearray(header.data_bytes)
    view, position = memoryview(buffer), 0
    while position < len(buffer):
        part = file.read(min(1 << 20, len(buffer) - position))
        if not part:
            raise _Refused("it is cut short")
        view[position : position + len(part)] = part
        position += len(part)
    array = np.frombuffer(buffer, header.dtype)
    return array.reshape(header.shape[::-1]).T if header.is_fortran else array.reshape(header.shape)
