"""Reads at any offset of a file, on this machine or on the network (`hieratok.data.remote`).

A file is identified by its path and its `Version`, so that a change while it is in use is noticed when it is opened
again.
"""

import functools
import io
import os
from typing import NamedTuple, Protocol

from hieratok.core.files import open_regular, shown
from hieratok.core.pixels import BadImageError
from hieratok.data.remote import RemoteFile, is_address

MAX_OPEN_FILES = 256
WINDOW_BYTES = 1 << 20
"""A request over the network takes about as long as some hundred kilobytes."""


class Version(NamedTuple):
    """What changes when a file is written to."""

    size: int
    mark: str
    """Local files: time of modification in ns; remote ones: what the server gives, such as an ETag."""


class RangeFile(Protocol):
    """A file that threads may read from at the same time."""

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from an offset; fewer at the end of the file."""
        ...

    def version(self) -> Version:
        """The present version."""
        ...


class LocalFile:
    """A file open for positional reads, which threads and forked processes may share. It is closed with its last
    reference, as another thread may still read when it leaves the cache.

    Args:
        path: of a regular file.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `open_regular`.
    """

    def __init__(self, path: str):
        self._descriptor = -1
        self._descriptor = open_regular(path)

    def __del__(self, close=os.close):
        if self._descriptor >= 0:
            close(self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """One `pread`."""
        return os.pread(self._descriptor, size, offset)

    def version(self) -> Version:
        """Size and time of modification."""
        status = os.fstat(self._descriptor)
        return Version(status.st_size, str(status.st_mtime_ns))


class _RemoteRanges:
    """A `RemoteFile` as a `RangeFile`."""

    def __init__(self, address: str):
        self._file = RemoteFile(address)
        self._version = Version(self._file.size, self._file.mark)

    def read(self, size: int, offset: int) -> bytes:
        return self._file.read(size, offset)

    def version(self) -> Version:
        return self._version


def open_ranges(path: str) -> RangeFile:
    """The file at a path or address.

    Raises:
        FileNotFoundError, PermissionError, ValueError, RemoteError: it cannot be opened.
    """
    return _RemoteRanges(path) if is_address(path) else LocalFile(path)


def open_version(path: str, version: Version) -> RangeFile:
    """The same, kept open for the next time.

    Raises:
        BadImageError: it has another version.
        ...: as `open_ranges`.
    """
    return _open_version(path, version, os.getpid())  # connections do not survive a fork


@functools.lru_cache(maxsize=MAX_OPEN_FILES)
def _open_version(path: str, version: Version, process: int) -> RangeFile:
    file = open_ranges(path)
    if file.version() != version:
        raise BadImageError(f"{shown(path)} was changed since it was indexed")
    return file


class Windowed:
    """Turns many small reads from beginning to end into few larger ones. For one thread.

    Args:
        file: to read from.
    """

    def __init__(self, file: RangeFile):
        self._file = file
        self._window, self._start = b"", 0

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from an offset; fewer at the end of the file."""
        at = offset - self._start
        if not 0 <= at <= at + size <= len(self._window):
            self._window, self._start, at = self._file.read(max(size, WINDOW_BYTES), offset), offset, 0
        return self._window[at : at + size]

    def version(self) -> Version:
        """The file's version."""
        return self._file.version()


class Seekable(io.RawIOBase):
    """A `RangeFile` as a Python file object.

    Args:
        file: to read from.
    """

    def __init__(self, file: RangeFile):
        super().__init__()
        self._file = file
        self._size = file.version().size
        self._position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Offset of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As files do."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """As files do."""
        left = max(0, self._size - self._position)
        data = self._file.read(left if size is None or size < 0 else min(size, left), self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer) -> int:
        """As files do."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
