"""`hieratok app`."""

from hieratok.app.config import ServeApp
from hieratok.settings import command


def run(options: ServeApp) -> None:
    """The command."""
    from hieratok.app.server import serve

    serve(options)


COMMAND = command("app", ServeApp, run, "run")
