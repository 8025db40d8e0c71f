"""The pages that commands write: one HTML file each that needs nothing from outside, and one look for all of them.

A page is put together from the functions below:

    page("Title", "What this is.", [section("Results", table(...), line_plot(...)), section("Next", code(...))])

Every function takes plain text and pictures and returns `Html`; whatever text it is given is escaped. Pictures are
inlined losslessly, so that what is seen is what a model made. The page follows the reader's light or dark setting, fits
a phone, and works without its script (which enlarges pictures and copies tables).
"""

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NewType

from PIL import Image

from hieratok.checkpoint import atomic_file
from hieratok.files import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Html = NewType("Html", str)

# Colours that a plot is drawn with; in the page's SVG each becomes a CSS variable, which the reader's theme sets.
INK, GRID = "#000001", "#000002"
SERIES = ("#000011", "#000012", "#000013", "#000014", "#000015", "#000016")
VARIABLES = {INK: "var(--muted)", GRID: "var(--line)", **{c: f"var(--series-{i})" for i, c in enumerate(SERIES)}}


@dataclass(frozen=True)
class Row:
    """Pictures of one thing, side by side."""

    title: str
    """What is seen, such as a photo's name."""
    pictures: Sequence[Image.Image]
    """One for each column."""
    detail: str = ""
    """A line below the title."""
    captions: Sequence[str] = ()
    """A line below each picture; or none at all."""


@dataclass(frozen=True)
class Line:
    """One curve of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def page(title: str, summary: str, sections: Sequence[Html]) -> Html:
    """A whole HTML document."""
    return Html(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p>{escape(summary)}</p></header>
{"".join(sections)}
</main>
<dialog id="viewer" aria-label="Enlarged picture"><img alt=""><p></p></dialog>
<script>{SCRIPT}</script>
</body>
</html>
"""
    )


def escape(text: object) -> str:
    """Text inside HTML; of what no page can show or what would change its direction, the escapes."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else shown(c) for c in str(text)))


def write_page(path: Path, document: Html) -> None:
    """Write a page whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(document, encoding="utf-8")


def section(title: str, *parts: Html) -> Html:
    """A heading and what stands below it."""
    return Html(f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>\n")


def text(paragraph: str) -> Html:
    """A paragraph."""
    return Html(f"<p>{escape(paragraph)}</p>")


def columns(*parts: Html, width: int = 400) -> Html:
    """Parts side by side, each of at least `width` px, where the window is wide enough."""
    return Html(f'<div class="columns" style="--width: {width}px">{"".join(parts)}</div>')


def key_figures(figures: Sequence[tuple[str, str]]) -> Html:
    """The few numbers that matter, large: (value with its unit, what it is)."""
    items = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(label)}</dt></div>" for value, label in figures)
    return Html(f'<dl class="key">{items}</dl>')


def figure(content: Html, caption: str, kind: str = "") -> Html:
    """Anything with a caption below it."""
    return Html(f'<figure class="{kind}">{content}<figcaption>{escape(caption)}</figcaption></figure>')


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Html:
    """A table that can be copied as tab-separated text. Columns of numbers are aligned to the right.

    Args:
        header: a name, with its unit, for each column.
        rows: text for each cell.
        caption: what the table shows.
    """
    assert all(len(row) == len(header) for row in rows)
    kinds = [column_kind([row[i] for row in rows]) for i in range(len(header))]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(row, kinds))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    inner = f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>"
    return figure(copyable(Html(f'<div class="scroll">{inner}</div>')), caption)


def column_kind(cells: Sequence[str]) -> str:
    """The class of a table's column: of numbers, of sentences, or neither."""
    if all(NUMBER.fullmatch(cell) for cell in cells):
        return " class=number"
    return " class=sentences" if max(map(len, cells)) > 60 else ""


def code(lines: str, caption: str) -> Html:
    """Commands or source that can be copied."""
    return figure(copyable(Html(f"<pre><code>{escape(lines.strip())}</code></pre>")), caption)


def copyable(content: Html) -> Html:
    """A table or code with a button that copies it as text."""
    return Html(f'<div class="copyable">{content}<button class="copy" hidden>Copy</button></div>')


def picture_grid(titles: Sequence[str], rows: Sequence[Row], caption: str) -> Html:
    """Pictures in rows and columns; each opens enlarged, and the arrow keys then lead through all of them.

    Args:
        titles: of the columns.
        rows: shown at one width whatever their size in pixels: a small picture is as coarse as it is.
        caption: what is seen.
    """
    assert all(len(row.pictures) == len(titles) and len(row.captions) in (0, len(titles)) for row in rows)
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = ""
    for row in rows:
        detail = f"<small>{escape(row.detail)}</small>" if row.detail else ""
        body += f'<tr><th scope="row">{escape(row.title)}{detail}</th>'
        for title, image, line in zip(titles, row.pictures, row.captions or [""] * len(titles)):
            below = f"<small>{escape(line)}</small>" if line else ""
            body += f"<td>{_picture(image, f'{row.title}, {title}')}{below}</td>"
        body += "</tr>"
    return figure(
        Html(
            f'<table class="pictures" style="--columns: {len(titles)}"><thead><tr><td></td>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
        ),
        caption,
    )


def legend(labels: Sequence[str]) -> Html:
    """Names beside the colours of plots' first, second, ... lines; it stays in view while its section is read."""
    assert len(labels) <= len(SERIES)
    items = "".join(f'<li style="--color: var(--series-{i})">{escape(label)}</li>' for i, label in enumerate(labels))
    return Html(f'<ul class="legend">{items}</ul>')


def picture(image: Image.Image, description: str, caption: str) -> Html:
    """One picture, no larger than it is, that opens enlarged; `description` is what stands below it then."""
    shown = f'<div style="max-width: {image.width}px">{_picture(image, description)}</div>'
    return figure(Html(shown), caption, "natural")


def line_plot(
    lines: Sequence[Line], x_label: str, y_label: str, caption: str, log_y: bool = False, own_legend: bool = True
) -> Html:
    """Curves over one axis.

    Args:
        lines: at most as many as there are `SERIES` colours; one without points keeps its colour from the others.
        x_label, y_label: with units.
        caption: what the plot shows.
        log_y: logarithmic y axis.
        own_legend: names of the lines inside the plot, if there are several; False where a `legend` serves many plots.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    assert len(lines) <= len(SERIES)
    drawing = Figure(figsize=(5, 3.2), layout="constrained")
    axes = drawing.subplots()
    for line, color in zip(lines, SERIES):
        axes.plot(line.x, line.y, color=color, linewidth=1.6, label=line.label)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    if log_y:
        axes.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain)
        low, high = axes.get_ylim()
        if high > 8 * low:  # all of 1 to 9 would overlap
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(which="both", color=GRID, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    if own_legend and len(lines) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    return plot(drawing, caption)


def plot(matplotlib_figure: "Figure", caption: str) -> Html:
    """A matplotlib figure as inline SVG. Draw it with `INK`, `GRID` and `SERIES`, which follow the reader's theme."""
    import matplotlib
    from matplotlib.text import Text

    for label in matplotlib_figure.findobj(Text):
        label.set_parse_math(False)  # type: ignore[attr-defined]  # a "$" in a name is a dollar sign
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hieratok"}):
        matplotlib_figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration, which has no place inside HTML
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r' id="[A-Za-z_.]+\d+"', "", svg)  # names of groups, alike in every plot
    svg = re.sub(r"font-family: [^;\"]+", "font-family: inherit", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]+" height="[^"]+"', r'<svg \1role="img"', svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    return figure(Html(svg), caption, "plot")


def _picture(image: Image.Image, description: str) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="WEBP", lossless=True, method=6)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<button class="picture"><img src="{source}" alt="{escape(description)}" {size}></button>'


NUMBER = re.compile(r"[-+−]?[\d,]*\.?\d+(e[-+]?\d+)?|–|∞|")

# Nothing is loaded from anywhere, even if a page were tampered with.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root {
  --paper: #ffffff; --raised: #f5f6f7; --text: #1b1f24; --muted: #59636e; --line: #d8dde2; --accent: #0b62c4;
  --series-0: #0b62c4; --series-1: #c4520b; --series-2: #1a7f4b; --series-3: #8a3fc0; --series-4: #b0243f;
  --series-5: #6b6f00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --raised: #1e2227; --text: #e6e9ec; --muted: #9aa4ae; --line: #343a41; --accent: #6cb2ff;
    --series-0: #6cb2ff; --series-1: #ff9d5c; --series-2: #58c98b; --series-3: #c79bf2; --series-4: #ff8095;
    --series-5: #d2d158;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 48px 0 12px; padding-top: 16px; border-top: 1px solid var(--line); }
p { max-width: 75ch; margin: 0 0 12px; }
header p { color: var(--muted); font-size: 1.05rem; }
.key {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0;
}
.key div { display: flex; flex-direction: column; background: var(--raised); border-radius: 8px; padding: 14px 16px; }
.key dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.key dt { color: var(--muted); font-size: 0.875rem; line-height: 1.35; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--width)), 1fr)); gap: 0 32px; }
figure { margin: 16px 0 24px; min-width: 0; }
figcaption { color: var(--muted); font-size: 0.875rem; line-height: 1.45; margin-top: 8px; max-width: 85ch; }
.plot svg { width: 100%; max-width: 560px; height: auto; display: block; }
.legend {
  position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 2px 20px; margin: 0 0 8px; padding: 8px 0;
  list-style: none; font-size: 0.875rem; background: var(--paper);
}
.legend li::before {
  content: ""; display: inline-block; width: 20px; margin-right: 8px; vertical-align: middle;
  border-top: 3px solid var(--color);
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
.scroll :is(th, td):first-child { position: sticky; left: 0; background: var(--paper); }
th, td { text-align: left; padding: 7px 24px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
.number { text-align: right; }
.sentences { min-width: 20em; overflow-wrap: anywhere; }
pre {
  margin: 0; padding: 14px 16px; overflow-x: auto; background: var(--raised); border-radius: 8px;
  font: 0.875rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
.copyable { position: relative; max-width: 100%; }
.copyable:has(table) { width: fit-content; padding-right: 72px; }
.copy {
  position: absolute; top: 6px; right: 0; font: inherit; font-size: 0.8125rem; padding: 2px 10px; cursor: pointer;
  color: var(--muted); background: var(--paper); border: 1px solid var(--line); border-radius: 6px; opacity: 0;
}
.copyable:hover .copy, .copy:focus-visible { opacity: 1; }
@media (hover: none) { .copy { opacity: 1; } }
.copyable pre + .copy { right: 6px; }
.pictures { width: 100%; table-layout: fixed; }
.pictures th, .pictures td { border: 0; padding: 3px; }
.pictures thead th { text-align: center; font-size: 0.8125rem; line-height: 1.3; vertical-align: bottom; }
.pictures th[scope="row"] { font-size: 0.8125rem; line-height: 1.35; overflow-wrap: anywhere; color: var(--text); }
.pictures thead td { width: 136px; }
.pictures small { display: block; font-size: inherit; font-weight: 400; color: var(--muted); }
.pictures td small { font-size: 0.75rem; line-height: 1.3; text-align: center; padding: 2px 0 4px; }
.picture { display: block; width: 100%; padding: 0; border: 0; background: none; cursor: zoom-in; }
.picture img { display: block; width: 100%; height: auto; border-radius: 3px; image-rendering: pixelated; }
.natural img { image-rendering: auto; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
dialog { border: 0; padding: 16px; background: transparent; color: #ffffff; max-width: 100vw; max-height: 100vh; }
dialog::backdrop { background: rgb(0 0 0 / 0.88); }
dialog img {
  display: block; width: calc(100vw - 64px); height: calc(100vh - 128px); object-fit: contain;
  image-rendering: pixelated; cursor: zoom-out;
}
dialog p { margin: 12px 0 0; text-align: center; max-width: none; }
dialog:focus-visible { outline: none; }
@media (max-width: 600px) {
  main { padding: 20px 16px 48px; }
  h2 { margin-top: 36px; }
  .copyable:has(table) { padding-right: 0; }
  .scroll + .copy { position: static; margin-top: 8px; }
  .scroll :is(th, td):first-child { min-width: 7.5em; overflow-wrap: anywhere; }
  .pictures tr { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); align-items: end; }
  .pictures th, .pictures td { padding: 2px; }
  .pictures thead th { font-size: 0.75rem; }
  .pictures thead td { display: none; }
  .pictures th[scope="row"] { grid-column: 1 / -1; padding-top: 8px; }
  .pictures th small { display: inline; margin-left: 8px; }
  .pictures td small { font-size: 0.6875rem; }
}
@media print { .copy { display: none; } }
"""

SCRIPT = """
const viewer = document.getElementById("viewer");
const pictures = [...document.querySelectorAll(".picture")];
let current = 0;
function show(index) {
  current = (index + pictures.length) % pictures.length;
  const source = pictures[current].firstElementChild;
  viewer.querySelector("img").src = source.src;
  viewer.querySelector("img").alt = source.alt;
  viewer.querySelector("p").textContent = source.alt;
}
pictures.forEach((button, index) => button.addEventListener("click", () => { show(index); viewer.showModal(); }));
viewer.addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => pictures[current].focus());
viewer.addEventListener("keydown", event => {
  if (event.key === "ArrowRight") show(current + 1);
  if (event.key === "ArrowLeft") show(current - 1);
});
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  const block = button.parentElement.querySelector("table, pre");
  button.addEventListener("click", async () => {
    const rows = [...(block.rows ?? [])].map(row => [...row.cells].map(cell => cell.textContent).join("\\t"));
    try {
      await navigator.clipboard.writeText(rows.join("\\n") || block.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(block);  // the browser forbids it: Ctrl+C does the rest
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
"""
