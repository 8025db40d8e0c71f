"""How decoding's cost grows with resolution, scale list and batch; writes a plot.

    python benchmarks/scaling.py --out scaling.json --plot docs/scaling.webp

Random weights of the recipe. At other sizes than the recipe's, token grids grow in proportion.
"""

import argparse
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hieratok import HieraTok
from hieratok.bench.suite import Machine, Timed, measure, table
from hieratok.core.devices import best_device
from hieratok.core.precision import autocast
from hieratok.core.typed import as_json
from hieratok.studies import recipes
from hieratok.tokenizer.model import TokenizerConfig
from hieratok.tokenizer.scales import Scales

SCALE_LISTS = ((16,), (1, 2, 4, 16), (1, 2, 4, 8, 16), (1, 2, 4, 8, 12, 16))  # the paper's table 4


def tokens(config: TokenizerConfig, side: int) -> int:
    """Of the decoder, for an image of `side` pixels."""
    grid = side // config.patch_size
    return Scales.of(config.scales, (grid, grid)).num_tokens


@dataclass(frozen=True)
class Decoding:
    """What decoding took, and of what."""

    timed: Timed
    side: int
    """Of the images, in pixels."""
    batch: int
    scales: tuple[int, ...]
    tokens: int

    @property
    def images_per_second(self) -> float:
        assert self.timed.images_per_second is not None
        return self.timed.images_per_second

    def to_json(self) -> dict[str, Any]:
        facts = {"side": self.side, "batch": self.batch, "scales": self.scales, "tokens": self.tokens}
        return {**self.timed.to_json(), **facts}


@torch.inference_mode()
def decoding(machine: Machine, config: TokenizerConfig, side: int, batch_size: int) -> Decoding:
    """One row: decode latents of images of `side` pixels."""
    model = HieraTok(config).eval().to(machine.device)
    grid = side // config.patch_size
    z = torch.randn(batch_size, config.latent_channels, grid, grid, device=machine.device)

    def decode() -> None:
        with autocast(machine.device, machine.precision):
            model.decode(z)

    name = f"{side} px, scales {', '.join(map(str, config.scales))}, batch {batch_size}"
    (row,) = measure(machine, {name: decode}, batch_size, name=name)
    return Decoding(row, side, batch_size, config.scales, tokens(config, side))


def plot(result: dict[str, list[Decoding]], hardware: str, path: Path) -> None:
    """Three panels: seconds an image over side, over scale list, over batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    by_side, by_scales, by_batch = figure.subplots(1, 3)
    rows = result["resolution"]
    by_side.loglog([r.tokens for r in rows], [1 / r.images_per_second for r in rows], "o-", label="measured")
    first = rows[0]
    by_side.loglog(
        [r.tokens for r in rows],
        [r.tokens / first.tokens / first.images_per_second for r in rows],
        "--",
        label="in proportion to tokens",
    )
    by_side.set_xticks([r.tokens for r in rows], [f"{r.side} px\n{r.tokens:,} tokens" for r in rows], fontsize=8)
    by_side.minorticks_off()
    by_side.set(ylabel="seconds an image", title="resolution")
    by_side.legend(frameon=False, fontsize=8)
    rows = result["scales"]
    by_scales.barh([", ".join(map(str, r.scales)) for r in rows], [1 / r.images_per_second for r in rows])
    by_scales.set(xlabel="seconds an image", title="scale list")
    rows = result["batch"]
    by_batch.plot([r.batch for r in rows], [r.images_per_second for r in rows], "o-")
    by_batch.set(xlabel="images at a time", ylabel="images/s", title="batch")
    by_batch.set_ylim(0, 1.1 * max(r.images_per_second for r in rows))
    figure.suptitle(hardware, fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    Image.open(buffer).convert("RGB").save(path, quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="f16d16-multi", help="a tokenizer with 16 x 16 latents")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", help="JSON file to write the figures to")
    parser.add_argument("--plot", help="picture to write")
    args = parser.parse_args()
    from hieratok.core.devices import hardware

    machine = Machine(torch.device(best_device()), args.precision, 1, args.rounds, compile=False)
    config = recipes.get(args.recipe).model
    side = config.image_size
    result = {
        "resolution": [decoding(machine, config, factor * side, 1) for factor in (1, 2, 4)],
        "scales": [decoding(machine, replace(config, scales=scales), side, 1) for scales in SCALE_LISTS],
        "batch": [decoding(machine, config, side, batch_size) for batch_size in args.batch_sizes],
    }
    for name, rows in result.items():
        print(f"\n{name}\n{table([row.timed for row in rows])}")
    if args.out:
        Path(args.out).write_text(json.dumps(as_json(result), indent=2) + "\n")
    if args.plot:
        plot(result, f"{args.recipe}, {args.precision}, {hardware()}", Path(args.plot))


if __name__ == "__main__":
    main()
