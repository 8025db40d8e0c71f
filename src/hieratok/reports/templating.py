"""Templates and assets of this package; all values are escaped."""

import functools
import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup as Html

from hieratok.core.files import shown

__all__ = ["Html", "asset", "block", "render"]


def render(name: str, **values: Any) -> Html:
    """Render the template `name`; values are escaped unless they are `Html` (in .md, none are)."""
    return Html(_environment().get_template(name).render(values))


def block(file: str, name: str, **values: Any) -> Html:
    """Render the macro `name` of a template file, likewise."""
    return getattr(_environment().get_template(file).module, name)(**values)


def asset(name: str) -> Html:
    """A style or script of this package, to insert into a page."""
    return Html((files("hieratok.reports") / "assets" / name).read_text(encoding="utf-8"))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hieratok.reports"),
        autoescape=lambda name: name is None or not name.endswith(".md"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=printable,
    )
    environment.filters["pieces"] = pieces
    environment.globals["asset"] = asset
    return environment


def printable(value: Any) -> Any:
    """Text with characters that no page can show, or that change its direction, as escapes."""
    if isinstance(value, Html) or not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else shown(c) for c in value)


BREAKS = re.compile(
    r"(?<=\w[._/=,:])(?=\w\w)(?!(?<=\d[.,])\d)"  # after marks that join the parts of a name, not within a number
    r"|(?:(?<=\b[0-9a-f]{16})|(?<=\b[0-9a-f]{32})|(?<=\b[0-9a-f]{48}))(?=[0-9a-f]{16})"  # in a SHA-256
)


UNBROKEN = re.compile(r"(--[a-z][\w-]*|\d+e-\d+)")  # flags, numbers such as 1e-05: browsers would break after their "-"


def pieces(text: str) -> list[list[str]]:
    """A text split where a line may break; each piece is split again, and every second part of it must not break."""
    return [UNBROKEN.split(piece) for piece in BREAKS.split(text)]
