"""Options of `hieratok report`. Imports no torch."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class Report:
    """Write a page of all runs in a folder and its sub-folders: state, differing settings, curves, metrics, pictures.

    Example: hieratok report runs
    """

    folder: str
    """Folder with the runs."""
    out: str | None = None
    """File to write. Default: index.html in the folder, or report.html if the folder is itself a run's."""
    json: bool = False
    """Print all facts about the runs as JSON instead of a table."""
