"""`hieratok report`."""

from hieratok.reports.config import Report
from hieratok.settings import command


def run(options: Report) -> None:
    """The command."""
    from hieratok.reports.runs import write_report

    write_report(options)


COMMAND = command("report", Report, run, "folder")
