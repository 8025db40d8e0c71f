"""`docs/recipes.md`, which recipe to use and what it takes, made from the recipes: `python docs/recipes.py`.

A step of every recipe is run on tensors without contents, so that FLOPs and memory are counted and nothing is computed.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hieratok.bench.timing import count_flops
from hieratok.core.precision import autocast
from hieratok.core.tables import Table
from hieratok.generation.dit import DiT, LatentSpace
from hieratok.losses.vf import VFConfig
from hieratok.studies import recipes
from hieratok.tokenizer.model import HieraTok
from hieratok.training.generator import GeneratorObjective
from hieratok.training.tokenizer import TokenizerObjective

PAGE = Path(__file__).parent / "recipes.md"
GPU = 100e12
"""FLOP/s of a training step on a GPU: an assumption, nothing was measured."""
SIZES = (24, 80)
"""GB of memory of common GPUs."""
SHARE = 0.9
"""Of a GPU's memory that is filled: the rest is for the driver and for gaps between tensors. [ours]"""

GROUPS = {  # heading: beginnings of the recipes' names; whose measured speed says what a CPU thread does, None: GPU
    "The paper's tokenizers": (("f16",), None),
    "Tokenizers for one GPU": (("small-",), None),
    "Tokenizers for a CPU and hours": (("imagenette-",), "imagenette-multi"),
    "Tokenizers for a CPU and minutes": (("tiny-",), "tiny-multi"),
    "Decoders for latents that already exist": (("preview-", "rae-dinov2"), None),
    "A decoder for a small ViT's features, on a CPU": (("rae-tiny",), "tiny-multi"),
    "The paper's generators, and a smaller one": (("dit-xl", "dit-l", "dit-b", "dit-s", "dit-rae"), None),
    "A generator for a CPU": (("dit-tiny",), "dit-tiny"),
}

MEASURED = {"tiny-multi": 47, "tiny-multi-256": 16, "imagenette-multi": 16, "dit-tiny": 43}
"""Images/s on one thread of a busy AMD EPYC, from the recipes' docstrings."""

INTRODUCTION = """\
# Which recipe should I use?

Made by `make docs`; do not edit. What a recipe is and all of its settings: [settings.md](settings.md#recipes).

| you have | train a tokenizer | then a generator |
|---|---|---|
| a CPU, and want to see it work in minutes | `tiny-multi` (or `make quickstart`) | `dit-tiny` |
| a CPU, some thousand photos and a night | `imagenette-multi` | |
| one GPU, your own photos | `small-multi`, with VGG-16's weights or `--loss.perceptual_weight 0` | `dit-s` |
| a cluster, ImageNet, VGG-16's weights | `f16d16-multi` | `dit-xl`; `dit-b` for a first look |
| a trained tokenizer that should look sharper | its `-stage2`; with generators on its latents its `-decoder` | |
| a trained tokenizer, and larger images | `f16d16-multi-512`, or `tiny-multi-256` to see how | |
| a diffusion model whose latents are fixed | `preview-sd --encoder diffusers:FOLDER` | |
| a foundation model whose features are to be the latents | `rae-dinov2`, `rae-tiny` | `dit-rae` |
| the question whether several scales help | the `-multi` and the `-single` recipe of a name, or `hieratok study` | |

More latent channels (`f16d32-multi`) reconstruct better and are harder to generate (paper, table 2). Table 3's and 4's
variants are for comparing, not for using: in the paper convolution with causal attention gives the best samples.
Stage 2 did not help at the sizes that were trained here ([limits.md](limits.md)).

## How to read the numbers

**Everything below is computed, not measured, where it does not say so.** No recipe was run on a GPU.

- **Parameters**: those that are trained, discriminators included.
- **GFLOPs an image**: forward and backward of the whole step, losses included; two per multiply-add.
- **Memory**: weights, gradients, averaged weights and AdamW's moments, and what one more image in a micro-batch adds
  at the peak of a step, in the recipe's precision. Tensors alone are counted: no gaps between
  them, no workspace of the GPU's libraries. A test compares this with what torch's allocator counts on a CPU.
- **Fits**: the largest `--train.micro_batch_size` (a power of two, at most the batch) that fills {share:.0%} of the
  GPU. It does not change the run. "-": not one image; `--train.activation_checkpointing true` or `fsdp2` may help.
- **Time**: FLOPs of all steps. One GPU is taken to do {gpu:.0f} TFLOP/s, which is an assumption: a third of an A100's
  peak in bf16 (312 TFLOP/s). A CPU's thread is taken to be as fast as in the table's measured recipe. Your own rate is
  the images/s of `hieratok bench train` times the GFLOPs below. Divide by the number of GPUs.
- **Measured**: on one thread of an AMD EPYC that had other work too.

A frozen encoder is not counted: with `--cache_latents` it runs once a photo before training.

Recipes marked * also train with the vf-loss; its foundation model, DINOv2 large with 304M frozen parameters, is not
counted.
"""


@dataclass(frozen=True)
class Load:
    """What one step takes."""

    parameters: int
    """Trained ones."""
    flops: float
    """Of one image, forward and backward."""
    fixed_bytes: int
    """Weights, gradients, averaged weights, AdamW's moments, and frozen networks."""
    image_bytes: float
    """One more image at the peak."""

    def micro_batch(self, gigabytes: float, batch_size: int) -> int:
        """The largest power of two, at most the batch, that fits; 0: none."""
        count = (SHARE * gigabytes * 1e9 - self.fixed_bytes) / self.image_bytes
        fitting = [2**i for i in range(batch_size.bit_length()) if 2**i <= min(count, batch_size)]
        return max(fitting, default=0)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at a time, of those made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known and storage not in inputs:
                    self.known[storage] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, count: int) -> None:
        self.now -= count


@contextmanager
def without_contents() -> Iterator[None]:
    """Tensors made inside have shapes and no values. Modules move by new parameters: torch cannot swap such tensors."""

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children():
            child._apply(function)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
        return module

    with patch.object(nn.Module, "_apply", apply), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def make_step(run: recipes.Run, batch_size: int) -> tuple[Callable[[], None], Any]:
    """Forward and backward of one micro-batch as training does it, and the objective; without the vf-loss."""
    B = batch_size
    objective: Any
    if isinstance(run, recipes.TokenizerRun):
        run = replace(run, vf=VFConfig(), loss=replace(run.loss, random_trunk=True))
        objective = TokenizerObjective(run, HieraTok(run.model))
        size = run.model.image_size
        batch = {"image": torch.zeros(B, 3, size, size, dtype=torch.uint8)}
        if run.model.encoder:  # its latents are cached
            moments = torch.zeros(B, run.model.latent_channels, *run.model.grid)
            batch |= {"mean": moments, "logvar": moments}
    else:
        d, h, w = run.model.latent_shape
        generator = DiT(run.model)
        generator.latents = LatentSpace("", (0.0,) * d, (1.0,) * d)
        objective = GeneratorObjective(run, generator)
        moments = torch.zeros(B, d, h, w)
        batch = {"mean": moments, "logvar": moments, "label": torch.zeros(B, dtype=torch.long)}
    for network in objective.networks.values():
        network.train()

    def step() -> None:
        with autocast(torch.device("cpu"), run.train.precision):
            objective.compute(objective.networks, batch, run.train.steps, Tensor.backward)
        for network in objective.networks.values():
            network.zero_grad()

    return step, objective


def peak_bytes(step: Callable[[], None]) -> int:
    """Of what a step makes."""
    with LiveBytes() as live:
        step()
    return live.peak


@cache
def load_of(run: recipes.Run) -> Load:
    """Count one run's step."""
    few, many = 8, 16
    peaks: dict[int, int] = {}
    with without_contents():
        for count in (few, many):
            step, objective = make_step(run, count)
            peaks[count] = peak_bytes(step)
        flops = count_flops(step) / many
        networks = objective.networks
        trained = sum(p.numel() for n in networks.values() for p in n.parameters() if p.requires_grad)
        held = sum(p.numel() for n in networks.values() for p in n.parameters())
        averaged = sum(p.numel() for p in networks[objective.name].parameters())
        criterion = getattr(objective, "criterion", None)
        frozen = sum(p.numel() for p in criterion.parameters()) if criterion else 0
    fixed = 4 * (held + averaged + 3 * trained + frozen)  # float32; trained: gradient and two moments
    return Load(trained, flops, fixed, (peaks[many] - peaks[few]) / (many - few))


def counted(name: str) -> Load:
    """A recipe's load; what changes no cost is left out, so that recipes alike are counted once."""
    run = replace(recipes.get(name), name="counted")
    if isinstance(run, recipes.TokenizerRun):
        run = replace(run, loss=replace(run.loss, kl_weight=0.0), start_from=run.start_from and "first-stage")
    return load_of(run)


def row(name: str, base: str | None) -> list[str]:
    """A recipe's line of the table."""
    run, load = recipes.get(name), counted(name)
    images = run.train.steps * run.train.batch_size
    star = "*" if isinstance(run, recipes.TokenizerRun) and run.vf.weight else ""
    cells = [
        f"`{name}`{star}",
        f"{significant(load.parameters / 1e6)}M",
        significant(load.flops / 1e9),
        f"{images:,}",
        f"{significant(load.fixed_bytes / 1e9)} GB + {significant(load.image_bytes / 1e6)} MB",
    ]
    if base is None:
        fits = [load.micro_batch(size, run.train.batch_size) for size in SIZES]
        return [*cells, " / ".join(str(count or "-") for count in fits), duration(load.flops * images / GPU)]
    speed = MEASURED.get(name)
    measured = f"{duration(images / speed)} ({speed} images/s)" if speed else "no"
    return [*cells, duration(load.flops * images / (MEASURED[base] * counted(base).flops)), measured]


def significant(value: float) -> str:
    """Two digits that count, and whole numbers above 100: more would pretend."""
    return f"{float(f'{value:.2g}'):,.10g}" if value < 100 else f"{float(f'{value:.3g}'):,.0f}"


def duration(seconds: float) -> str:
    """In the unit that people would say."""
    if seconds < 2 * 3600:
        return f"{max(1, round(seconds / 60))} min"
    return f"{significant(seconds / 3600)} h" if seconds < 72 * 3600 else f"{significant(seconds / 86400)} days"


def group(names: list[str], base: str | None) -> str:
    """The table of some recipes."""
    heads = ["recipe", "parameters", "GFLOPs an image", "images seen", "memory: fixed + an image"]
    if base is None:
        heads += [f"fits {' / '.join(map(str, SIZES))} GB", "time, one GPU"]
    else:
        heads += ["time, one CPU thread", "measured"]
    return Table(heads, [row(name, base) for name in names]).markdown()


def names_of(starts: tuple[str, ...]) -> list[str]:
    """The recipes that begin so."""
    return [name for name in recipes.RECIPES if name.startswith(starts)]


def page() -> str:
    """The whole page, Markdown."""
    parts = [INTRODUCTION.format(share=SHARE, gpu=GPU / 1e12)]
    parts += [f"## {heading}\n\n{group(names_of(starts), base)}" for heading, (starts, base) in GROUPS.items()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {PAGE.stat().st_size / 1000:.1f} kB")
