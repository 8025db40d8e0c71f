"""The pages: whatever goes in is escaped, nothing comes from outside, pictures survive, tables keep their cells."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from helpers.pages import Reader, assert_self_contained
from hieratok.core.tables import Table
from hieratok.reports import page as report
from hieratok.reports.templating import asset

NASTY = "<b>&\"'</script>$x_1$"


def everything(text: str) -> report.Html:
    """A page of every part, with `text` wherever text goes."""
    image = Image.new("RGB", (4, 4), (200, 10, 30))
    line = report.Line(text, [0, 1, 2], [3.0, 2.0, 1.5])
    parts = [
        report.text(text),
        report.key_figures([(text, text)]),
        report.columns(report.line_plot([line, line], text, text, text, log_y=True)),
        report.legend([text]),
        report.picture(image, text, text),
        report.table(Table([text, "dB"], [[text, "1.5"]], text)),
        report.code(text, text),
        report.picture_grid([text], [report.Row(text, [image], text, [text])], text),
    ]
    return report.page(text, text, [report.section(text, *parts)])


def test_every_text_is_escaped_and_shown_as_it_is():
    page = everything(NASTY)
    reader = Reader(page)
    assert not reader.open
    assert not reader.tags("b")
    assert len(reader.tags("script")) == 1
    # page, section, text, key figures, plot, legend, picture, table, code, pictures
    places = 3 + 1 + 1 + 2 + 5 + 1 + 1 + 3 + 2 + 5
    assert reader.text.count(NASTY) == places
    assert f"{NASTY}, {NASTY}" in [a.get("alt") for a in reader.tags("img")]


def test_a_page_needs_nothing_from_outside():
    page = everything("x")
    assert_self_contained(page)
    policy = next(a["content"] for a in Reader(page).tags("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "snippet", ['<img src="https://x/y.png">', '<link href="//x/y.css">', "<p style='background:url(x)'>"]
)
def test_the_check_for_outside_things_can_fail(snippet):
    with pytest.raises(AssertionError):
        assert_self_contained(everything("x") + report.Html(snippet))


def test_pictures_are_lossless():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    page = report.picture_grid(["original"], [report.Row("noise", [Image.fromarray(pixels)])], "A picture.")
    (attributes,) = Reader(page).tags("img")
    source = attributes["src"]
    assert source is not None
    decoded = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert np.array_equal(np.asarray(decoded), pixels)
    assert (attributes["width"], attributes["height"]) == ("13", "9")
    assert attributes["alt"] == "noise, original"


def test_tables_keep_their_cells_and_align_numbers():
    page = report.table(Table(["name", "PSNR (dB)"], [["a", "23.10"], ["b", "-1.5e-3"]], "Numbers."))
    reader = Reader(page)
    assert reader.cells == ["name", "PSNR (dB)", "a", "23.10", "b", "-1.5e-3"]
    assert [a.get("class") for a in reader.tags("td")] == [None, "number", None, "number"]


def test_sentences_in_tables_have_room():
    page = report.table(Table(["name", "meaning"], [["a", "word " * 20], ["b", ""]], "Words."))
    assert [a.get("class") for a in Reader(page).tags("td")] == [None, "sentences"] * 2


def test_plots_take_their_colours_from_the_theme():
    lines = [report.Line(str(i), [1, 10], [i + 1.0, i + 2.0]) for i in range(len(report.SERIES))]
    svg = report.line_plot(lines, "steps", "loss", "A plot.")
    assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a fixed colour would vanish in one of the themes"
    for i in range(len(lines)):
        assert f"var(--series-{i})" in svg
        assert asset("page.css").count(f"--series-{i}:") == 2, "light and dark"


def test_pages_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "index.html"
    report.write_page(path, everything("α"))
    assert path.read_text(encoding="utf-8") == everything("α")
    with pytest.raises(UnicodeEncodeError):
        report.write_page(path, report.Html("\ud800"))
    assert path.read_text(encoding="utf-8") == everything("α")
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]
