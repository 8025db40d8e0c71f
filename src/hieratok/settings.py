"""Dataclasses as flags, help and YAML, for every command; types are checked by `hieratok.core.typed`."""

import argparse
import ast
import functools
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hieratok.core.messages import nearest, shown
from hieratok.core.typed import field_types, flatten, from_json, has_type, nested, plain, typed
from hieratok.studies import recipes
from hieratok.studies.recipes import Run
from hieratok.tokenizer.config import TokenizerConfig
from hieratok.training.config import GeneratorRun, TokenizerRun

Options = TypeVar("Options")
CODE = "eval.features"
"""The one setting that may name code (`module:function`), from the command line or from Python alone."""
KINDS: dict[str, type[Run]] = {"tokenizer": TokenizerRun, "generator": GeneratorRun}
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
HELP = {"-h", "--help"}
LEFT, WIDEST = 30, 120
"""Width of the help's left column, and the largest total width, in characters."""


class Option(NamedTuple):
    """One flag or positional argument of a command line."""

    name: str
    """The field's name after those of its groups: train.steps."""
    kind: Any
    """The field's type."""
    text: str
    """What it does."""
    default: Any = MISSING
    """MISSING: the option is required."""
    is_positional: bool = False
    alias: str = ""
    """A shorter flag, without its dashes."""
    value: str = ""
    """Placeholder of the value in help; default: made from the type."""

    @property
    def flags(self) -> list[str]:
        """The flags as typed, the short one first."""
        return [f"--{name}" for name in (self.alias, self.name) if name]

    @property
    def placeholder(self) -> str:
        """Placeholder of the value in help; empty for a boolean."""
        return self.value or placeholder(self.kind, self.name.rpartition(".")[2].upper())

    @property
    def how(self) -> str:
        """Its name in messages: RUN or --data."""
        return self.name.upper() if self.is_positional else f"--{self.name}"


class Command(NamedTuple):
    """One command of `hieratok`."""

    summary: str
    """One sentence."""
    main: Callable[[list[str]], object]
    """Called with the arguments after the command's name."""
    options: type | None = None
    """The dataclass of its options."""
    positionals: tuple[str, ...] = ()
    """The options that are positional."""
    kinds: Mapping[str, "Command"] = {}
    """Sub-commands, such as `evaluate samples`."""


def command(name: str, options: type[Options], run: Callable[[Options], object], *positionals: str) -> Command:
    """A command whose options are a dataclass.

    Args:
        name: the word after `hieratok`.
        options: a dataclass; the first sentence of its docstring says what the command does.
        run: what it does.
        positionals: fields that are positional.
    """

    def main(arguments: list[str]) -> None:
        run(load_options(options, positionals, f"hieratok {name}", arguments))

    return Command(about(options).partition("\n")[0], main, options, positionals)


class TrainCommand(NamedTuple):
    """What `hieratok train` was asked for."""

    run: Run
    out: Path
    allow_changes: bool


def load_options(
    options_class: type[Options], positionals: Sequence[str], prog: str, arguments: Sequence[str]
) -> Options:
    """One command's options from its command line; `--flag` alone sets a boolean, `--a-flag` is `--a_flag`.

    Args:
        options_class: a dataclass, a flag per field.
        positionals: the fields that are positional.
        prog: the command, for messages.
        arguments: the command line.

    Raises:
        ValueError: missing or unknown options (the nearest is offered), wrong types.
        SystemExit: help was asked for, and printed.
    """
    if HELP & set(arguments):
        options = options_of(options_class, positionals, with_texts=True)
        words = [option for option in options if option.is_positional]
        flags = [option for option in options if not option.is_positional]
        flags.sort(key=lambda option: option.default is not MISSING)  # what is required comes first
        print(help_text(usage(prog, options), about(options_class), [("arguments", words), ("options", flags)]))
        raise SystemExit(0)
    options = options_of(options_class, positionals)
    given = parse(prog, options, arguments)
    for option in options:
        if option.default is MISSING and given.get(option.name, []) == []:
            raise ValueError(f"{prog} needs {option.how} (`{prog} --help` shows how)")
    return options_class(**given)


def load_run(source: str, arguments: Sequence[str] = ()) -> TrainCommand:
    """The run that a recipe's name or a YAML file describes, and where it is written.

    Args:
        source: recipe name or path of a YAML file; missing settings get the dataclasses' defaults.
        arguments: `--group.name value` overrides, `--data PATH` for `--data.path PATH`, `--from RUN` for `--start_from
            RUN`, `--out DIR`, `--allow-changes`.

    Raises:
        ValueError: no such recipe, unknown settings (the nearest is offered), wrong types or values.
        FileNotFoundError: no such file.
    """
    settings = read_settings(source)
    run_class = kind_of(settings, source)
    in_file = check_settings(settings, source)
    given = parse("hieratok train", run_options(run_class()), arguments)
    out, allow_changes = given.pop("out", None), given.pop("allow_changes", False)
    run = from_json(run_class, nested(flatten(plain(run_class())) | in_file | following(given, in_file) | given), "")
    return TrainCommand(run, Path(out or f"runs/{run.name}"), allow_changes)


def following(given: dict[str, Any], in_file: dict[str, Any]) -> dict[str, Any]:
    """The settings that follow from `--encoder`: the shape of its latents, and no loss that it could learn from.

    Args:
        given: on the command line, by whole names.
        in_file: in the recipe or file.

    Raises:
        ValueError, FileNotFoundError: no such encoder, or settings that do not fit it.
    """
    if given.get("model.encoder") is None:
        return {}
    from hieratok.tokenizer.frozen import with_encoder  # it needs torch

    prefix = "model."
    model = {name.removeprefix(prefix): value for name, value in in_file.items() if name.startswith(prefix)}
    changes = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    frozen = with_encoder(TokenizerConfig(**model), **changes)
    return {f"{prefix}{name}": value for name, value in plain(frozen).items()} | {"loss.kl_weight": 0.0}


# --- Files ------------------------------------------------------------------------------------------------------------


def read_settings(source: str) -> dict[str, Any]:
    """A recipe's or a YAML file's settings, not checked yet."""
    if not source.endswith((".yaml", ".yml")):
        return plain(recipes.get(source))
    from hieratok.core.files import read_yaml  # imported here: it needs numpy, which a recipe's help does not

    return {"name": Path(source).stem, **read_yaml(source)}


def kind_of(settings: dict[str, Any], source: str) -> type[Run]:
    """The class of the run that settings describe: a tokenizer's unless they say otherwise.

    Raises:
        ValueError: unknown kind.
    """
    kind = settings.get("kind", "tokenizer")
    if not isinstance(kind, str) or kind not in KINDS:
        hint = nearest(str(kind), KINDS)
        raise ValueError(f"{shown(source)}: kind must be {' or '.join(KINDS)}, not {shown(repr(kind))}{hint}")
    return KINDS[kind]


def check_settings(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """A file's settings by full name, converted to their types.

    Raises:
        ValueError: an unknown name (the nearest is offered), a value of the wrong type, or a setting that names code.
    """
    run_class = kind_of(settings, source)
    types, groups = field_types(run_class), get_type_hints(run_class)
    for name, value in settings.items():
        top = str(name).partition(".")[0]
        if top not in groups:
            raise ValueError(f"{shown(source)}: unknown setting {top!r}{nearest(top, groups)}")
        if is_dataclass(groups[top]) and name == top and not isinstance(value, dict):
            raise ValueError(f"{shown(source)}: {name} must hold settings of its own by name, not {value!r}")
    checked = {}
    for name, value in flatten(settings).items():
        if name == CODE and ":" in str(value):
            raise ValueError(
                f"{shown(source)}: {CODE} {shown(repr(value))} names code, which no file may: give it on the command"
                f" line, --{CODE} {shown(value)}"
            )
        if name not in types:
            raise ValueError(f"{shown(source)}: unknown setting {name!r}{nearest(name, types)}")
        checked[name] = typed(_with_exponents(value, types[name]), types[name], f"{shown(source)}: {name}")
    return checked


def _with_exponents(value: Any, wanted: Any) -> Any:
    """YAML 1.1 reads 3e-4, without a dot, as text: read it as a number where one is wanted."""
    kinds = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    if isinstance(value, list):
        items = [get_args(kind)[0] for kind in kinds if get_origin(kind) in (list, tuple)]
        return [_with_exponents(item, items[0]) for item in value] if items else value
    if isinstance(value, str) and float in kinds and EXPONENT.fullmatch(value):
        return float(value)
    return value


# --- The command line -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse that raises ValueError, as for any other mistake of a user."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')} (`{self.prog} --help` shows how)")


def parse(prog: str, options: Sequence[Option], arguments: Sequence[str]) -> dict[str, Any]:
    """The values of the options that a command line gives, by name and converted to their types.

    Raises:
        ValueError: unknown options (the nearest is offered), too many words, values of a wrong type.
    """
    flagged = [option for option in options if not option.is_positional]
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    for option in flagged:
        parser.add_argument(*option.flags, dest=option.name, default=argparse.SUPPRESS)
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)  # no flags after it
    booleans = {flag for option in flagged if option.kind is bool for flag in option.flags}
    found, others = parser.parse_known_args(_normalized(words[:end], booleans))
    for word in others:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            known = [flag[2:] for option in flagged for flag in option.flags]
            raise ValueError(f"unknown option --{shown(name)}{nearest(name, known)} (`{prog} --help` lists them)")
    given = {**vars(found), **_positionals(prog, options, others + words[end + 1 :])}
    return {
        option.name: typed(_plain_value(given[option.name], option.kind), option.kind, option.how)
        for option in options
        if option.name in given
    }


def _positionals(prog: str, options: Sequence[Option], words: list[str]) -> dict[str, str | list[str]]:
    """Positional words in order; a list takes all that remain."""
    given: dict[str, str | list[str]] = {}
    for option in options:
        if option.is_positional and words:
            if get_origin(option.kind) is list:
                given[option.name], words = words, []
            else:
                given[option.name], *words = words
    if words:
        raise ValueError(f"unrecognized arguments: {shown(' '.join(words))} (`{prog} --help` shows how)")
    return given


def _normalized(words: Sequence[str], booleans: set[str]) -> list[str]:
    """`--a_flag` for `--a-flag`; `--flag=true` for a boolean's `--flag`, and `--flag=false` for `--flag false`."""
    normalized, i = [], 0
    while i < len(words):
        word = words[i]
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            word = f"--{flag.replace('-', '_')}{equals}{value}"
        if word in booleans:
            has_value = i + 1 < len(words) and words[i + 1].lower() in ("true", "false")
            word += f"={words[i + 1] if has_value else 'true'}"
            i += has_value
        normalized.append(word)
        i += 1
    return normalized


def _plain_value(text: str | list[str], wanted: Any) -> Any:
    """The value of a word: as YAML reads it where the type allows that, else the word itself."""
    if isinstance(text, list):
        return text
    import yaml

    try:
        value = _with_exponents(yaml.safe_load(text), wanted)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if isinstance(value, str) or (value is None and text != "null"):  # YAML drops quotes, spaces and comments
        value = _with_exponents(text, wanted)
    return value if has_type(value, wanted) else text


def options_of(
    config: Any, positionals: Sequence[str] = (), prefix: str = "", with_texts: bool = False
) -> list[Option]:
    """An option for each field of a dataclass and of its nested dataclasses.

    Args:
        config: the class; or an instance, whose values are then the defaults.
        positionals: fields that have no flag.
        prefix: of the options' names.
        with_texts: read each option's help text, which means parsing the source.
    """
    config_class = config if isinstance(config, type) else type(config)
    types, options = get_type_hints(config_class), []
    texts = field_texts(config_class) if with_texts else {}
    for field in fields(config_class):
        default = _default(field) if config is config_class else getattr(config, field.name)
        name, kind = f"{prefix}{field.name}", types[field.name]
        if is_dataclass(kind):
            options += options_of(default, prefix=f"{name}.", with_texts=with_texts)
        else:
            options.append(Option(name, kind, texts.get(field.name, ""), default, field.name in positionals))
    return options


def run_options(run: Run, with_texts: bool = False) -> list[Option]:
    """The options of `hieratok train` for a run whose settings are the defaults."""
    short = {
        "data.path": ("data", "PATH"),
        "start_from": ("from", "RUN"),
        "model.encoder": ("encoder", "timm:NAME|diffusers:FOLDER"),
    }
    settings = [
        option._replace(alias=short[option.name][0], value=short[option.name][1]) if option.name in short else option
        for option in options_of(run, with_texts=with_texts)
    ]
    return [
        *settings,
        Option("out", str | None, "Folder of the run. Default: runs/NAME.", None, value="DIR"),
        Option("allow_changes", bool, "Resume a run in --out that had other settings.", False),
    ]


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


# --- Help -------------------------------------------------------------------------------------------------------------


def usage(prog: str, options: Sequence[Option]) -> str:
    """The usage line: positional arguments and required flags."""
    parts = [prog]
    for option in options:
        if option.is_positional:
            word = option.name.upper() + ("..." if get_origin(option.kind) is list else "")
            parts.append(word if option.default is MISSING else f"[{word}]")
    parts += [f"{o.flags[0]} {o.placeholder}" for o in options if o.default is MISSING and not o.is_positional]
    has_others = any(option.default is not MISSING and not option.is_positional for option in options)
    return " ".join([*parts, *["[OPTIONS]"] * has_others])


def help_text(usage: str, about: str, groups: Sequence[tuple[str, Sequence[Option]]]) -> str:
    """A command's help: usage, description with an example, and options by group."""
    parts = [f"usage: {usage}"]
    for paragraph in about.split("\n"):  # an example stays on one line, to be copied
        parts.append(paragraph if paragraph.startswith("Example:") else textwrap.fill(paragraph, columns()))
    for title, options in groups:
        if options:
            parts.append("\n".join([f"{title}:", *map(_entry, options)]))
    return "\n\n".join(parts)


def columns() -> int:
    """Width of the help: the terminal's, within limits."""
    return min(shutil.get_terminal_size().columns, WIDEST)


def overview(usage: str, description: str, example: str, title: str, commands: Mapping[str, Command], last: str) -> str:
    """The help of a group of commands: one line each."""
    left = max(map(len, commands)) + 4
    entries = (entry(name, command.summary, left) for name, command in commands.items())
    return "\n".join(
        [f"usage: {usage}", "", description, "", f"Example: {example}", "", f"{title}:", *entries, "", last]
    )


def entry(head: str, text: str, left: int) -> str:
    """A name and its description side by side; the text starts after `left` columns, on a new line if needed."""
    lines = textwrap.wrap(text, max(20, columns() - left), break_on_hyphens=False) or [""]
    if len(head) + 4 > left:
        lines.insert(0, "")
    return "\n".join([f"  {head}".ljust(left) + lines[0], *(" " * left + line for line in lines[1:])]).rstrip()


def _entry(option: Option) -> str:
    name = option.placeholder if option.value and option.is_positional else option.name.upper()
    head = name if option.is_positional else f"{', '.join(option.flags)} {option.placeholder}".rstrip()
    text = " ".join(option.text.split())
    if option.default is MISSING:
        text += " (required)" * (not option.is_positional)
    elif option.default is not None and option.default is not False:
        text += f" (default: {value_text(option.default)})"
    return entry(head, text, LEFT)


def about(config_class: type) -> str:
    """A class's docstring without its Raises section, one line for each paragraph."""
    paragraphs = inspect.cleandoc(config_class.__doc__ or "").split("\n\n")
    return "\n".join(" ".join(p.split()) for p in paragraphs if not p.startswith("Raises:"))


def field_texts(config_class: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of its base classes, by the field's name."""
    texts: dict[str, str] = {}
    for one in reversed(config_class.__mro__):
        if is_dataclass(one):
            texts |= _own_texts(one)
    missing = [field.name for field in fields(config_class) if not texts.get(field.name)]
    assert not missing, f"{config_class.__name__}: no docstring under {missing}"
    return texts


def _own_texts(config_class: type) -> dict[str, str]:
    texts = {}
    for statement, following in pairwise(_classes(config_class.__module__)[config_class.__name__].body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    texts[statement.target.id] = " ".join(text.split())
    return texts


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def placeholder(kind: Any, name: str = "TEXT") -> str:
    """Placeholder of a value in help: N for a whole number, X for another number, empty for a boolean."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(parts)
    if origin in (Union, UnionType):
        return "|".join(placeholder(part, name) for part in parts if part is not NoneType)
    if origin in (tuple, list):
        item = placeholder(parts[0])
        number = 2 if origin is list or ... in parts else len(parts)
        dots = ",..." if origin is list or ... in parts else ""
        return f"'[{','.join([item] * number)}{dots}]'"
    return {int: "N", float: "X", bool: "", str: name}[kind]


def value_text(value: Any) -> str:
    """A value as typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value)
