"""`hieratok cost`."""

import json as json_format
from dataclasses import asdict, dataclass

from hieratok.settings import command, load_run
from hieratok.training.config import TokenizerRun


@dataclass(kw_only=True)
class Cost:
    """Parameters, FLOPs and tokens of a recipe's tokenizer, compared with the paper's (table 7).

    Example: hieratok cost f16d16-multi --json
    """

    recipe: str
    """Recipe, or YAML file."""
    json: bool = False
    """Print JSON instead of a table."""


def run(options: Cost) -> None:
    """The command."""
    settings = load_run(options.recipe).run
    if not isinstance(settings, TokenizerRun):
        raise ValueError(f"{options.recipe} trains a generator; `cost` takes recipes of tokenizers")
    from hieratok.tokenizer.cost import measure, table

    result = measure(settings.model)
    print(json_format.dumps(asdict(result)) if options.json else table(settings.name, result).text())


COMMAND = command("cost", Cost, run, "recipe")
