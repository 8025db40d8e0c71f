"""`hieratok push`."""

from dataclasses import dataclass

from hieratok.settings import command


@dataclass(kw_only=True)
class Push:
    """Publish a run's tokenizer or generator on the Hugging Face hub, with a model card made from the run.

    Look at what would be published first, with --dry_run: the card has the run's latest picture, settings and metrics.

    Example: hieratok push runs/photos NAME/MODEL --license mit --dry_run
    """

    run: str
    """Folder of the run, or of a model."""
    hub_id: str
    """Repository to publish to, NAME/MODEL; created if it does not exist."""
    license: str
    """Licence, by its SPDX or hub identifier: mit, apache-2.0, cc-by-nc-4.0, other, ..."""
    private: bool = False
    """Make a new repository private. An existing one is not changed."""
    dry_run: bool = False
    """Write what would be published to `hub` in the run's folder, without using the network."""


def run(options: Push) -> None:
    """The command."""
    from hieratok.interop.hub import push

    push(options.run, options.hub_id, options.license, options.private, options.dry_run)


COMMAND = command("push", Push, run, "run", "hub_id")
