"""The app's second process: whatever a request does to it, the next one is answered."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import app_fakes
from helpers.app_fakes import load, load_and_crash, load_nothing
from hieratok.app.worker import Worker, WorkerError


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(load, time_limit=3)
    yield worker
    worker.close()


def test_pages_come_one_by_one(worker):
    assert worker.facts == "facts"
    pages = worker.run("photo", "work", {"path": "x"}, 1.5, None)
    assert next(pages) == "work begins"
    assert next(pages).startswith("work ")
    assert next(pages, None) is None
    assert list(worker.run("two_photos", None, None)) == ["two photos"]


@pytest.mark.parametrize(
    ("what", "reason"), [("stop", "longer than 3 s"), ("crash", "has crashed"), ("fail", "something went wrong")]
)
def test_a_bad_request_leaves_a_usable_worker(worker, what, reason):
    pages = worker.run("photo", what)
    assert next(pages) == f"{what} begins"
    began = time.monotonic()
    with pytest.raises(WorkerError, match=reason) as error:
        next(pages)
    assert time.monotonic() - began < 10
    assert "secret" not in str(error.value)
    assert next(iter(worker.run("photo", "work"))) == "work begins"


def test_the_limit_is_of_the_whole_request(worker):
    began = time.monotonic()
    with pytest.raises(WorkerError, match="longer than 3 s"):
        list(worker.run("generate", 60))
    assert time.monotonic() - began < 10


def test_who_leaves_ends_the_request(worker):
    done: list[int] = []
    pages = worker.run("generate", 60, progress=lambda i, _: done.append(i), wanted=lambda: len(done) < 3)
    assert list(pages) == []
    assert 3 <= len(done) < 250
    pages = worker.run("photo", "work")
    next(pages)
    pages.close()
    assert list(worker.run("two_photos", None, None)) == ["two photos"]


def test_a_failing_caller_gets_no_later_answer_mixed_up(worker):
    def fail(*_: int) -> None:
        raise KeyError("progress")

    with pytest.raises(KeyError):
        list(worker.run("generate", 60, progress=fail))
    assert list(worker.run("two_photos", None, None)) == ["two photos"]


def test_an_older_request_gets_nothing_of_a_newer_one(worker):
    older = worker.run("photo", "older")
    next(older)
    newer = worker.run("photo", "newer")
    assert next(newer) == "newer begins"
    assert list(older) == []
    older.close()
    assert next(newer).startswith("newer ")


def test_closing_ends_what_hangs():
    worker = Worker(load, time_limit=600)
    pages = worker.run("photo", "stop")
    next(pages)
    waiting = threading.Thread(target=lambda: list(pages))
    waiting.start()
    worker.close()
    waiting.join(5)
    assert not waiting.is_alive()
    assert not worker._process.is_alive()


def test_models_that_do_not_load():
    with pytest.raises(ValueError, match="no such models"):
        Worker(load_nothing, 1)
    with pytest.raises(ValueError, match="ended while it loaded"):
        Worker(load_and_crash, 1)


def test_it_ends_with_a_server_that_was_killed():
    path = (
        f"import sys; sys.path = {sys.path!r}; import runpy; runpy.run_path({app_fakes.__file__!r}, {{}}, '__main__')"
    )
    parent = subprocess.Popen([sys.executable, "-c", path], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        assert child.exists()
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline
