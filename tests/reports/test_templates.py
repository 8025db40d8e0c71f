"""Markup, styles and scripts are files of the package, not strings of its code; long names break between parts."""

import ast
import re
from importlib.resources import files
from pathlib import Path

import pytest

import hieratok
from hieratok.reports.templating import Html, asset, block, pieces, render

PACKAGE = Path(hieratok.__file__).parent
MARKUP = re.compile(
    r"</?(a|b|body|button|code|details|dialog|div|figure|h[1-6]|head|html|img|input|li|main|p|pre|script|section|small"
    r"|span|style|summary|svg|t[dhr]|table|ul)(\s[^<>]*)?/?>"
)
STYLES = re.compile(r"\{[^{}]*\b[a-z-]+: [^{};]+;[^{}]*\}|addEventListener|document\.|=> \{")


def strings() -> list[tuple[str, str]]:
    """(module, string) of all code, without docstrings."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            (path.relative_to(PACKAGE).as_posix(), node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told
        ]
    return found


def test_code_holds_no_markup_style_or_script():
    assert len(strings()) > 3_000
    assert not [(module, text) for module, text in strings() if MARKUP.search(text) or STYLES.search(text)]


@pytest.mark.parametrize("text", ["<p>", '<img src="x">', "</details>"])
def test_markup_would_be_found(text):
    assert MARKUP.search(text)


@pytest.mark.parametrize("text", [".a { color: red; }", "x => { y }", 'document.querySelector("a")'])
def test_styles_and_scripts_would_be_found(text):
    assert STYLES.search(text)


def test_everything_is_in_the_package():
    folder = files("hieratok.reports")
    for name in ("templates/page.html", "templates/blocks.html", "templates/app.html", "templates/card.md"):
        assert (folder / name).is_file()
    for name in ("page.css", "page.js", "app.css", "app.js"):
        assert asset(name)


def test_what_comes_from_outside_is_escaped_and_what_is_ours_is_not():
    page = render("page.html", title="<i>", summary="\u202eabc", sections=[Html("<hr>"), "<script>"])
    assert "&lt;i&gt;" in page
    assert "<hr>" in page
    assert "&lt;script&gt;" in page
    assert "\u202e" not in page, "what would turn the text around is written as an escape"
    with pytest.raises(TypeError, match="capton"):
        block("blocks.html", "code", lines="x", capton="misspelt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.learning_rate", ["train.", "learning_", "rate"]),
        ("runs/photos", ["runs/", "photos"]),
        ("images/s", ["images/s"]),
        ("1,234.5 of 0.25", ["1,234.5 of 0.25"]),
        ("reconstruction", ["reconstruction"]),
        ("0123456789abcdef" * 4, ["0123456789abcdef"] * 4),
        ("", [""]),
    ],
)
def test_lines_end_between_the_parts_of_a_name(text, expected):
    assert ["".join(piece) for piece in pieces(text)] == expected


def test_flags_and_numbers_are_not_broken():
    assert pieces("needs --features, 1e-05") == [["needs ", "--features", ", ", "1e-05", ""]]
    assert '<span class="unbroken">--features</span>' in block("blocks.html", "paragraph", text="needs --features")
