"""`hieratok latents`."""

from hieratok.data.config import WriteLatents
from hieratok.settings import command


def run(options: WriteLatents) -> None:
    """The command."""
    from hieratok.tasks.latents import write_latents

    write_latents(options)


COMMAND = command("latents", WriteLatents, run, "run")
