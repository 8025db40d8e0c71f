"""`docs/settings.md`, made from the dataclasses' docstrings: `python docs/settings.py`. A test fails if it is stale."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hieratok import cli
from hieratok.core.tables import Table
from hieratok.settings import Command, Option, about, options_of, value_text
from hieratok.studies import recipes
from hieratok.training.config import GeneratorRun, TokenizerRun
from hieratok.training.run_folder import HARMLESS

PAGE = Path(__file__).parent / "settings.md"

FIRST = ("data.path", "train.steps", "train.batch_size", "train.learning_rate", "model.scales")
TASKS = {  # heading: commands
    "Look at photos": ("quickstart", "reconstruct", "app"),
    "Evaluate a tokenizer": ("evaluate", "analyze", "cost"),
    "Generate": ("latents", "sample"),
    "Compare and share": ("recipes", "study", "report", "push", "export", "bench"),
}

INTRODUCTION = """\
# Every setting

Generated from docstrings by `make docs`; do not edit. `hieratok train RECIPE --help` (and `--help` of any other
command) shows the same text.

- A setting of a run is a flag, `--train.steps 2000`, and a line of a YAML file (`steps: 2000` under `train:`);
  `hieratok recipes NAME` prints a recipe as such a file. A flag wins over the file, the file over the default.
- Lists are written `'[1,2,4]'`, "none" is `null`, booleans are `true` and `false`.
- A misspelt name is refused, and the nearest one offered. Values of a wrong type or out of range are refused too.
- All settings of a run are in its `config.yaml`.

Short forms of `hieratok train`: `--data PATH` for `--data.path PATH`, `--from RUN` for `--start_from RUN`. Two
options are not settings: `--out DIR` (default: `runs/NAME`) and `--allow-changes`, to resume a run in `--out` that
had other settings.
"""


def page() -> str:
    """The whole page, Markdown."""
    assert {name for names in TASKS.values() for name in names} == {*cli.COMMANDS} - {"train"}
    parts = [INTRODUCTION, contents(), first_settings(), recipe_table()]
    parts += [run_section("tokenizer", TokenizerRun()), run_section("generator", GeneratorRun()), harmless()]
    for task in TASKS:
        parts += [f"## {task}", *(command_section(name, command) for name, command in commands(task))]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def commands(task: str) -> Iterator[tuple[str, Command]]:
    """A task's commands, and every kind of `evaluate`."""
    for name in TASKS[task]:
        command = cli.COMMANDS[name]
        if command.options:
            yield name, command
        for kind, one in command.kinds.items():
            yield f"{name} {kind}", one


def contents() -> str:
    """Links to the sections, a line a task."""
    lines = ["- Train: [recipes](#recipes), [a tokenizer](#train-a-tokenizer), [a generator](#train-a-generator)"]
    for task in TASKS:
        links = (f"[{name}](#hieratok-{name.replace(' ', '-')})" for name, _ in commands(task))
        lines.append(f"- {task}: {', '.join(links)}")
    return "\n".join(lines)


def first_settings() -> str:
    """Those that a newcomer changes first."""
    options = {option.name: option for option in options_of(TokenizerRun(), with_texts=True)}
    return "## Five to begin with\n\n" + table("setting", [row(options[name], name) for name in FIRST])


def harmless() -> str:
    """What may change in a run that has begun."""
    names = ", ".join(f"`{name}`" for name in sorted(HARMLESS))
    return f"These may change in a run that has begun, without `--allow-changes`, as they change no weights: {names}."


def recipe_table() -> str:
    """Names and first lines of all recipes."""
    rows = [[f"`{name}`", recipes.summary(name)] for name in recipes.RECIPES]
    return "## Recipes\n\nWhere settings start from. What was measured of a recipe stands in its docstring\n" + (
        "([recipes.py](../src/hieratok/studies/recipes.py)).\n\n" + Table(["recipe", "what it is"], rows).markdown()
    )


def run_section(kind: str, run: TokenizerRun | GeneratorRun) -> str:
    """A run's settings, group by group."""
    options = options_of(run, with_texts=True)
    parts = [f"## Train a {kind}", first_paragraph(type(run))]
    parts += [table("setting", [row(o, o.name) for o in options if "." not in o.name])]
    for field in fields(run):
        value = getattr(run, field.name)
        if is_dataclass(value):
            rows = [row(option, option.name) for option in options if option.name.startswith(f"{field.name}.")]
            parts += [f"### {field.name} ({kind})", first_paragraph(type(value))]
            parts += [table("setting", rows)]
    return "\n\n".join(parts)


def command_section(name: str, command: Command) -> str:
    """A command's options."""
    assert command.options is not None
    options = options_of(command.options, command.positionals, with_texts=True)
    rows = [row(option, option.how) for option in options]
    table_text = table("option", rows)
    return f"### hieratok {name}\n\n{first_paragraph(command.options)}\n\n{table_text}"


def row(option: Option, name: str) -> list[str]:
    """An option as a row of a table."""
    default = "required" if option.default is MISSING else f"`{value_text(option.default)}`"
    return [f"`{name}`", type_text(option.kind), default, option.text]


def first_paragraph(cls: type) -> str:
    """What a class's docstring says first."""
    return about(cls).partition("\n")[0]


def type_text(hint: Any) -> str:
    """A type as a user writes its values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " | ".join(type_text(argument) for argument in arguments)
    if origin in (tuple, list):
        (inner,) = {type_text(argument) for argument in arguments if argument is not ...}
        return f"list of {inner}s" if inner.endswith("number") else f"list of {inner}"
    names = {int: "whole number", float: "number", str: "text", bool: "`true` | `false`", NoneType: "`null`"}
    return names[hint]


def table(what: str, rows: list[list[str]]) -> str:
    """Options as Markdown."""
    return Table([what, "type", "default", "meaning"], rows).markdown()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(page()) / 1000:.1f} kB")
