"""Dataclasses from and to tables of plain values, with one type check for JSON, YAML and the command line."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hieratok.core.messages import nearest, shown

Config = TypeVar("Config")
MOST_SHOWN = 80
"""Characters of a wrong value that a message shows."""
LARGEST = 10**300
"""Larger whole numbers are not taken for floating-point ones: they could overflow."""


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as plain values: nested dicts, lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def as_json(value: Any) -> Any:
    """A typed value as plain values: the result of its `to_json`, else its fields by name; lists for tuples."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "_asdict"):  # a NamedTuple
        return as_json(value._asdict())
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings -> {"train.steps": ...}."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`: {"train.steps": ...} -> nested settings."""
    settings: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        table = settings
        for group in groups:
            table = table.setdefault(group, {})
        table[last] = value
    return settings


def field_types(config_class: type, prefix: str = "") -> dict[str, Any]:
    """The types of a dataclass's fields by name, nested dataclasses flattened: {"train.steps": int}."""
    types = {}
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        if is_dataclass(hints[field.name]):
            types |= field_types(hints[field.name], f"{prefix}{field.name}.")
        else:
            types[f"{prefix}{field.name}"] = hints[field.name]
    return types


def from_json(config_class: type[Config], values: Any, where: str) -> Config:
    """A dataclass from a table of JSON, whose values must have its fields' types; the class itself checks the ranges.

    Args:
        config_class: with fields of plain types, lists and tuples of them, literals, tables, other dataclasses, or one
            of these or None.
        values: the table; fields with a default may be left out.
        where: its file, for messages; empty: messages begin with the field.

    Raises:
        ValueError: names the file and the field.
    """
    return _from_json(config_class, values, f"{where}: " if where else "", "")


def _from_json(config_class: type[Config], values: Any, where: str, prefix: str) -> Config:
    if not isinstance(values, dict):
        owner = where + prefix.removesuffix(".") if prefix else where.removesuffix(": ")
        raise ValueError(f"{owner} must be a table of values by name, not {_brief(values)}")
    types = get_type_hints(config_class)
    known = [field.name for field in fields(config_class)]  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}unknown setting {shown(repr(prefix + str(name)))}{nearest(str(name), known)}")
        if is_dataclass(types[name]):
            arguments[name] = _from_json(types[name], value, where, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            arguments[name] = typed(value, types[name], f"{where}{prefix}{name}")
    for field in fields(config_class):  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            raise ValueError(f"{where.removesuffix(': ')} lacks {prefix}{field.name}")
    try:
        return config_class(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def typed(value: Any, wanted: Any, name: str) -> Any:
    """A plain value converted to a type: lists to tuples, whole numbers to floating-point.

    Args:
        value: from JSON or YAML.
        wanted: the type of a dataclass's field.
        name: of the value, for the message.

    Raises:
        ValueError: the value has another type, or is not finite.
    """
    if not has_type(value, wanted):
        raise ValueError(f"{name} must be {words(wanted)}, not {_brief(value)}")
    return _cast(value, wanted)


def _cast(value: Any, wanted: Any) -> Any:
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return _cast(value, next(part for part in parts if has_type(value, part)))
    if origin is tuple:
        items = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return tuple(map(_cast, value, items))
    if origin is list:
        return [_cast(item, parts[0]) for item in value]
    return float(value) if wanted is float else value


def has_type(value: Any, wanted: Any) -> bool:
    """Whether a value from JSON, with lists in place of tuples, has a type. Numbers must be finite."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin in (Union, UnionType):
        return any(has_type(value, part) for part in parts)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            return False
        if origin is list or parts[1:] == (...,):
            return all(has_type(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(has_type, value, parts))
    if wanted is float:
        if isinstance(value, int):
            return not isinstance(value, bool) and abs(value) <= LARGEST
        return isinstance(value, float) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted is NoneType:
        return value is None
    return isinstance(value, origin or wanted)


def words(wanted: Any) -> str:
    """A type in words, for messages."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin in (Union, UnionType):
        return " or ".join(map(words, parts))
    if origin in (tuple, list):
        number = "" if origin is list or ... in parts else f"{len(parts)} "
        return f"a list of {number}{words(parts[0]).split(' ', 1)[1]}s"
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", NoneType: "null"}
    return names.get(wanted, "a table")


def _brief(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shown(repr(value))[:MOST_SHOWN]
