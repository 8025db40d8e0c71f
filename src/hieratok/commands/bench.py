"""`hieratok bench`."""

from hieratok.bench.config import Bench
from hieratok.settings import command


def run(options: Bench) -> None:
    """The command."""
    from hieratok.bench.suite import bench

    bench(options)


COMMAND = command("bench", Bench, run, "what")
