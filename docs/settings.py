"""`docs/settings.md`, made from the dataclasses' docstrings: `python docs/settings.py`. A test fails if it is stale."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hieratok import cli
from hieratok.settings import Command, Option, about, options_of, value_text
from hieratok.studies import recipes
from hieratok.training.config import GeneratorRun, TokenizerRun
from hieratok.training.run_folder import HARMLESS

PAGE = Path(__file__).parent / "settings.md"

INTRODUCTION = """\
# Every setting

Made from the docstrings in the code by `make docs`; do not edit. Three ways to the same text: this page,
`hieratok train RECIPE --help` (and `--help` of any other command), and the dataclasses themselves.

- A setting of a run is a flag, `--train.steps 2000`, and a line of a YAML file (`steps: 2000` under `train:`);
  `hieratok recipes NAME` prints a recipe as such a file. A flag wins over the file, the file over the default.
- Lists are written `'[1,2,4]'`, "none" is `null`, booleans are `true` and `false`.
- A misspelt name is refused, and the nearest one offered; so is a value of another type or out of range.
- The settings that a run has come to are in its `config.yaml`.

Short forms of `hieratok train`: `--data PATH` for `--data.path PATH`, `--from RUN` for `--start_from RUN`. Two
options are of the command and no settings: `--out DIR` (default: `runs/NAME`) and `--allow-changes`, to go on with a
run in `--out` that had other settings. These may change without it, as they change no weights:
"""


def page() -> str:
    """The whole page, Markdown."""
    parts = [INTRODUCTION, ", ".join(f"`{name}`" for name in sorted(HARMLESS)) + ".", contents(), recipe_table()]
    parts += [run_section("tokenizer", TokenizerRun()), run_section("generator", GeneratorRun())]
    parts += ["## Options of the other commands"]
    parts += [command_section(name, command) for name, command in commands()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def commands() -> Iterator[tuple[str, Command]]:
    """Every command but `train`, whose options are a run's settings, and every kind of `evaluate`."""
    for name, command in cli.COMMANDS.items():
        if command.options:
            yield name, command
        for kind, one in command.kinds.items():
            yield f"{name} {kind}", one


def contents() -> str:
    """Links to the sections."""
    links = ["[recipes](#recipes)", "[a tokenizer's run](#a-tokenizers-run)", "[a generator's run](#a-generators-run)"]
    links += [f"[{name}](#hieratok-{name.replace(' ', '-')})" for name, _ in commands()]
    return "On this page: " + ", ".join(links) + "."


def recipe_table() -> str:
    """Names and first lines of all recipes."""
    rows = [[f"`{name}`", cell(recipes.summary(name))] for name in recipes.RECIPES]
    return "## Recipes\n\nWhere settings start from. What was measured of a recipe stands in its docstring\n" + (
        "([recipes.py](../src/hieratok/studies/recipes.py)).\n\n" + table(["recipe", "what it is"], rows)
    )


def run_section(kind: str, run: TokenizerRun | GeneratorRun) -> str:
    """A run's settings, group by group."""
    options = options_of(run, with_texts=True)
    parts = [f"## A {kind}'s run", first_paragraph(type(run))]
    parts += [table(["setting", "type", "default", "meaning"], [row(o, o.name) for o in options if "." not in o.name])]
    for field in fields(run):
        value = getattr(run, field.name)
        if is_dataclass(value):
            rows = [row(option, option.name) for option in options if option.name.startswith(f"{field.name}.")]
            parts += [f"### {field.name} ({kind})", first_paragraph(type(value))]
            parts += [table(["setting", "type", "default", "meaning"], rows)]
    return "\n\n".join(parts)


def command_section(name: str, command: Command) -> str:
    """A command's options."""
    assert command.options is not None
    options = options_of(command.options, command.positionals, with_texts=True)
    rows = [row(option, option.how) for option in options]
    table_text = table(["option", "type", "default", "meaning"], rows)
    return f"### hieratok {name}\n\n{first_paragraph(command.options)}\n\n{table_text}"


def row(option: Option, name: str) -> list[str]:
    """An option as a row of a table."""
    default = "required" if option.default is MISSING else f"`{value_text(option.default)}`"
    return [f"`{name}`", type_text(option.kind), default, cell(option.text)]


def first_paragraph(cls: type) -> str:
    """What a class's docstring says first."""
    return about(cls).partition("\n")[0]


def type_text(hint: Any) -> str:
    """A type as a user writes its values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " \\| ".join(type_text(argument) for argument in arguments)
    if origin in (tuple, list):
        (inner,) = {type_text(argument) for argument in arguments if argument is not ...}
        return f"list of {inner}s" if inner.endswith("number") else f"list of {inner}"
    names = {int: "whole number", float: "number", str: "text", bool: "`true` \\| `false`", NoneType: "`null`"}
    return names[hint]


def cell(text: str) -> str:
    """A text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(page()) / 1000:.1f} kB")
