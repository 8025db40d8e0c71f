"""`hieratok study`."""

from hieratok.settings import command
from hieratok.studies.config import RunStudy


def run(options: RunStudy) -> None:
    """The command."""
    from hieratok.reports import analysis, study
    from hieratok.studies.run import run_study

    run_study(options, study.write, analysis.write)


COMMAND = command("study", RunStudy, run, "study")
