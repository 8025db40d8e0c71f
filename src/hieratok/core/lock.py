"""One writer at a time for each output folder: a second one is refused, and the message names the first.

The operating system's lock decides. It ends with its process, however that ends, so nothing stale remains on one
machine, and NFS carries it to others. Some network file systems do not, or keep it to one machine. So who holds a lock
also writes down its host and process, and touches the file now and then: where the system's lock is free but the file
names another host, the newcomer waits for such a sign of life before it takes the other process for dead.
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
"""Between signs of life of who holds a lock."""
PATIENCE_SECONDS = 90.0
"""Without one, and a process of another host is dead. Longer than NFS remembers a file's times (60 s)."""
MAX_BYTES = 4_096
"""Of a lock's file that are read."""
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Of a file system without locks."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: what its file says."""

    command: str = "another command"
    process: int | str = "unknown"
    host: str = "unknown"
    since: str = "a time unknown"


_held: dict[Path, Holder] = {}  # by this process, which the system's lock would let in again


@contextlib.contextmanager
def lock(folder: str | Path, command: str, name: str = ".lock") -> Iterator[None]:
    """Keep other processes from writing to a folder.

    Of the processes that `torchrun` started the first one locks, for all of them.

    Args:
        folder: made if need be, and removed again if nothing was written.
        command: what the message to the others says is running.
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
    """Holds the lock's file, with `holder` in it, and removes it in the end."""
    descriptor, is_locked = _open(path, folder)
    try:
        before = _read(descriptor)
        # Locked, and this host's: its process is dead, or the system would not have given us the lock.
        is_dead = is_locked and before is not None and before.host == holder.host
        if before and not is_dead and _is_alive(path, folder, before):
            raise ValueError(in_use(folder, before))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)
        try:
            with _signs_of_life(descriptor):
                yield
        finally:
            if _is_same(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


def _open(path: Path, folder: str | Path) -> tuple[int, bool]:
    """The lock's file, open, and whether the system has locked it: not every file system can.

    A record lock (`lockf`): forked processes, such as data loaders that outlive a killed run for some seconds, do not
    inherit it. It would be lost if this process opened and closed the file a second time.

    Raises:
        ValueError: another process has locked it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except FileNotFoundError:  # who held it before has just removed the folder
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
        os.close(descriptor)  # who held it before has just removed it: another one has its name, or will have


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether an open file still lies at a path."""
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
    """The message of who comes second."""
    return (
        f"{folder} is in use by `{holder.command}`, process {holder.process} on host {holder.host}, since"
        f" {holder.since}: wait for it, end it, or choose another folder"
    )


def _is_alive(path: Path, folder: str | Path, holder: Holder) -> bool:
    """Waits for a sign of life of a process that the system's lock may not see."""
    logger.warning(
        "%s was last written by process %s on host %s: waiting up to %.0f s for a sign of life of it",
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
    """When a file was last touched; None: it is gone, as its holder is only now."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _signs_of_life(descriptor: int) -> Iterator[None]:
    """Touches the lock's file now and then."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the network is away: the next one may come through
                os.utime(descriptor)

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
