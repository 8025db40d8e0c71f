"""Scale-causal attention side by side: ours, SDPA with a boolean mask, and FlexAttention with a block mask (compiled).

    python benchmarks/attention.py                                   # fp32 and bf16, on the GPU if there is one
    python benchmarks/attention.py --recipe f16d16-multi --batch_size 8

One block's queries, keys and values of the recipe's decoder, forward and backward, in turns in one process. On a CPU
FlexAttention has no backward, so only its forward pass is timed.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hieratok.bench.suite import Machine, measure, table
from hieratok.bench.timing import Call
from hieratok.core.devices import best_device
from hieratok.core.typed import as_json
from hieratok.studies import recipes
from hieratok.tokenizer.attention import scale_attention
from hieratok.tokenizer.scales import Scales


def side_by_side(machine: Machine, recipe: str) -> list[dict]:
    """Rows of all contenders, as ratios to SDPA with a mask."""
    c = recipes.get(recipe).model
    scales = Scales.of(c.scales, c.grid)
    N = scales.num_tokens
    shape = (machine.batch_size, c.decoder_heads, N, c.decoder_width // c.decoder_heads)
    q, k, v = (torch.randn(shape, device=machine.device, dtype=machine.dtype, requires_grad=True) for _ in range(3))
    mask = scales.mask(c.attention, machine.device)
    scale_of = mask.sum(dim=1)  # in causal mode a token sees as many as there are up to the end of its scale
    block_mask = create_block_mask(
        lambda b, h, query, key: scale_of[query] >= scale_of[key], None, None, N, N, device=machine.device.type
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    attends = {
        "ours": scale_attention(scales, c.attention, machine.device),
        "SDPA, boolean mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "FlexAttention, compiled": lambda q, k, v: compiled(q, k, v, block_mask=block_mask),
    }
    first, *others = (attend(q.detach(), k.detach(), v.detach()) for attend in attends.values())
    tolerance = 1e-5 if machine.dtype == torch.float32 and machine.device.type == "cpu" else 2e-2
    for name, other in zip(list(attends)[1:], others):
        torch.testing.assert_close(first, other, rtol=tolerance, atol=tolerance, msg=f"{name} disagrees")
    calls: dict[str, Call] = {}
    to = {}
    for way, name in itertools.product(("forward", "forward and backward"), attends):
        attend = attends[name]
        if way == "forward":
            calls[f"{name}, {way}"] = lambda attend=attend: attend(q.detach(), k.detach(), v.detach())
        elif name.startswith("Flex") and machine.device.type == "cpu":
            continue
        else:
            calls[f"{name}, {way}"] = lambda attend=attend: torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
        to[f"{name}, {way}"] = f"SDPA, boolean mask, {way}"
    return measure(machine, calls, machine.batch_size, to, "attention", counts=False)  # FlexAttention cannot be counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="f16d16-multi", help="a tokenizer whose attention is causal")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--out", help="JSON file to write the figures to")
    args = parser.parse_args()
    result = {}
    for precision in args.precision:
        machine = Machine(torch.device(best_device()), precision, args.batch_size, args.rounds, compile=False)
        result[precision] = side_by_side(machine, args.recipe)
        print(f"\n{precision}\n{table(result[precision])}", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(as_json(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
