"""The decoder's transformer side by side: our blocks, timm's and diffusers' of the same shape.

    python benchmarks/transformer.py                       # 24 blocks of width 1024 on 341 tokens
    python benchmarks/transformer.py --batch_size 8 --precision bf16

Pre-norm blocks with 16 heads, MLP ratio 4 and GELU, without biases where the library allows it; plain attention, which
all three have. In turns in one process; random weights.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers.models.attention import BasicTransformerBlock
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from hieratok.bench.suite import Machine, measure, table
from hieratok.bench.timing import Call
from hieratok.core.devices import best_device
from hieratok.core.layers import Blocks
from hieratok.core.precision import autocast
from hieratok.core.typed import as_json
from hieratok.studies import recipes
from hieratok.tokenizer.scales import Scales
from hieratok.tokenizer.vit import Block


def contenders(width: int, heads: int, depth: int) -> dict[str, nn.Module]:
    """The same transformer from three libraries."""
    theirs = dict(attention_bias=False, attention_out_bias=False, ff_bias=False, activation_fn="gelu")
    return {
        "ours": Blocks(Block(width, heads, 4.0) for _ in range(depth)),
        "timm's blocks": nn.Sequential(*(TimmBlock(width, heads, proj_bias=False) for _ in range(depth))),
        "diffusers' blocks": nn.Sequential(
            *(BasicTransformerBlock(width, heads, width // heads, **theirs) for _ in range(depth))
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="f16d16-multi", help="the tokenizer whose decoder has the shape")
    parser.add_argument("--depth", type=int, help="blocks (default: the recipe's)")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", help="JSON file to write the figures to")
    args = parser.parse_args()
    c = recipes.get(args.recipe).model
    machine = Machine(torch.device(best_device()), args.precision, args.batch_size, args.rounds, args.compile)
    tokens = Scales.of(c.scales, c.grid).num_tokens
    x = torch.randn(args.batch_size, tokens, c.decoder_width, device=machine.device)
    calls: dict[str, Call] = {}
    for name, blocks in contenders(c.decoder_width, c.decoder_heads, args.depth or c.decoder_depth).items():
        module = machine.model(blocks.eval())

        def call(module: nn.Module = module) -> None:
            with torch.set_grad_enabled(args.backward), autocast(machine.device, machine.precision):
                out = module(x)
            if args.backward:
                out.float().sum().backward()
                module.zero_grad()

        calls[name] = call
    rows = measure(machine, calls, args.batch_size, {n: "ours" for n in calls if n != "ours"}, "transformer")
    print(table(rows))
    if args.out:
        Path(args.out).write_text(json.dumps(as_json(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
