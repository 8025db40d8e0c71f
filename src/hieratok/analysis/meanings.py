"""The numbers in an analysis' `metrics.json` as typed values, each with its meaning and what it is compared with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hieratok.core.estimates import Estimate
from hieratok.core.glossary import ANALYSIS, Metric
from hieratok.core.tables import Table, digits


@dataclass(frozen=True)
class Line:
    """One number of a result."""

    metric: Metric
    detail: str
    """Which scale, transform or sigma; empty where there is but one."""
    value: Estimate
    """With the interval over images, where there is one."""
    deviation: float | None
    """Standard deviation over draws of points; None: not of draws."""
    floor: float | None
    """What Gaussian noise gives; None: it was not measured."""

    @property
    def label(self) -> str:
        """What the number is, and of what."""
        return ", ".join(filter(None, (self.metric.with_unit, self.detail)))

    @property
    def spread(self) -> str:
        """± the deviation, or the interval, as text; may be empty."""
        if self.deviation is not None:
            return f"± {digits(self.deviation, DIGITS)}"
        if self.value.low is None or self.value.high is None:
            return ""
        return f"{digits(self.value.low, DIGITS)} to {digits(self.value.high, DIGITS)}"


DIGITS = 4
"""Significant ones."""
HEADS = ["number", "value", "± or 95% interval", "Gaussian floor", "better"]


def lines(result: Mapping[str, Any], stems: Iterable[str] = ANALYSIS) -> list[Line]:
    """The numbers of a `metrics.json` called `stem` or `stem/detail`, in the order of `stems`."""
    found = []
    for stem in stems:
        for key, value in result.items():
            name, slash, detail = key.partition("/")
            if name != stem:
                continue
            low, high = (result.get(f"{stem}_{end}{slash}{detail}") for end in ("low", "high"))
            found.append(
                Line(
                    ANALYSIS[stem],
                    detail.replace("_", " "),
                    Estimate(value, low, high),
                    result.get(f"{stem}_std"),
                    result.get(f"floor_{stem}"),
                )
            )
    return found


def table(found: Iterable[Line], caption: str = "") -> Table:
    """Numbers under `HEADS`; a column that all of them would leave empty is left out."""
    cells = [
        [
            line.label,
            digits(line.value.mean, DIGITS),
            line.spread,
            "" if line.floor is None else digits(line.floor, DIGITS),
            line.metric.better,
        ]
        for line in found
    ]
    kept = [i for i in range(len(HEADS)) if any(row[i] for row in cells)]
    return Table([HEADS[i] for i in kept], [[row[i] for i in kept] for row in cells], caption)
