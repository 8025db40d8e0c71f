"""`hieratok analyze`."""

from hieratok.analysis.config import Analyze
from hieratok.settings import command


def run(options: Analyze) -> None:
    """The command."""
    from hieratok.reports import analysis
    from hieratok.tasks.analyze import analyze

    analyze(options, analysis.write)


COMMAND = command("analyze", Analyze, run, "run")
