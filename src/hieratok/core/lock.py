"""One writer at a time for each output folder: a second writer is refused, and the message names the first.

The operating system's lock decides. It ends with its process, so nothing stale remains on one machine, and NFS shares
it with other machines. Some network file systems do not. So the holder also writes its host and process into the lock's
file, and touches the file regularly (heartbeat): where the system's lock is free but the file names another host, the
next process waits for a heartbeat before it takes the holder for dead.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from hieratok.core.distributed import is_first

logger = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
"""Seconds between two heartbeats of a holder."""
PATIENCE_SECONDS = 90.0
"""Seconds without a heartbeat after which a process of another host counts as dead. Longer than NFS caches a file's
times (60 s)."""
MAX_BYTES = 4_096
"""Largest number of bytes read from a lock's file."""
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of a file system without locks."""


@dataclass(frozen=True)
class Holder:
    """The holder of a lock, as written in its file."""

    command: str = "another command"
    process: int | str = "unknown"
    host: str = "unknown"
    since: str = "an unknown time"


_held: dict[Path, Holder] = {}  # by this process: the system's lock would admit it a second time


@contextlib.contextmanager
def lock(folder: str | Path, command: str, name: str = ".lock") -> Iterator[None]:
    """Keep other processes from writing to a folder.

    Of the processes of a `torchrun` job, the first locks for all.

    Args:
        folder: created if needed, and removed again if nothing was written.
        command: the running command, for the message to other processes.
        name: the lock's file in the folder. Locks of different names do not exclude each other.

    Raises:
        ValueError: another process holds the lock; the message names it.
        OSError: the folder cannot be written.
    """
    if not is_first():
        yield
        return
    path = Path(folder).resolve() / name
    made = [parent for parent in path.parents if not parent.exists()]
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    holder = Holder(f"hieratok {command}", os.getpid(), socket.gethostname(), since)
    if path in _held:
        raise ValueError(in_use(folder, _held[path]))
    _held[path] = holder
    try:
        with _system_lock(path, folder, holder):
            yield
    finally:
        del _held[path]
        for parent in made:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()


@contextlib.contextmanager
def _system_lock(path: Path, folder: str | Path, holder: Holder) -> Iterator[None]:
    """Holds the lock's file, with `holder` in it, and removes it at the end."""
    descriptor, is_locked = _open(path, folder)
    try:
        before = _read(descriptor)
        # The holder was on this host and is dead, or the system would not have given us the lock.
        is_dead = is_locked and before is not None and before.host == holder.host
        if before and not is_dead and _is_alive(path, folder, before):
            raise ValueError(in_use(folder, before))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)
        try:
            with _heartbeat(descriptor):
                yield
        finally:
            if _is_same(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


def _open(path: Path, folder: str | Path) -> tuple[int, bool]:
    """The lock's file, open, and whether it is locked: not every file system can lock.

    A record lock (`lockf`): forked processes, such as data loaders that outlive a killed run for some seconds, do not
    inherit it. It would be lost if this process opened and closed the file a second time.

    Raises:
        ValueError: another process has locked it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except FileNotFoundError:  # the former holder has just removed the folder
            continue
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{path} is not a regular file: remove it")
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(descriptor, path):
                return descriptor, True
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return descriptor, False
            holder = _read(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(in_use(folder, holder or Holder())) from None
            raise error
        except ValueError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the former holder has just removed it: this is not the file of this name any more


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Holder | None:
    """What the holder of a lock wrote about itself; None if nothing can be read."""
    try:
        facts = json.loads(os.pread(descriptor, MAX_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict) or not facts:
        return None
    return Holder(**{f.name: facts[f.name] for f in fields(Holder) if isinstance(facts.get(f.name), str | int)})


def in_use(folder: str | Path, holder: Holder) -> str:
    """The message for the second process."""
    return (
        f"{folder} is in use by `{holder.command}`, process {holder.process} on host {holder.host}, since"
        f" {holder.since}: wait for it, end it, or choose another folder"
    )


def _is_alive(path: Path, folder: str | Path, holder: Holder) -> bool:
    """Waits for a heartbeat of a process on another host."""
    logger.warning(
        "%s was last written by process %s on host %s: waiting up to %.0f s for its heartbeat",
        folder,
        holder.process,
        holder.host,
        PATIENCE_SECONDS,
    )
    before, deadline = _written(path), time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)
        if _written(path) != before:
            return True
    return False


def _written(path: Path) -> int | None:
    """When a file was last touched; None: its holder has just removed it."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _heartbeat(descriptor: int) -> Iterator[None]:
    """Touches the lock's file regularly."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the network failed: the next heartbeat may succeed
                os.utime(descriptor)

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
