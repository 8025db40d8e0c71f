"""The progress bar of all commands."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from hieratok.core.distributed import is_first


def note(text: str) -> None:
    """Print a line on standard error of the first process, above a progress bar if there is one."""
    if is_first():
        tqdm.write(text, file=sys.stderr)


def progress(
    items: Iterable[Any] | None = None,
    *,
    unit: str,
    title: str,
    total: int | None = None,
    done: int = 0,
    leave: bool = True,
    hide: bool = False,
) -> tqdm:
    """A bar on standard error of the first process, updated often on a terminal and seldom in a file.

    Args:
        items: iterated over, if given; else call `update(count)`.
        unit: what is counted, in the plural.
        title: what is being done.
        total: how many there are.
        done: how many were done before.
        leave: whether the full bar stays.
        hide: show nothing.
    """
    return tqdm(
        items,
        desc=title,
        unit=f" {unit}",
        total=total,
        initial=done,
        leave=leave,
        smoothing=0.05,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=hide or not is_first(),
    )
