"""Options of `hieratok bench`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from hieratok.core.precision import Precision

What = Literal["attention", "decode", "train", "sample", "data", "evaluate"]


@dataclass(kw_only=True)
class Bench:
    """Time each part on this machine, compared with the machine's limits.

    Example: hieratok bench decode --recipe f16d16-multi --batch_size 8 --json
    """

    what: What | Literal["all"] = "all"
    """Part: attention, decode, train, sample, data, evaluate, or all."""
    recipe: str | None = None
    """Recipe of the tokenizer. Default: f16d16-multi on a GPU, tiny-multi elsewhere."""
    generator: str | None = None
    """Recipe of the generator for `sample`. Default: dit-xl on a GPU, dit-tiny elsewhere."""
    data: str = "bundled:train"
    """Images for `data`."""
    batch_size: int | None = None
    """Batch size in images. Default: 32 on a GPU, 8 elsewhere."""
    precision: Precision | None = None
    """Precision. Default: bf16 on a GPU, fp32 elsewhere."""
    compile: bool = False
    """Compile the models with torch.compile."""
    rounds: int = 7
    """Number of measurements; medians are reported."""
    device: str | None = None
    """Where to compute, such as cuda:0 or cpu. Default: the GPU if there is one."""
    json: bool = False
    """Print JSON instead of tables."""
    out: str | None = None
    """File to write the JSON to as well."""

    def __post_init__(self):
        if self.rounds < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(f"--rounds and --batch_size must be at least 1, not {self.rounds} and {self.batch_size}")
