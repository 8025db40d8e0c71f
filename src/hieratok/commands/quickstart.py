"""`hieratok quickstart`."""

from dataclasses import dataclass
from pathlib import Path

from hieratok.settings import command


@dataclass(kw_only=True)
class Quickstart:
    """Train a small tokenizer and generator on bundled photos in minutes on a CPU; ends in a page of pictures.

    Example: hieratok quickstart
    """

    out: str = "runs/quickstart"
    """Folder to write to; the same command again resumes."""


def run(options: Quickstart) -> None:
    """The command."""
    from hieratok.reports import quickstart as report
    from hieratok.tasks.quickstart import quickstart

    quickstart(Path(options.out), write_page=report.write)


COMMAND = command("quickstart", Quickstart, run)
