"""`hieratok recipes`."""

from dataclasses import dataclass

from hieratok.core.typed import plain
from hieratok.settings import command
from hieratok.studies import recipes


@dataclass(kw_only=True)
class Recipes:
    """List recipes, or print one as YAML that `train` accepts.

    Example: hieratok recipes f16d16-multi > mine.yaml
    """

    name: str | None = None
    """Print this recipe. Default: list all."""


def run(options: Recipes) -> None:
    """The command."""
    if options.name:
        import yaml

        print(yaml.safe_dump(plain(recipes.get(options.name)), sort_keys=False), end="")
        return
    width = max(map(len, recipes.RECIPES))
    for name in recipes.RECIPES:
        print(f"{name:<{width}}  {recipes.summary(name)}")


COMMAND = command("recipes", Recipes, run, "name")
