"""`hieratok export`."""

from hieratok.export_config import Export
from hieratok.settings import command


def run(options: Export) -> None:
    """The command."""
    from hieratok.export import export

    export(options)


COMMAND = command("export", Export, run, "run")
