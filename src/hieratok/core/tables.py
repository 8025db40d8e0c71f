"""Tables as text and as Markdown; pages show them with `reports.page.table`."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hieratok.core.estimates import Estimate

Kind = Literal["number", "sentences", "words"]
"""Kind of a column: numbers are aligned to the right, sentences are wrapped."""

_VALUE = r"([-+−]?[\d,]*\.?\d+(e[-+]?\d+)?|–|∞)"
NUMBER = re.compile(rf"({_VALUE}( \[{_VALUE}, {_VALUE}\])?|{_VALUE} to {_VALUE}|± {_VALUE}|)")
SENTENCE = 60
"""A column with a longer cell is one of sentences."""


@dataclass(frozen=True)
class Table:
    """Rows of cells below a header. Every row has as many cells as the header."""

    header: Sequence[str]
    """A name, with its unit, for each column; if all are empty, the text has no header line."""
    rows: Sequence[Sequence[str]]
    caption: str = ""
    """What the table shows."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)

    @property
    def kinds(self) -> list[Kind]:
        """The kind of each column."""
        return [_kind([row[i] for row in self.rows]) for i in range(len(self.header))]

    def text(self) -> str:
        """For the terminal: columns of one width, numbers to the right, no caption."""
        lines = [self.header, *self.rows] if any(self.header) else list(self.rows)
        widths = [max(map(len, column)) for column in zip(*lines)]
        align = [str.rjust if kind == "number" else str.ljust for kind in self.kinds]
        return "\n".join("  ".join(f(cell, w) for f, cell, w in zip(align, line, widths)).rstrip() for line in lines)

    def markdown(self) -> str:
        """A pipe table, with its caption below it."""
        rules = ["---:" if kind == "number" else "---" for kind in self.kinds]
        lines = ["| " + " | ".join(map(cell, line)) + " |" for line in (self.header, rules, *self.rows)]
        return "\n".join([*lines, "", self.caption] if self.caption else lines)


def _kind(cells: Sequence[str]) -> Kind:
    if all(NUMBER.fullmatch(text) for text in cells):
        return "number"
    return "sentences" if max(map(len, cells)) > SENTENCE else "words"


def cell(text: str) -> str:
    """Text inside a Markdown table: on one line, pipes and tags escaped."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def digits(value: float | None, significant: int = 5) -> str:
    """A number as all tables show it: whole numbers in full, with commas; others with `significant` digits."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{significant}g}"


def signed(value: float | None) -> str:
    """A difference: its sign and three significant digits."""
    return "–" if value is None else f"{value:+.3g}"


def estimated(estimate: Estimate | None, is_difference: bool = False) -> str:
    """A mean with four significant digits, and in brackets its interval if it has one."""
    if estimate is None:
        return "–"
    mean = signed(estimate.mean) if is_difference else digits(estimate.mean)
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} [{digits(estimate.low, 4)}, {digits(estimate.high, 4)}]"


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Facts as rows of two cells; names of nested facts are joined."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}, ")
        else:
            rows.append((f"{prefix}{key}", "not known" if value is None else str(value)))
    return rows


def setting(value: Any) -> str:
    """A setting's value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
