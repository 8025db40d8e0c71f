"""`docs/api.md`, the names to use from Python, made from their docstrings: `python docs/api.py`. A test fails if it is
stale."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from settings import row, table

from hieratok.settings import options_of

PAGE = Path(__file__).parent / "api.md"
LONGEST = 100
"""Characters of a signature on one line."""

INTRODUCTION = """\
# The API

Made from the docstrings by `make docs`; do not edit. What is not on this page may change without notice.
`B` batch, `H W` pixels, `f` patch size, `h w` latent grid, `d` latent channels, `K` scales, coarse to fine. Images are
float in [-1, 1] inside models, and uint8 in files and metrics.
"""

NAMES: dict[str, dict[str, list[str]]] = {  # section: module: names
    "Tokenizers": {
        "hieratok": ["HieraTok", "TokenizerConfig", "DiagonalGaussian"],
        "hieratok.tokenizer.frozen": ["with_encoder"],
    },
    "Generators": {
        "hieratok.generation.dit": ["DiT", "LatentSpace"],
        "hieratok.generation.sampling": ["sample_latents"],
    },
    "Images": {
        "hieratok.data.images": ["open_source", "Source", "ImageDataset", "evaluation_batches"],
        "hieratok.core.pixels": ["read_image", "center_crop", "to_float", "to_uint8"],
        "hieratok.tasks.reconstruct": ["reconstruct_any"],
    },
    "Training": {
        "hieratok.studies": ["recipes.get"],
        "hieratok.training.tokenizer": ["train_tokenizer"],
        "hieratok.training.generator": ["train_generator"],
    },
    "Metrics": {"hieratok.evaluation.pixels": ["psnr", "ssim"]},
    "Elsewhere": {
        "hieratok": ["push_to_hub"],
        "hieratok.interop": ["AutoencoderHieraTok", "HieraTokDiT", "HieraTokPipeline", "HieraTokPreview"],
    },
}


def page() -> str:
    """The whole page, Markdown."""
    parts = [INTRODUCTION, contents()]
    for section, modules in NAMES.items():
        parts += [f"## {section}"]
        parts += [entry(module, name) for module, names in modules.items() for name in names]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def contents() -> str:
    """Links to the names, by section."""
    lines = []
    for section, modules in NAMES.items():
        names = [name for names in modules.values() for name in names]
        links = [f"[`{name}`](#{name.lower().replace('.', '')})" for name in names]
        lines.append(f"- {section}: {', '.join(links)}")
    return "\n".join(lines)


def entry(module: str, name: str) -> str:
    """One public name: how it is imported and called, what it does, its fields or methods."""
    imported, _, _ = name.partition(".")
    thing = attrgetter(name)(importlib.import_module(module))
    lines = [f"from {module} import {imported}"]
    if not isinstance(thing, type):
        return "\n\n".join([f"### {name}", code(*lines, definition(thing, name)), text(thing)])
    if is_dataclass(thing):
        rows = [row(option, option.name) for option in options_of(thing, with_texts=True)]
        fields = table("field", rows)
        return "\n\n".join([f"### {name}", code(*lines), text(thing), fields])
    if "__init__" in vars(thing) and not getattr(thing, "_is_protocol", False):
        lines.append(definition(thing.__init__, name, returns=False))
    parts = [f"### {name}", code(*lines), text(thing)]
    for method, value in members(thing):
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        kind = {property: " (property)", classmethod: " (class method)"}.get(type(value), "")
        parts += [f"#### {name}.{method}{kind}"]
        parts += [] if isinstance(value, property) else [code(definition(function, method))]
        parts += [text(function)]
    return "\n\n".join(parts)


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """A class's public methods and properties, in the source's order; first those of its bases in this package."""
    own = [base for base in reversed(cls.__mro__) if base.__module__.partition(".")[0] == "hieratok"]
    for name, value in {name: value for base in own for name, value in vars(base).items()}.items():
        if not name.startswith("_") and (isinstance(value, property | classmethod) or inspect.isroutine(value)):
            yield name, value


def definition(function: Any, name: str, returns: bool = True) -> str:
    """A function's signature as its source has it, without `self` and `cls`."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    assert isinstance(node, ast.FunctionDef), function
    if node.args.args and node.args.args[0].arg in ("self", "cls"):
        del node.args.args[0]
    arguments = split(ast.unparse(node.args))
    result = f" -> {ast.unparse(node.returns).strip(chr(39))}" if node.returns and returns else ""
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= LONGEST:
        return line
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){result}"


def split(arguments: str) -> list[str]:
    """Arguments one by one: at the commas that no bracket encloses; with spaces around a default's `=`."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += " = " if character == "=" and not depth else character
    return [part.strip() for part in parts if part.strip()]


def code(*lines: str) -> str:
    """Not marked as Python: the tests would run it."""
    return "\n".join(["```text", *lines, "```"])


def text(thing: Any) -> str:
    """A docstring as Markdown: its sections become lists."""
    doc = inspect.cleandoc(inspect.unwrap(thing).__doc__ or "")
    assert doc, f"{thing} has no docstring"
    parts: list[str] = []
    for paragraph in doc.split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if not re.fullmatch(r"(Args|Returns|Yields|Raises):.*", head):
            parts.append(escaped(paragraph))
            continue
        title, _, first = head.partition(":")
        body = textwrap.dedent(rest).strip()
        items = re.split(r"\n(?=\S)", "\n".join(filter(None, [first.strip(), body])))
        if title in ("Returns", "Yields"):
            parts.append(f"{title}: {escaped(' '.join(body.split()))}")
        else:
            lines = [" ".join(item.split()).partition(": ") for item in items]
            parts.append("\n".join([f"{title}:\n", *(f"- `{name}`: {escaped(what)}" for name, _, what in lines)]))
    return "\n\n".join(parts)


def escaped(prose: str) -> str:
    """Text that Markdown leaves as it is; code in backticks stays code."""
    parts = prose.split("`")
    parts[::2] = [re.sub(r"([*<|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(page()) / 1000:.1f} kB")
