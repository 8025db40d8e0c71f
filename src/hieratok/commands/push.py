"""`hieratok push`."""

from dataclasses import dataclass

from hieratok.settings import command


@dataclass(kw_only=True)
class Push:
    """Publish a run's tokenizer or generator on the Hugging Face hub, with a model card made from the run.

    Look at what would be published first, by --dry_run: the card shows the run's latest picture, settings and metrics.

    Example: hieratok push runs/photos NAME/MODEL --license mit --dry_run
    """

    run: str
    """The run, or a model's folder."""
    hub_id: str
    """Where to: NAME/MODEL; made if need be."""
    license: str
    """Under which licence, by SPDX's or the hub's identifier: mit, apache-2.0, cc-by-nc-4.0, other, ..."""
    private: bool = False
    """Make a new repository private. One that is there stays as it is."""
    dry_run: bool = False
    """Write what would be published to `hub` in the run's folder, and ask no network."""


def run(options: Push) -> None:
    """The command."""
    from hieratok.interop.hub import push

    push(options.run, options.hub_id, options.license, options.private, options.dry_run)


COMMAND = command("push", Push, run, "run", "hub_id")
