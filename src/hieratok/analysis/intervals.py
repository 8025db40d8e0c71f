"""Means over images with their intervals, and their names in files, such as `noise_psnr/0.1`."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from hieratok.core.estimates import Estimate
from hieratok.core.messages import shown
from hieratok.core.typed import typed


class Quantity(NamedTuple):
    """The name of a number."""

    stem: str
    """Its name in the glossary, such as `noise_psnr`."""
    detail: str | float = ""
    """Scale, transform or level of noise; empty if there is only one."""

    @property
    def detail_text(self) -> str:
        """The detail in a file."""
        return self.detail if isinstance(self.detail, str) else f"{self.detail:g}"

    @property
    def key(self) -> str:
        """Its name in a file: `stem` or `stem/detail`."""
        return self._key("")

    def end(self, which: str) -> str:
        """The name of one of its interval's ends, `low` or `high`: `stem_low/detail`."""
        return self._key(f"_{which}")

    def _key(self, suffix: str) -> str:
        return f"{self.stem}{suffix}" + f"/{self.detail_text}" * bool(self.detail_text)

    @classmethod
    def of_key(cls, key: str) -> "Quantity":
        """The inverse of `key`."""
        stem, _, detail = key.partition("/")
        try:
            return cls(stem, float(detail))
        except ValueError:
            return cls(stem, detail)


def summarize(values: Tensor) -> Estimate:
    """The mean over images, and the 95% interval of that mean (Student's t).

    Args:
        values: (N,). Infinite ones (the PSNR of identical images) are left out; if all are infinite, so is the mean.
            The interval of fewer than two images is NaN.
    """
    found = Estimate.of(values.double().tolist())
    return found if found.low is not None else Estimate(found.mean, math.nan, math.nan)


def summarize_columns(values: Tensor) -> list[Estimate]:
    """`summarize` of each column of (N, k)."""
    return [summarize(column) for column in values.T]


def to_json(values: Mapping[Quantity, Estimate]) -> dict[str, float | None]:
    """Means and the ends of their intervals by name, three numbers each."""
    return {
        name: number
        for quantity, value in values.items()
        for name, number in zip(_keys(quantity), (value.mean, value.low, value.high))
    }


def columns_to_json(stem: str, values: list[Estimate]) -> dict[str, list[float | None]]:
    """The same of numbers that come as a list: `stem`, `stem_low` and `stem_high`."""
    rows = [(value.mean, value.low, value.high) for value in values]
    return dict(zip(_keys(Quantity(stem)), map(list, zip(*rows))))


def from_json(table: Mapping[str, Any], where: str) -> dict[Quantity, Estimate]:
    """Every mean in a table that has an interval, in order. null is read as NaN.

    Args:
        table: from `to_json`, with other values.
        where: its file, for messages.

    Raises:
        ValueError: a value that is not a number, or a missing end.
    """
    found = {}
    for key in table:
        quantity = Quantity.of_key(key)
        if quantity.end("low") in table and not isinstance(table[key], list):
            found[quantity] = Estimate(*(read_number(table, name, where) for name in _keys(quantity)))
    return found


def columns_from_json(table: Mapping[str, Any], stem: str, where: str) -> list[Estimate]:
    """The inverse of `columns_to_json`; empty if there are no such numbers. Raises as `from_json`."""
    if stem not in table:
        return []
    columns = [typed(table.get(name), list[float | None], f"{where}: {name}") for name in _keys(Quantity(stem))]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{where}: {stem} and its intervals have different lengths")
    return [Estimate(*(math.nan if x is None else x for x in row)) for row in zip(*columns)]


def read_number(table: Mapping[str, Any], key: str, where: str) -> float:
    """A number of a table; NaN for null. Whole numbers stay whole.

    Raises:
        ValueError: it is missing, or not a number.
    """
    if key not in table:
        raise ValueError(f"{where} lacks {shown(key)}")
    value = typed(table[key], int | float | None, f"{where}: {shown(key)}")
    return math.nan if value is None else value


def _keys(quantity: Quantity) -> tuple[str, str, str]:
    return quantity.key, quantity.end("low"), quantity.end("high")
