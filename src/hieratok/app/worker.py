"""The process that computes for the app. Unlike a thread it can be killed at any time: if a request takes too long, if
a file makes a decoder hang, or when the server ends. The next request starts it again.

They exchange JSON over a pipe. The server sends ["start", JOB, METHOD, ARGUMENTS...] or ["next"]. The worker answers
with any number of ["progress", DONE, TOTAL] and then with one of ["page", HTML], ["done"] and ["failed"]. ["drop", JOB]
has no answer: the rest of the job is not needed.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hieratok.app.handlers import Demo, ModelFacts, Progress

POLL_SECONDS = 0.5  # between two checks whether the visitor is still there


class WorkerError(Exception):
    """A request failed; the message is for the visitor."""


class Worker:
    """A process with the models, which computes one request after another.

    Args:
        load: called in the process; returns the object that answers requests. It and its errors must be picklable.
        time_limit: seconds for one request, from its start to its last page.

    Raises:
        ValueError, FileNotFoundError: as `load`.
    """

    facts: "ModelFacts"

    def __init__(self, load: "Callable[[], Demo]", time_limit: float):
        self.load = load
        self.time_limit = time_limit
        self.closed = False
        self._step = threading.Lock()  # one request at a time
        self._job = 0  # the present or last request
        self._start()

    def _start(self) -> None:
        """Start the process and wait until it has the models."""
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, self.load), name="hieratok-app-worker", daemon=True)
        self._process.start()
        theirs.close()
        if self.closed:  # closed in the meantime
            self._process.kill()
        try:
            answer = self._connection.recv()  # trusted: sent before any data of a visitor reached the process
        except EOFError:
            raise ValueError("the app's worker process ended while it loaded the models") from None
        except BaseException:
            self._process.kill()
            raise
        if isinstance(answer, Exception):
            raise answer
        self.facts = answer

    def run(
        self,
        method: str,
        *arguments: Any,
        progress: "Progress" = lambda *_: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Iterator[str]:
        """The pages of one request.

        Args:
            method: of `Demo`.
            arguments: JSON values.
            progress: called with the steps done and their total.
            wanted: called regularly; False ends the request.

        Raises:
            WorkerError: it took too long, or the process failed; the next request starts a new one.
        """
        job = self._job = self._job + 1  # an unfinished request gets no further answers
        question = ["start", job, method, *arguments]
        deadline = 0.0
        try:
            while True:
                with self._step:
                    if self.closed or self._job != job:
                        return
                    if question[0] == "start":
                        self._revive()
                        deadline = time.monotonic() + self.time_limit
                    try:
                        answer = self._ask(question, deadline, progress, wanted)
                    except BaseException:
                        self._end()  # or the next request would get this one's answer
                        raise
                if answer[0] != "page":
                    break
                yield answer[1]
                question = ["next"]
            if answer[0] == "failed":
                raise WorkerError("something went wrong on the server; its log says what")
        except TimeoutError:
            raise WorkerError(f"this took longer than {self.time_limit:g} s, the limit, and was stopped") from None
        except (EOFError, OSError):
            if not self.closed:
                raise WorkerError("the process that computes has crashed; the next request starts it again") from None
        except GeneratorExit:
            if self._job == job:
                with contextlib.suppress(OSError):
                    self._tell(["drop", job])
            raise

    def _revive(self) -> None:
        """Start the process again if it has ended.

        Raises:
            EOFError: it does not start.
        """
        if self._process.is_alive():
            return
        self._connection.close()
        try:
            self._start()
        except (ValueError, OSError) as error:
            raise EOFError from error

    def _tell(self, question: list[Any]) -> None:
        self._connection.send_bytes(json.dumps(question).encode())

    def _ask(self, question: list[Any], deadline: float, progress: "Progress", wanted: Callable[[], bool]) -> list[Any]:
        """The answer to a question.

        Raises:
            TimeoutError: there is none by the deadline.
            EOFError, OSError: the process has ended.
        """
        self._tell(question)
        dropped = False
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if self._connection.poll(min(left, POLL_SECONDS)):
                answer = json.loads(self._connection.recv_bytes())
                if answer[0] != "progress":
                    return answer
                progress(*answer[1:])
            if not dropped and not wanted():
                self._tell(["drop", self._job])
                dropped = True

    def close(self) -> None:
        """End the process at once. A request in progress ends without a further page."""
        self.closed = True
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()


class Dropped(Exception):
    """The rest of a request is not needed."""


def work(connection: Connection, load: "Callable[[], Demo]") -> None:
    """The process's main function: load the models, then answer requests until the server ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes of a terminal; the server ends this one
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        demo = load()
        connection.send(demo.facts)
    except (ValueError, OSError) as error:
        connection.send(error)
        return
    job = 0

    def progress(done: int, total: int) -> None:
        connection.send_bytes(json.dumps(["progress", done, total]).encode())
        if connection.poll() and json.loads(connection.recv_bytes()) == ["drop", job]:
            raise Dropped

    methods: dict[str, Callable[..., Iterator[str]]] = {
        "photo": demo.photo,
        "two_photos": demo.two_photos,
        "generate": functools.partial(demo.generate, progress=progress),
    }
    pages: Iterator[str] = iter(())
    while True:
        try:
            kind, *content = json.loads(connection.recv_bytes())
            if kind == "drop":
                pages = iter(()) if content == [job] else pages
                continue
            if kind == "start":
                job, method, *arguments = content
                pages = methods[method](*arguments)
            answer = answer_of(pages)
            connection.send_bytes(json.dumps(answer).encode())
        except (EOFError, OSError):  # the server has ended
            return


def answer_of(pages: Iterator[str]) -> list[str]:
    """The next page, or why there is none."""
    try:
        page = next(pages, None)
        return ["done"] if page is None else ["page", page]
    except Dropped:
        return ["done"]
    except Exception:  # the log gets the details, the visitor does not
        traceback.print_exc()
        return ["failed"]


def end_with_parent() -> None:
    """End this process when its parent has ended, even if killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
