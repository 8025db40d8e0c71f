"""The numbers of an analysis with their meanings and references."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hieratok.analysis.density import DensityMetrics
from hieratok.analysis.intervals import Quantity
from hieratok.analysis.report import LatentReport
from hieratok.core.estimates import Estimate
from hieratok.core.glossary import ANALYSIS, Metric
from hieratok.core.tables import Table, digits


@dataclass(frozen=True)
class Line:
    """One number of a report."""

    quantity: Quantity
    value: Estimate
    """The value, with the interval over images if there is one."""
    deviation: float | None = None
    """Standard deviation over draws of points; None: not from draws."""
    floor: float | None = None
    """Value for Gaussian noise; None: not measured."""

    @property
    def metric(self) -> Metric:
        """The number's entry in the glossary."""
        return ANALYSIS[self.quantity.stem]

    @property
    def detail(self) -> str:
        """Scale, transform or sigma, in words; empty if there is only one."""
        return self.quantity.detail_text.replace("_", " ")

    @property
    def label(self) -> str:
        """Label with the detail."""
        return ", ".join(filter(None, (self.metric.with_unit, self.detail)))

    @property
    def spread(self) -> str:
        """± the deviation, or the interval, as text; possibly empty."""
        if self.deviation is not None:
            return f"± {digits(self.deviation, DIGITS)}"
        if self.value.low is None or self.value.high is None:
            return ""
        return f"{digits(self.value.low, DIGITS)} to {digits(self.value.high, DIGITS)}"


DIGITS = 4
"""Significant ones."""
HEADS = ["number", "value", "± or 95% interval", "Gaussian floor", "better"]


def lines(report: LatentReport, stems: Iterable[str] = ANALYSIS) -> list[Line]:
    """The numbers of a report whose names have these stems, in their order."""
    found = list(_numbers(report))
    return [line for stem in stems for line in found if line.quantity.stem == stem]


def _numbers(report: LatentReport) -> Iterator[Line]:
    if (density := report.density) is not None:
        for name in DensityMetrics._fields:
            deviation, floor = (getattr(part, name) if part else None for part in (density.std, density.floor))
            yield Line(Quantity(name), Estimate(getattr(density.mean, name)), deviation, floor)
    if (channels := report.channels) is not None:
        for name in ("effective_rank", "participation_ratio", "active_channels", "dead_channels"):
            yield Line(Quantity(name), Estimate(getattr(channels, name)))
        if channels.kl is not None:
            yield Line(Quantity("kl"), channels.kl)
    for quantity, value in report.decoded.items():
        yield Line(quantity, value)
    for maps, spectrum in report.spectra.items():
        yield Line(Quantity(f"{maps}_power_slope"), spectrum.power_slope)
        if spectrum.high_frequency_share is not None:
            yield Line(Quantity(f"{maps}_high_frequency_share"), spectrum.high_frequency_share)


def table(found: Iterable[Line], caption: str = "") -> Table:
    """A table of numbers under `HEADS`, without empty columns."""
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
