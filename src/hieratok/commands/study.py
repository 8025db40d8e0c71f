"""`hieratok study`."""

from hieratok.settings import command
from hieratok.studies.config import RunStudy


def run(options: RunStudy) -> None:
    """The command."""
    from hieratok.studies.run import run_study

    run_study(options)


COMMAND = command("study", RunStudy, run, "study")
