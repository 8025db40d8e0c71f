"""`hieratok sample`."""

from hieratok.generation.config import Sample
from hieratok.settings import command


def run(options: Sample) -> None:
    """The command."""
    from hieratok.tasks.sample import sample

    sample(options)


COMMAND = command("sample", Sample, run, "run")
