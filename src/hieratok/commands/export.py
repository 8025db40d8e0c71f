"""`hieratok export`."""

from hieratok.interop.config import Export
from hieratok.settings import command


def run(options: Export) -> None:
    """The command."""
    from hieratok.interop.export import export

    export(options)


COMMAND = command("export", Export, run, "run")
