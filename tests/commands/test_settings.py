"""Flags, files and config.json: one check of types, one reading of a command line's words."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hieratok.core.typed import field_types, flatten, from_json, nested, plain, typed
from hieratok.settings import about, field_texts, help_text, load_options, options_of, placeholder, usage
from hieratok.training.config import GeneratorRun, TokenizerRun


@dataclass(kw_only=True)
class Inner:
    """Within another."""

    rate: float = 0.5
    """A rate."""
    sides: tuple[int, ...] = (1, 2)
    """Some sides."""


@dataclass(kw_only=True)
class Options:
    """Do something. More of it.

    Example: hieratok something here --flag

    Raises:
        ValueError: never.
    """

    place: str
    """Where."""
    files: list[str] = field(default_factory=list)
    """Which."""
    flag: bool = False
    """Whether."""
    name: str | None = None
    """What to call it."""
    choice: Literal["a", "b"] | tuple[int, ...] = "a"
    """One of two, or numbers."""
    pair: tuple[float, float] | None = None
    """Two numbers."""
    inner: Inner = field(default_factory=Inner)
    """More."""


@dataclass(kw_only=True)
class Flat:
    """Without groups."""

    place: str
    """Where."""
    files: list[str] = field(default_factory=list)
    """Which."""
    flag: bool = False
    """Whether."""
    name: str | None = None
    """What to call it."""
    choice: Literal["a", "b"] | tuple[int, ...] = "a"
    """One of two, or numbers."""
    pair: tuple[float, float] | None = None
    """Two numbers."""


def load(*arguments: str) -> Flat:
    return load_options(Flat, ["place", "files"], "hieratok something", arguments)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["here"], {}),
        (["here", "--flag", "x"], {"flag": True, "files": ["x"]}),  # a boolean takes no file for its value
        (["here", "x", "--flag", "false", "y"], {"files": ["x", "y"]}),
        (["here", "--flag=TRUE"], {"flag": True}),
        (["--", "here", "--flag"], {"files": ["--flag"]}),
        (["here", "--name", "null"], {"name": None}),
        (["here", "--name", "3"], {"name": "3"}),
        (["here", "--name", "photos #1 "], {"name": "photos #1 "}),  # not what YAML would make of it
        (["here", "--name", '"x"'], {"name": '"x"'}),
        (["here", "--name="], {"name": ""}),
        (["here", "--name", "2026-11-28"], {"name": "2026-11-28"}),
        (["here", "--choice", "b"], {"choice": "b"}),
        (["here", "--choice", "[1, 2]"], {"choice": (1, 2)}),
        (["here", "--pair", "[1, 2e-3]"], {"pair": (1.0, 0.002)}),
        (["here", "--name", "x", "--name", "y"], {"name": "y"}),
    ],
)
def test_words_become_values(arguments, wanted):
    assert load(*arguments) == Flat(place="here", **wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "hieratok something needs PLACE (`hieratok something --help` shows how)"),
        (
            ["here", "--nmae", "x"],
            "unknown option --nmae; did you mean 'name'? (`hieratok something --help` lists them)",
        ),
        (["here", "--name"], "--name: expected one argument (`hieratok something --help` shows how)"),
        (["here", "--choice", "c"], "--choice must be one of a, b or a list of whole numbers, not 'c'"),
        (["here", "--pair", "[1]"], "--pair must be a list of 2 finite numbers or null, not '[1]'"),
        (["here", "--pair", "[1, .inf]"], "--pair must be a list of 2 finite numbers or null, not '[1, .inf]'"),
        (["here", "--flag=1"], "--flag must be true or false, not '1'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        load(*arguments)
    assert str(error.value) == message


@given(st.text().filter(lambda text: text != "--"))  # which argparse drops before Python 3.13, and refuses
def test_a_text_stays_as_it_is(text):
    assert load("here", f"--name={text}").name == (None if text == "null" else text)


@pytest.mark.parametrize("run", [TokenizerRun(), GeneratorRun()])
def test_a_run_survives_plain_values(run):
    assert from_json(type(run), plain(run), "x") == run
    assert nested(flatten(plain(run))) == plain(run)
    assert field_types(type(run)).keys() == flatten(plain(run)).keys()


def test_tables_within_tables():
    made = from_json(Options, {"place": "x", "inner": {"rate": 1, "sides": [3]}}, "x.json")
    assert made == Options(place="x", inner=Inner(rate=1.0, sides=(3,)))
    assert isinstance(made.inner.rate, float)
    for values, message in [
        ({"place": "x", "inner": 3}, "x.json: inner must be a table of values by name, not 3"),
        ({"place": "x", "inner": {"rat": 3}}, "x.json: unknown setting 'inner.rat'; did you mean 'rate'?"),
        ({"place": "x", "inner": {"rate": None}}, "x.json: inner.rate must be a finite number, not null"),
        ({"place": "x", "inner": {"rate": 10**400}}, "x.json: inner.rate must be a finite number, not 1000"),
        ({}, "x.json lacks place"),
    ]:
        with pytest.raises(ValueError) as error:
            from_json(Options, values, "x.json")
        assert str(error.value).startswith(message)


def test_a_boolean_is_no_number():
    for wanted in (int, float):
        with pytest.raises(ValueError, match=r"^x must be a .* number, not true$"):
            typed(True, wanted, "x")


def test_help():
    options = options_of(Options, ["place", "files"], with_texts=True)
    assert usage("hieratok something", options) == "hieratok something PLACE [FILES...] [OPTIONS]"
    assert about(Options) == "Do something. More of it.\nExample: hieratok something here --flag"
    text = help_text("hieratok something", about(Options), [("options", options)])
    assert "  --inner.sides '[N,N,...]'   Some sides. (default: [1, 2])\n" in f"{text}\n"
    assert "  --flag                      Whether.\n" in text
    assert placeholder(Options.__annotations__["choice"]) == "a|b|'[N,N,...]'"


def test_a_field_without_a_docstring_is_our_own_mistake():
    @dataclass
    class Flat:  # found by its name in this module, where it has other fields
        silent: int = 0

    with pytest.raises(AssertionError, match="silent"):
        field_texts(Flat)
