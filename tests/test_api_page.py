"""docs/api.md: up to date, and what it says of a name is in that name's docstring."""

import importlib
from pathlib import Path

import pytest

DOCS = next(folder / "docs" for folder in Path(__file__).resolve().parents if (folder / "docs" / "api.py").is_file())


@pytest.fixture
def api(monkeypatch):
    """docs/api.py."""
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("api")


def test_the_page_is_up_to_date(api):
    assert api.PAGE.read_text() == api.page(), "run `make docs`"


def test_every_public_name_is_on_the_page(api):
    import hieratok

    page = api.PAGE.read_text()
    names = [name for modules in api.NAMES.values() for names in modules.values() for name in names]
    assert set(hieratok.__all__) <= set(names)
    for name in names:
        assert f"\n### {name}\n" in page
    for method in ("preprocess", "postprocess", "encode", "decode_progressive", "from_pretrained"):
        assert f"\n#### HieraTok.{method}" in page


def documented(x: int = 1, *, y: str | None = None) -> dict[str, int]:
    """First, `a*b` and c*d.

    Args:
        x: one
            two: three.
        y: four.

    Returns:
        What it
        gives.

    Raises:
        ValueError: x < 0.
    """
    return {str(y): x}


def test_docstrings_become_markdown(api):
    assert api.definition(documented, "f") == "f(x: int = 1, *, y: str | None = None) -> dict[str, int]"
    assert api.text(documented) == "\n\n".join(
        [
            "First, `a*b` and c\\*d.",
            "Args:",
            "- `x`: one two: three.\n- `y`: four.",
            "Returns: What it gives.",
            "Raises:",
            "- `ValueError`: x \\< 0.",
        ]
    )


def test_a_long_signature_is_broken_at_its_arguments(api, monkeypatch):
    monkeypatch.setattr(api, "LONGEST", 20)
    expected = ["f(", "    x: int = 1,", "    *,", "    y: str | None = None,", ") -> dict[str, int]"]
    assert api.definition(documented, "f").splitlines() == expected


def test_a_name_without_docstring_is_an_error(api):
    def bare():
        pass

    with pytest.raises(AssertionError, match="no docstring"):
        api.text(bare)
