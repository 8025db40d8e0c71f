"""A run's settings, from a recipe or a YAML file and the command line: one config system, the run's dataclasses."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hieratok import recipes
from hieratok.core.messages import nearest
from hieratok.core.typed import plain
from hieratok.files import read_yaml, shown
from hieratok.recipes import Run
from hieratok.training.generator import GeneratorRun
from hieratok.training.run_folder import flatten
from hieratok.training.tokenizer import TokenizerRun

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
SHORTHANDS = {"--data": "--data.path", "--from": "--start_from"}
CODE = "eval.features"
"""The one setting that may name code (`module:function`), from the command line or from Python alone."""
OPTIONS = ["out", "allow_changes"]  # of the command, and no settings of the run
KINDS: dict[str, type[Run]] = {"tokenizer": TokenizerRun, "generator": GeneratorRun}


class TrainCommand(NamedTuple):
    """What `hieratok train` was asked for."""

    run: Run
    out: Path
    allow_changes: bool


def load_run(source: str, arguments: Sequence[str] = ()) -> TrainCommand:
    """The run that a recipe's name or a YAML file describes, and where it is written.

    Args:
        source: recipe name or path of a YAML file; what the file leaves out has the dataclasses' defaults.
        arguments: `--group.name value` overrides, `--data PATH` for `--data.path PATH`, `--from RUN` for `--start_from
            RUN`, `--out DIR`, `--allow-changes`.

    Raises:
        ValueError: no such recipe, unknown settings (the nearest is offered), wrong types or values.
        FileNotFoundError: no such file.
    """
    settings = read_settings(source)
    arguments = [_expand(argument) for argument in arguments]
    check_settings(settings, source)
    run_class = kind_of(settings, source)
    defaults = flatten(plain(run_class()))
    known = list(defaults)
    arguments = _bare_booleans(arguments, [name for name, value in defaults.items() if isinstance(value, bool)])
    for name in _flags(arguments):
        if name not in [*known, *OPTIONS]:
            raise ValueError(f"unknown setting --{name}{nearest(name, known)}")

    try:
        make_parser(run_class).parse_object(settings)  # defaults are not checked, so a file's types are checked apart
        parser = make_parser(run_class, settings)
        parsed = parser.instantiate(parser.parse_args(arguments))
    except Exception as error:
        raise ValueError(_one_line(error)) from error
    try:
        run = run_class(**{field.name: parsed[field.name] for field in fields(run_class)})
    except ValueError as error:
        raise ValueError(_one_line(error)) from error
    return TrainCommand(run, Path(parsed.out or f"runs/{run.name}"), parsed.allow_changes)


def load_options(
    options_class: type[Options], positionals: Sequence[str], prog: str, arguments: Sequence[str]
) -> Options:
    """One command's options from its command line; `--flag` alone sets a boolean, `--a-flag` is `--a_flag`.

    Args:
        options_class: a dataclass, a flag per field.
        positionals: the fields that come first, without a flag.
        prog: the command, for messages.
        arguments: the command line.

    Raises:
        ValueError: missing or unknown options (the nearest is offered), wrong types.
    """
    known = {field.name: field for field in fields(options_class)}
    expanded = []
    for i, argument in enumerate(map(_underscored, arguments)):
        if i < len(positionals) and not argument.startswith("-"):
            expanded.append(f"--{positionals[i]}={argument}")
        elif argument[2:] in known and known[argument[2:]].type is bool and argument.startswith("--"):
            expanded.append(f"{argument}=true")
        else:
            expanded.append(argument)
    for name in _flags(expanded):
        if name not in known and name != "help":
            raise ValueError(f"unknown option --{name}{nearest(name, list(known))}")
    given = _flags(expanded)
    parser = _parser(prog, options_class.__doc__ or "", "")
    parser.add_class_arguments(options_class)
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        raise SystemExit(0)
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in given:
            how = name.upper() if name in positionals else f"--{name}"
            raise ValueError(f"{prog} needs {how} (`{prog} --help` shows how)")
    try:
        return options_class(**vars(parser.parse_args(expanded)))
    except Exception as error:
        raise ValueError(_one_line(error)) from error


def _parser(prog: str, description: str, example: str) -> Any:
    try:
        from jsonargparse import ArgumentParser, set_parsing_settings
    except ImportError as error:
        raise ValueError("settings on the command line need jsonargparse: pip install jsonargparse") from error

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(prog=prog, description=description, epilog=example, exit_on_error=False)


def make_parser(run_class: type[Run] = TokenizerRun, defaults: dict[str, Any] | None = None) -> Any:
    """The command line of `hieratok train`: a flag per field of the run's dataclasses, their docstrings as help."""
    parser = _parser(
        "hieratok train RECIPE|FILE.yaml",
        "Train a recipe or a YAML file; the same command again resumes. --data PATH is --data.path PATH.",
        "example: hieratok train tiny-multi --data photos/ --train.steps 2000 --model.scales '[1,4,8]'",
    )
    parser.add_argument("--out", type=str | None, default=None, help="Folder of the run (default: runs/NAME).")
    parser.add_argument("--allow_changes", type=bool, default=False, help="Go on with a run that had other settings.")
    parser.add_class_arguments(run_class)
    groups = {name for name, value in vars(run_class()).items() if is_dataclass(value)}
    for action in parser._actions:
        if action.dest in groups:
            action.help = argparse.SUPPRESS  # a file for one group, which `load_run` refuses: --data is something else
    parser.set_defaults(defaults or {})
    return parser


def read_settings(source: str) -> dict[str, Any]:
    """A recipe's or a YAML file's settings as they stand there, not checked yet."""
    if not source.endswith((".yaml", ".yml")):
        return plain(recipes.get(source))
    return {"name": Path(source).stem, **read_yaml(source)}


def kind_of(settings: dict[str, Any], source: str) -> type[Run]:
    """The class of the run that settings describe: a tokenizer's unless they say otherwise.

    Raises:
        ValueError: there is no such kind.
    """
    kind = settings.get("kind", "tokenizer")
    if not isinstance(kind, str) or kind not in KINDS:
        hint = nearest(str(kind), list(KINDS))
        raise ValueError(f"{shown(source)}: kind must be {' or '.join(KINDS)}, not {shown(repr(kind))}{hint}")
    return KINDS[kind]


def check_settings(settings: dict[str, Any], source: str) -> None:
    """Refuse names that no run has, and null where a run needs a value: the parser takes that for "not given".

    Raises:
        ValueError: names the setting, and the nearest one where the name is unknown.
    """
    default = kind_of(settings, source)()
    defaults, run = flatten(plain(default)), vars(default)
    for name, value in settings.items():
        top = str(name).partition(".")[0]
        if top not in run:
            raise ValueError(f"{shown(source)}: unknown setting {top!r}{nearest(top, list(run))}")
        if is_dataclass(run[top]) and name == top and not isinstance(value, dict):
            raise ValueError(f"{shown(source)}: {name} must hold settings of its own by name, not {value!r}")
    for name, value in flatten(settings).items():
        if name == CODE and ":" in str(value):
            raise ValueError(
                f"{shown(source)}: {CODE} {shown(repr(value))} names code, which no file may: give it on the command"
                f" line, --{CODE} {shown(value)}"
            )
        if name not in defaults:
            raise ValueError(f"{shown(source)}: unknown setting {name!r}{nearest(name, list(defaults))}")
        if value is None and defaults[name] is not None:
            raise ValueError(f"{shown(source)}: {name} must not be null")


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument[2:].partition("=")
    return "--" + flag.replace("-", "_") + equals + value


def _expand(argument: str) -> str:
    if argument == "--allow-changes":
        return "--allow_changes=true"
    flag, equals, value = argument.partition("=")
    return SHORTHANDS.get(flag, flag) + equals + value


def _bare_booleans(arguments: list[str], names: Sequence[str]) -> list[str]:
    """`--flag` for `--flag=true` where no value follows."""
    followed = [not following.startswith("--") for following in [*arguments[1:], "--"]]
    return [
        f"{argument}=true" if argument[2:] in names and argument.startswith("--") and not has_value else argument
        for argument, has_value in zip(arguments, followed)
    ]


def _flags(arguments: list[str]) -> list[str]:
    return [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r'^Parser key "([^"]+)": Expected an? (.*)\. Got value: ', r"\1: expected \2, got ", text)
    text = re.sub(
        r'^Parser key "([^"]+)": Does not validate .* Subtypes: \[(.*), NoneType\] Errors: .* Given value: ',
        r"\1: expected \2 or null, got ",
        text,
    )
    return text.replace("expected tuple,", "expected a list such as '[1,2,4]',")
