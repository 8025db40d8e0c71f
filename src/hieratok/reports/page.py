"""Building blocks of the pages that commands write: self-contained HTML files with one common style.

A page is made with the functions below:

    page("Title", "What this is.", [section("Results", table(...), line_plot(...)), section("Next", code(...))])

Functions take plain text, which they escape, and pictures, and return `Html`. Pictures are inlined losslessly, to show
exactly what a model made. Pages follow the reader's light or dark setting, fit a phone, and work without their
script (which enlarges pictures and copies tables).
"""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

from PIL import Image

from hieratok.core.checkpoint import atomic_file
from hieratok.core.pictures import ERROR_CEILING, error_colours
from hieratok.core.tables import Table
from hieratok.reports.templating import Html, block, printable, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCKS = "blocks.html"
"""The template with the macros of the functions below."""
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

# Colours for drawing plots; in the page's SVG they become CSS variables, which the reader's theme sets.
INK, GRID = "#000001", "#000002"
SERIES = ("#000011", "#000012", "#000013", "#000014", "#000015", "#000016")
VARIABLES = {INK: "var(--muted)", GRID: "var(--line)", **{c: f"var(--series-{i})" for i, c in enumerate(SERIES)}}


@dataclass(frozen=True)
class Row:
    """Pictures of one thing, side by side."""

    title: str
    """Title, such as a photo's name."""
    pictures: Sequence[Image.Image]
    """One picture for each column."""
    detail: str = ""
    """A line below the title."""
    captions: Sequence[str] = ()
    """A line below each picture, or none."""


@dataclass(frozen=True)
class Line:
    """One curve of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def page(title: str, summary: str, sections: Sequence[Html]) -> Html:
    """A whole HTML document."""
    return render("page.html", title=title, summary=summary, sections=sections)


def write_page(path: Path, document: Html) -> None:
    """Write a page atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(document, encoding="utf-8")


def section(title: str, *parts: Html) -> Html:
    """A heading and its content."""
    return block(BLOCKS, "section", title=title, parts=parts)


def folded(title: str, *parts: Html) -> Html:
    """Content that is shown when its title is selected."""
    return block(BLOCKS, "folded", title=title, parts=parts)


def heading(title: str) -> Html:
    """A heading within a section."""
    return block(BLOCKS, "heading", title=title)


def text(paragraph: str) -> Html:
    """A paragraph."""
    return block(BLOCKS, "paragraph", text=paragraph)


def columns(*parts: Html, width: str = "400px") -> Html:
    """Content side by side, in columns of at least `width`, a length in CSS, if the window is wide enough."""
    return block(BLOCKS, "columns", parts=parts, width=width)


def key_figures(figures: Sequence[tuple[str, str]]) -> Html:
    """The most important numbers, in large type: (value with unit, label)."""
    return block(BLOCKS, "key_figures", figures=figures)


def table(content: Table) -> Html:
    """A table that can be copied as tab-separated text and scrolls if wider than the window."""
    return block(BLOCKS, "table", table=content)


def code(lines: str, caption: str) -> Html:
    """Commands or source that can be copied."""
    return block(BLOCKS, "code", lines=lines.strip(), caption=caption)


def picture_grid(titles: Sequence[str], rows: Sequence[Row], caption: str) -> Html:
    """Pictures in rows and columns; each opens enlarged, and the arrow keys then lead through all of them.

    Args:
        titles: of the columns.
        rows: all pictures have the same width on the page, so a small picture shows large pixels.
        caption: of the grid.
    """
    assert all(len(row.pictures) == len(titles) and len(row.captions) in (0, len(titles)) for row in rows)
    cells = [
        (row.title, row.detail, list(zip(map(inline, row.pictures), row.captions or [""] * len(titles))))
        for row in rows
    ]
    return block(BLOCKS, "picture_grid", titles=titles, rows=cells, caption=caption)


def legend(labels: Sequence[str]) -> Html:
    """A legend for the lines of several plots; it stays in view while its section is read."""
    assert len(labels) <= len(SERIES)
    return block(BLOCKS, "legend", labels=labels)


def error_scale() -> Html:
    """The colour scale of error maps."""
    return block(BLOCKS, "error_scale", stops=error_colours(), ceiling=ERROR_CEILING)


def picture(image: Image.Image, description: str, caption: str) -> Html:
    """One picture, not larger than its size, that opens enlarged, with `description` below it."""
    return block(BLOCKS, "picture", picture=inline(image), description=description, caption=caption)


class Inline(NamedTuple):
    """A picture inside the page."""

    source: str
    """Its data URL."""
    width: int
    """In pixels."""
    height: int


def inline(image: Image.Image, effort: int = 6) -> Inline:
    """A picture as lossless WebP; `effort` from 0, fast, to 6, small."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="WEBP", lossless=True, method=effort)
    return Inline("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), *image.size)


def line_plot(
    lines: Sequence[Line], x_label: str, y_label: str, caption: str, log_y: bool = False, own_legend: bool = True
) -> Html:
    """A plot of curves.

    Args:
        lines: at most as many as `SERIES` has colours; a line without points keeps its colour.
        x_label, y_label: with units.
        caption: of the plot.
        log_y: logarithmic y axis.
        own_legend: show a legend inside the plot if there are several lines; False if plots share a `legend`.
    """
    assert len(lines) <= len(SERIES)
    drawing, axes = plain_axes(x_label, y_label, log_y)
    for line, color in zip(lines, SERIES):
        axes.plot(line.x, line.y, color=color, linewidth=1.6, label=line.label)
    if log_y:
        few_log_ticks(axes)
    if own_legend and len(lines) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    return plot(drawing, caption)


def histogram(values: Sequence[float], x_label: str, caption: str) -> Html:
    """A histogram of finite values, with a line at their mean.

    Args:
        values: at least one.
        x_label: with its unit.
        caption: of the plot.
    """
    from matplotlib.ticker import MaxNLocator

    drawing, axes = plain_axes(x_label, "images")
    bins = min(40, max(5, round(2 * len(values) ** (1 / 3))))  # Rice's rule
    axes.hist(values, bins=bins, color=SERIES[0], rwidth=0.92)
    axes.axvline(math.fsum(values) / len(values), color=SERIES[1], linewidth=1.6)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return plot(drawing, caption)


def plain_axes(x_label: str, y_label: str, log_y: bool = False) -> tuple["Figure", "Axes"]:
    """Axes without a frame, in the theme's colours."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    drawing = Figure(figsize=(5, 3.2), layout="constrained")
    axes = drawing.subplots()
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    if log_y:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_axisbelow(True)
    axes.grid(which="both", color=GRID, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    return drawing, axes


def few_log_ticks(axes: "Axes") -> None:
    """Plain numbers along a logarithmic axis with drawn lines, no more than fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)
    low, high = axes.get_ylim()
    if high > 8 * low:  # labels at 1 to 9 would overlap
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))


def plot(matplotlib_figure: "Figure", caption: str) -> Html:
    """A matplotlib figure as inline SVG. Draw it with `INK`, `GRID` and `SERIES`, which follow the reader's theme."""
    import matplotlib
    from matplotlib.text import Text

    for label in matplotlib_figure.findobj(Text):
        label.set_parse_math(False)  # type: ignore[attr-defined]  # a "$" in a name is a dollar sign
        label.set_text(printable(label.get_text()))
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hieratok"}):
        matplotlib_figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return block(BLOCKS, "captioned", content=Html(themed(buffer.getvalue())), caption=caption, kind="plot")


def themed(svg: str) -> str:
    """matplotlib's SVG as an element of a page, with the page's font and the theme's colours. Unused ids are removed,
    as pages hold several plots."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"#([\w.-]+)", svg))
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}style", f"{{{SVG}}}metadata"):  # a style would apply to the whole page
                parent.remove(child)
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if style := element.get("style"):
            element.set("style", re.sub(r"font-family: [^;]+", "font-family: inherit", style))
    for name in ("width", "height"):
        root.attrib.pop(name)
    root.set("role", "img")
    text = ElementTree.tostring(root, encoding="unicode")
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return text
