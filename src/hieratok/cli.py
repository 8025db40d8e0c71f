"""The command line: one table of commands. No command imports torch before its arguments are parsed."""

import io
import sys

from hieratok import __version__
from hieratok.commands import (
    analyze,
    app,
    bench,
    cost,
    evaluate,
    export,
    latents,
    push,
    quickstart,
    recipes,
    reconstruct,
    report,
    sample,
    study,
    train,
)
from hieratok.core.errors import Stopped, TrainingError
from hieratok.core.extras import needs_extras
from hieratok.core.messages import nearest, shown
from hieratok.core.plugins import take_plugins
from hieratok.settings import Command, overview

DESCRIPTION = "hieratok: multi-scale visual tokenizers (HieraTok, arXiv 2509.23736)"

COMMANDS: dict[str, Command] = {
    "quickstart": quickstart.COMMAND,
    "recipes": recipes.COMMAND,
    "train": train.COMMAND,
    "reconstruct": reconstruct.COMMAND,
    "cost": cost.COMMAND,
    "evaluate": evaluate.COMMAND,
    "analyze": analyze.COMMAND,
    "report": report.COMMAND,
    "latents": latents.COMMAND,
    "sample": sample.COMMAND,
    "study": study.COMMAND,
    "app": app.COMMAND,
    "push": push.COMMAND,
    "export": export.COMMAND,
    "bench": bench.COMMAND,
}


def usage() -> str:
    """The top-level help."""
    last = (
        "`hieratok COMMAND --help` shows a command's options and an example. `--plugin MODULE`, with any command,\n"
        "loads a module of yours that registers down-samplers, losses, discriminators, data sources or study rows."
    )
    return overview("hieratok COMMAND [OPTIONS]", DESCRIPTION, "hieratok quickstart", "commands", COMMANDS, last)


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on standard error and exit status 2, a failed run 1."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold bytes that are not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        argv = take_plugins(argv)
    except ValueError as error:
        return fail(str(error), 2)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"hieratok {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        return fail(f"no command {name!r}{nearest(name, COMMANDS)} (`hieratok --help` lists them)", 2)
    try:
        with needs_extras():
            COMMANDS[name].main(rest)
    except KeyboardInterrupt:
        resumes = name in ("train", "quickstart", "study")
        if name in ("latents", "sample"):
            return fail("interrupted: the same command does the rest", 130)
        return fail("interrupted" + ": the same command resumes from the last checkpoint" * resumes, 130)
    except Stopped as error:
        return fail(str(error), 143)  # as of a process ended by SIGTERM: no script then takes the run for finished
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error), 2)
    except (TrainingError, OSError) as error:
        return fail(str(error), 1)
    return 0


def fail(message: str, status: int) -> int:
    """Print one line, without terminal control characters; return the exit status."""
    print(f"hieratok: {shown(' '.join(message.split()))}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
