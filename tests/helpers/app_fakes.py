"""Stand-ins for the app's `Demo` that hang, crash and fail. The worker imports them, so nothing heavy here."""

import os
import signal
import time
from collections.abc import Callable, Iterator


class FakeDemo:
    """`photo` does what its first argument says; `generate` counts slowly."""

    facts = "facts"

    def photo(self, what: str, *values: object) -> Iterator[str]:
        yield f"{what} begins"
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)  # as deaf as a thread in a decoder's endless loop
        elif what == "crash":
            os._exit(3)
        elif what == "fail":
            raise RuntimeError("a secret of the server")
        yield f"{what} {os.getpid()}"

    def two_photos(self, *_: object) -> Iterator[str]:
        yield "two photos"

    def generate(self, seconds: float, progress: Callable[[int, int], object]) -> Iterator[str]:
        for i in range(int(seconds * 100)):
            progress(i, int(seconds * 100))
            time.sleep(0.01)
        yield "generated"


def load() -> FakeDemo:
    return FakeDemo()


def load_nothing() -> FakeDemo:
    raise ValueError("no such models")


def load_and_crash() -> FakeDemo:
    os._exit(3)


if __name__ == "__main__":  # a server that is killed while its worker is stuck
    from hieratok.app.worker import Worker

    worker = Worker(load, 600)
    pages = worker.run("generate", 300)
    pid = worker._process.pid
    print(pid, flush=True)
    next(pages)
