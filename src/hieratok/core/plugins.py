"""Parts from other packages: modules that register down-samplers, losses, discriminators and data sources.

A module is loaded because the command line names it, `--plugin MODULE`, or because an installed package declares it as
an entry point of the group `hieratok.plugins`. A file (settings, a model's config.json) may name a registered part, and
never the code that registers it.

    from hieratok.core.plugins import DOWNSAMPLERS

    @DOWNSAMPLERS.register("max")
    class MaxDownsample(nn.Module): ...

Recipes and studies have tables of their own, which a plugin adds to: `studies.recipes.recipe`, `studies.paper.STUDIES`.
"""

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from hieratok.core.messages import nearest, shown

GROUP = "hieratok.plugins"
"""Group of the entry points."""
VARIABLE = "HIERATOK_PLUGINS"
"""In the environment: the modules that the command line named, for the processes that a command starts."""
NAME = re.compile(r"[a-z][a-z0-9_-]*")

Part = TypeVar("Part", bound=Callable[..., Any])

_loaded: set[str] = set()


class Registry(Generic[Part]):
    """Parts of one kind, by their names in settings.

    Args:
        kind: what they are, for messages.
        setting: the setting that names them, for messages.
        built_in: names that are taken.
    """

    def __init__(self, kind: str, setting: str, built_in: Sequence[str] = ()):
        self.kind = kind
        self.setting = setting
        self.built_in = tuple(built_in)
        self._parts: dict[str, Part] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        """Register the decorated class or function.

        Args:
            name: lower-case letters, digits, - and _, beginning with a letter.

        Raises:
            ValueError: another name, or one that is taken by another part.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"the name of a {self.kind} has lower-case letters, digits, - and _ only, not {name!r}")

        def enter(part: Part) -> Part:
            taken = self._parts.get(name)
            if name in self.built_in or (taken is not None and _place(taken) != _place(part)):
                raise ValueError(f"there is a {self.kind} called {name!r} already")
            self._parts[name] = part
            return part

        return enter

    def names(self) -> list[str]:
        """Names of all parts, including those of installed plugins."""
        load_plugins()
        return [*self.built_in, *self._parts]

    def check(self, name: str) -> None:
        """Raise ValueError if there is no such part; the message offers the nearest name."""
        if name not in self.built_in and name not in self._parts and name not in self.names():
            raise ValueError(
                f"{self.setting} must be one of {', '.join(self.names())}, not {shown(repr(name))[:80]}"
                f"{nearest(name, self.names())} (others come with --plugin MODULE)"
            )

    def __contains__(self, name: str) -> bool:
        """Whether a plugin registered it."""
        if name not in self._parts:
            load_plugins()
        return name in self._parts

    def __getitem__(self, name: str) -> Part:
        self.check(name)
        return self._parts[name]


def _place(part: Any) -> tuple[Any, Any]:
    """Where a part is defined: a module that is loaded a second time registers the same ones."""
    return getattr(part, "__module__", None), getattr(part, "__qualname__", None)


DOWNSAMPLERS: Registry[Callable[..., Any]] = Registry("down-sampler", "model.downsample", ("interpolate", "conv"))
"""(latent_channels, decoder_width, scales) -> a module, called as downsample(z, scales), that yields a token map (B, C,
h_k, w_k) for each scale, coarse to fine."""
LOSSES: Registry[Callable[..., Any]] = Registry("loss", "loss.plugins")
"""(pyramid, images) -> a scalar: reconstructions (B, 3, H_k, W_k), coarse to fine, and images (B, 3, H, W), float32 in
[-1, 1]."""
DISCRIMINATORS: Registry[Callable[..., Any]] = Registry(
    "discriminator", "gan.discriminator", ("patchgan", "residual", "dino")
)
"""(AdversarialConfig, image_size) -> a module from images (B, 3, H, W) in [-1, 1] to logits (B, ...), high for real."""
SOURCES: Registry[Callable[..., Any]] = Registry("data source", "data.path", ("bundled",))
"""What stands behind NAME: in --data NAME:TEXT -> a `hieratok.data.images.Source`."""


def load(module: str) -> None:
    """Import a module that registers parts; it is looked for in the current folder too, after all other places.

    Raises:
        ValueError: no such module, or it fails; in one line.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
        raise ValueError(f"--plugin takes a module's name such as my_module, not {shown(repr(module))}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever its code raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the plugin {module} cannot be loaded ({shown(reason)})") from error


def load_plugins() -> None:
    """Load, once, what the environment names and what installed packages declare.

    Raises:
        ValueError: one cannot be loaded; in one line.
    """
    for module in filter(None, os.environ.get(VARIABLE, "").split(",")):
        _once(module)
    if GROUP not in _loaded:
        _loaded.add(GROUP)
        for point in importlib.metadata.entry_points(group=GROUP):
            _once(point.module)


def _once(module: str) -> None:
    if module not in _loaded:
        _loaded.add(module)  # before the import, as the module may ask for parts
        try:
            load(module)
        except ValueError:
            _loaded.discard(module)
            raise


def take_plugins(arguments: Sequence[str]) -> list[str]:
    """A command line without its `--plugin MODULE`, which are loaded, for the processes that it starts too.

    Raises:
        ValueError: no module after the flag, or one that cannot be loaded.
    """
    rest: list[str] = []
    words: Iterator[str] = iter(arguments)
    for word in words:
        if word == "--":  # no flags after it
            return [*rest, word, *words]
        flag, equals, module = word.partition("=")
        if flag != "--plugin":
            rest.append(word)
            continue
        if not equals:
            module = next(words, "")
        load(module)
        _loaded.add(module)
        before = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
        os.environ[VARIABLE] = ",".join(dict.fromkeys([*before, module]))
    return rest
