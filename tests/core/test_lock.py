"""Locks: a second writer is refused and told who the first is; what a dead one left is no obstacle."""

import errno
import json
import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from hieratok.core import lock as module
from hieratok.core.lock import lock

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["hieratok.core.lock"])


def hold(folder: str, ready: str, with_child: bool) -> None:
    """What another process does: holds a lock until it is killed; perhaps with a child, as data loaders are."""
    with lock(folder, "train"):
        if with_child and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        Path(ready).touch()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Starts processes that hold a lock; kills what is left of them in the end."""
    processes = []

    def start(folder: Path, with_child: bool = False) -> multiprocessing.process.BaseProcess:
        ready = tmp_path / f"ready-{len(processes)}"
        process = SPAWN.Process(target=hold, args=(str(folder), str(ready), with_child))
        process.start()
        processes.append(process)
        while not ready.exists():
            assert process.is_alive()
            time.sleep(0.01)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def patient(monkeypatch):
    """Signs of life far more often, and waited for far less long."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.5)


def write_facts(folder: Path, host: str) -> Path:
    facts = {"command": "hieratok train", "process": 1234, "host": host, "since": "2026-07-01 12:00:00+00:00"}
    path = folder / ".lock"
    path.write_text(json.dumps(facts))
    return path


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, holder):
    first = holder(tmp_path / "out")
    told = rf"out is in use by `hieratok train`, process {first.pid} on host {socket.gethostname()}, since 20\d\d-"
    for _ in range(2):
        with pytest.raises(ValueError, match=told), lock(tmp_path / "out", "sample"):
            pass
    assert first.is_alive()


@pytest.mark.parametrize("with_child", [False, True])
def test_what_a_killed_process_left_is_no_obstacle(tmp_path, holder, monkeypatch, with_child):
    """Nor are its children that live on; and nobody waits."""
    monkeypatch.setattr(module, "_is_alive", None)
    first = holder(tmp_path / "out", with_child)
    first.kill()
    first.join()
    assert (tmp_path / "out" / ".lock").is_file()
    with lock(tmp_path / "out", "train"):
        assert json.loads((tmp_path / "out" / ".lock").read_text())["process"] == os.getpid()
    assert not list((tmp_path / "out").iterdir())


def test_within_one_process(tmp_path):
    with lock(tmp_path / "out", "train"):
        with pytest.raises(ValueError, match=f"process {os.getpid()} "), lock(tmp_path / "x" / ".." / "out", "latents"):
            pass
        with lock(tmp_path / "out", "study table4", ".table4.lock"), lock(tmp_path / "other", "train"):
            pass
        assert (tmp_path / "out" / ".lock").is_file()
    with lock(tmp_path / "out", "train"):
        pass


def test_only_the_first_of_torchruns_processes_locks(tmp_path, monkeypatch):
    with lock(tmp_path / "out", "train"):
        monkeypatch.setenv("RANK", "1")
        with lock(tmp_path / "out", "train"):
            pass


def test_nothing_is_left_of_a_folder_that_nothing_was_written_to(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path / "a" / "b", "train"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    with lock(tmp_path / "a" / "b", "train"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with lock(tmp_path / "empty", "train"):
        pass
    assert not list((tmp_path / "empty").iterdir())


def test_another_hosts_process_that_is_dead(tmp_path, patient, caplog):
    """The system's lock is free, which on some network file systems means nothing; but there is no heartbeat."""
    write_facts(tmp_path, "elsewhere")
    with lock(tmp_path, "train"):
        pass
    assert "last written by process 1234 on host elsewhere: waiting up to" in caplog.text


def test_another_hosts_process_that_lives(tmp_path, patient):
    path = write_facts(tmp_path, "elsewhere")
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    told = "in use by `hieratok train`, process 1234 on host elsewhere, since"
    try:
        with pytest.raises(ValueError, match=told), lock(tmp_path, "train"):
            pass
    finally:
        stop.set()
        thread.join()
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_file_system_without_locks(tmp_path, patient, monkeypatch):
    """Signs of life alone decide."""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(module.fcntl, "lockf", unsupported)
    path = write_facts(tmp_path, socket.gethostname())
    with lock(tmp_path, "train"):
        module._held.clear()  # as another process has it
        with pytest.raises(ValueError, match=f"process {os.getpid()} "), lock(tmp_path, "train"):
            pass
        module._held[path] = {}
    assert not path.exists()


def test_who_holds_a_lock_shows_that_it_lives(tmp_path, patient):
    with lock(tmp_path, "train"):
        before = (tmp_path / ".lock").stat().st_mtime_ns
        deadline = time.monotonic() + 20
        while (tmp_path / ".lock").stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 4000])
def test_a_damaged_file_is_taken_over(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with lock(tmp_path, "train"):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ValueError, match=r"\.lock is not a regular file"), lock(tmp_path, "train"):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), lock(tmp_path, "train"):
        pass
    assert (tmp_path / "elsewhere").read_text() == "kept"
