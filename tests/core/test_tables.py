"""The one table, as text and as Markdown, and what goes into its cells."""

import math

import numpy as np
import pytest
from scipy import stats

from hieratok.core.estimates import Estimate
from hieratok.core.tables import Table, digits, estimated, flat, signed

TABLE = Table(["name", "PSNR (dB)"], [["a", "23.1 [22.9, 23.3]"], ["long | name", "7"]], "Two rows.")


def test_text_aligns_numbers_to_the_right():
    assert TABLE.text().splitlines() == [
        "name                 PSNR (dB)",
        "a            23.1 [22.9, 23.3]",
        "long | name                  7",
    ]
    assert Table(["", ""], [["a", "b"]]).text() == "a  b", "no heads, no line of heads"


def test_markdown_keeps_its_columns():
    lines = TABLE.markdown().splitlines()
    assert lines == [
        "| name | PSNR (dB) |",
        "| --- | ---: |",
        "| a | 23.1 [22.9, 23.3] |",
        "| long \\| name | 7 |",
        "",
        "Two rows.",
    ]
    hostile = Table(["x"], [["two\nlines <script>"]]).markdown()
    assert hostile.splitlines()[-1] == "| two lines &lt;script> |"


@pytest.mark.parametrize(
    ("cell", "is_number"),
    [
        ("1,234", True), ("-1.5e-3", True), ("–", True), ("∞", True), ("", True), ("17.1 to 19.5", True),
        ("± 0.02", True), ("1.5 [1, 2]", True), ("12 px", False), ("a", False), ("1.5 [1, b]", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_number(cell, is_number):
    assert (Table(["x"], [[cell]]).kinds == ["number"]) == is_number


def test_rows_have_as_many_cells_as_there_are_heads():
    with pytest.raises(AssertionError):
        Table(["a", "b"], [["1"]])


def test_numbers_in_cells():
    assert [digits(x) for x in (math.nan, -math.inf, 0.00012345678, 3)] == ["–", "−∞", "0.00012346", "3"]
    assert [signed(x) for x in (None, 0.5, -12.345)] == ["–", "+0.5", "-12.3"]
    assert estimated(None) == "–"
    assert estimated(Estimate(1.5)) == "1.5"
    assert estimated(Estimate(-1.5, -2.0, -1.0), is_difference=True) == "-1.5 [-2, -1]"
    assert flat({"a": {"b": 1, "c": None}, "d": [2]}) == [("a, b", "1"), ("a, c", "not known"), ("d", "[2]")]


def test_estimates_are_students():
    values = [20.0, 21.5, 19.25, 24.0]
    found = Estimate.of(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert Estimate.of([*values, math.inf]) == found, "identical images do not count"
    assert Estimate.of([2.0]) == Estimate(2.0)
    assert Estimate.of([math.inf]) == Estimate(math.inf)
