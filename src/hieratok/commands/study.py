"""`hieratok study`."""

from hieratok.settings import command
from hieratok.study_config import RunStudy


def run(options: RunStudy) -> None:
    """The command."""
    from hieratok.study import run_study

    run_study(options)


COMMAND = command("study", RunStudy, run, "study")
