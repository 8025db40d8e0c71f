"""Encode and decode beside the autoencoders that users would pick instead: SD-VAE (f8 d4) and DC-AE (f32 d32).

    python benchmarks/autoencoders.py                      # 256 px; on the GPU if there is one
    python benchmarks/autoencoders.py --batch_size 4 --precision bf16

Both come from diffusers, with random weights and their published shapes; in turns in one process.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor

from hieratok import HieraTok
from hieratok.bench.suite import Machine, measure, table
from hieratok.bench.timing import Call
from hieratok.core.devices import best_device
from hieratok.core.precision import autocast
from hieratok.core.typed import as_json
from hieratok.studies import recipes


def sd_vae() -> AutoencoderKL:
    """stabilityai/sd-vae-ft-mse's shape: 84M parameters."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=256,
    )


def dc_ae() -> AutoencoderDC:
    """mit-han-lab/dc-ae-f32c32-sana-1.0's shape: the class's defaults with its block types."""
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock")
    return AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="f16d16-multi")
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", help="JSON file to write the figures to")
    args = parser.parse_args()
    machine = Machine(torch.device(best_device()), args.precision, args.batch_size, args.rounds, compile=False)
    ours = HieraTok(recipes.get(args.recipe).model)
    models = {args.recipe: ours, "SD-VAE": sd_vae(), "DC-AE": dc_ae()}
    encode: dict[str, Callable[[Tensor], Tensor]] = {
        args.recipe: lambda x: ours.encode(x).mode(),
        "SD-VAE": lambda x: models["SD-VAE"].encode(x).latent_dist.mode(),
        "DC-AE": lambda x: models["DC-AE"].encode(x).latent,
    }
    images = torch.rand(args.batch_size, 3, args.size, args.size, device=machine.device) * 2 - 1
    calls: dict[str, Call] = {}
    with torch.inference_mode(), autocast(machine.device, machine.precision):
        for name, model in models.items():
            model.to(machine.device).eval()
            z = encode[name](images)
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            print(f"{name}: {millions:.0f}M parameters, latents {' x '.join(map(str, z.shape[1:]))}")
            decode = model.decode if model is ours else lambda z, model=model: model.decode(z).sample
            calls[f"{name}, encode"] = lambda name=name: encode[name](images)
            calls[f"{name}, decode"] = lambda decode=decode, z=z: decode(z)
        to = {name: f"{args.recipe}, {name.rpartition(', ')[2]}" for name in calls if not name.startswith(args.recipe)}
        rows = measure(machine, calls, args.batch_size, to, "autoencoders")
    print(table(rows))
    if args.out:
        Path(args.out).write_text(json.dumps(as_json(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
