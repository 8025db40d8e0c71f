"""Options of `hieratok report`. Imports no torch."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class Report:
    """A page of all runs in a folder and below it: how far each got, settings that differ, curves, metrics, pictures.

    Example: hieratok report runs
    """

    folder: str
    """Where the runs are."""
    out: str | None = None
    """The page. Default: index.html in the folder, or report.html if the folder is itself a run's."""
    json: bool = False
    """Print all that is known of the runs as JSON instead of a table."""
