"""`docs/settings.md`, made from the dataclasses' docstrings: `python docs/settings.py`. A test fails if it is stale."""

import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union

from docstring_parser import parse_from_object

from hieratok import recipes
from hieratok.analyze import Analyze
from hieratok.app import ServeApp
from hieratok.bench import Bench
from hieratok.evaluation.evaluate import (
    EvaluateCompare,
    EvaluateImages,
    EvaluateReconstruction,
    EvaluateSamples,
    EvaluateStats,
)
from hieratok.export import Export
from hieratok.gallery import Report
from hieratok.hub import Push
from hieratok.latents import WriteLatents
from hieratok.sample import Sample
from hieratok.study_runs import RunStudy
from hieratok.training.generator import GeneratorRun
from hieratok.training.run_folder import HARMLESS
from hieratok.training.tokenizer import TokenizerRun

PAGE = Path(__file__).parent / "settings.md"

COMMANDS = {  # command: its options, and which of them come first, without a flag
    "evaluate reconstruction": (EvaluateReconstruction, ["run"]),
    "evaluate images": (EvaluateImages, ["a", "b"]),
    "evaluate samples": (EvaluateSamples, ["path"]),
    "evaluate stats": (EvaluateStats, ["path"]),
    "evaluate compare": (EvaluateCompare, ["a", "b"]),
    "analyze": (Analyze, ["run"]),
    "latents": (WriteLatents, ["run"]),
    "sample": (Sample, ["run"]),
    "study": (RunStudy, ["study"]),
    "report": (Report, ["folder"]),
    "push": (Push, ["run", "hub_id"]),
    "export": (Export, ["run"]),
    "app": (ServeApp, ["run"]),
    "bench": (Bench, ["what"]),
}

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
    parts += [command_section(name, options, first) for name, (options, first) in COMMANDS.items()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def contents() -> str:
    """Links to the sections."""
    links = ["[recipes](#recipes)", "[a tokenizer's run](#a-tokenizers-run)", "[a generator's run](#a-generators-run)"]
    links += [f"[{name}](#hieratok-{name.replace(' ', '-')})" for name in COMMANDS]
    return "On this page: " + ", ".join(links) + "."


def recipe_table() -> str:
    """Names and first lines of all recipes."""
    rows = [[f"`{name}`", cell(recipes.summary(name))] for name in recipes.RECIPES]
    return "## Recipes\n\nWhere settings start from. What was measured of a recipe stands in its docstring\n" + (
        "([recipes.py](../src/hieratok/recipes.py)).\n\n" + table(["recipe", "what it is"], rows)
    )


def run_section(kind: str, run: TokenizerRun | GeneratorRun) -> str:
    """A run's settings, group by group."""
    groups = {field.name: getattr(run, field.name) for field in fields(run)}
    parts = [f"## A {kind}'s run", first_paragraph(type(run))]
    parts += [table(["setting", "type", "default", "meaning"], rows_of(run, "", only_plain=True))]
    for name, value in groups.items():
        if is_dataclass(value):
            parts += [f"### {name} ({kind})", first_paragraph(type(value))]
            parts += [table(["setting", "type", "default", "meaning"], rows_of(value, f"{name}."))]
    return "\n\n".join(parts)


def command_section(name: str, options: type, first: list[str]) -> str:
    """A command's options."""
    rows = []
    types, texts = typing.get_type_hints(options), attribute_texts(options)
    for field in fields(options):
        flag = field.name.upper() if field.name in first else f"--{field.name}"
        rows.append([f"`{flag}`", type_text(types[field.name]), default_text(field), cell(texts[field.name])])
    table_text = table(["option", "type", "default", "meaning"], rows)
    return f"### hieratok {name}\n\n{first_paragraph(options)}\n\n{table_text}"


def rows_of(config: Any, prefix: str, only_plain: bool = False) -> list[list[str]]:
    """A row per field of a dataclass, with the values of this instance as defaults."""
    types, texts = typing.get_type_hints(type(config)), attribute_texts(type(config))
    return [
        [
            f"`{prefix}{field.name}`",
            type_text(types[field.name]),
            value_text(getattr(config, field.name)),
            cell(texts[field.name]),
        ]
        for field in fields(config)
        if not (only_plain and is_dataclass(getattr(config, field.name)))
    ]


def attribute_texts(cls: type) -> dict[str, str]:
    """The docstring under each field of a class and of those that it inherits from.

    Raises:
        ValueError: a field has none.
    """
    found: dict[str, str] = {}
    for one in reversed([c for c in cls.__mro__ if is_dataclass(c)]):
        found |= {p.arg_name: p.description or "" for p in parse_from_object(one).params}
    for field in fields(cls):
        if not found.get(field.name):
            raise ValueError(f"{cls.__name__}.{field.name} has no docstring")
    return found


def first_paragraph(cls: type) -> str:
    """What a class's docstring says first."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def type_text(hint: Any) -> str:
    """A type as a user writes its values."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " \\| ".join(type_text(argument) for argument in arguments)
    if origin in (tuple, list):
        (inner,) = {type_text(argument) for argument in arguments if argument is not ...}
        return f"list of {inner}s" if inner.endswith("number") else f"list of {inner}"
    names = {int: "whole number", float: "number", str: "text", bool: "`true` \\| `false`", type(None): "`null`"}
    return names[hint]


def default_text(field: Field) -> str:
    """An option's default."""
    if field.default is not MISSING:
        return value_text(field.default)
    return value_text(field.default_factory()) if field.default_factory is not MISSING else "required"


def value_text(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return f"`{value}`"


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
