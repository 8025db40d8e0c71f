"""One tokenizer in several runtimes: PyTorch, compiled, ONNX Runtime in float32 and int8; and a 64 px preview.

    python benchmarks/runtimes.py                            # f16d16-multi, 1 and 8 images
    python benchmarks/runtimes.py --quick                    # tiny-multi, two rounds: whether it runs
    python benchmarks/runtimes.py --batch_sizes 1 --out runtimes.json

On the CPU, with as many threads as torch has, random weights, in turns in one process. Needs hieratok[onnx],
hieratok[diffusers], and some 5 GB of disk for a while. The preview is the decoder up to the scale next to 64 px, beside
the decoder of diffusers' AutoencoderTiny (TAESD's shape) on as many latent values, which always draws the whole image.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from hieratok import HieraTok
from hieratok.bench.suite import Machine, Timed, measure, table
from hieratok.bench.timing import Call
from hieratok.core.typed import as_json
from hieratok.interop import export
from hieratok.studies import recipes

CPU = torch.device("cpu")
PREVIEW = 64  # pixels


def programs(part: export.Part, example: Tensor, folder: Path) -> dict[str, export.Program]:
    """One part in every runtime, each of which gives the same up to rounding (int8: up to quantisation)."""
    path = folder / f"{part.name}.onnx"
    export.write(part, example, path)
    export.check(part, example, path)
    export.quantize(path, export.int8_path(path))
    compiled = torch.compile(part.module, dynamic=False)
    for found, expected in zip(compiled(example), part.module(example), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=export.TOLERANCE)
    return {
        "PyTorch": part.module,
        "compiled": compiled,
        "ONNX Runtime": export.open_program(path),
        "ONNX Runtime, int8": export.open_program(export.int8_path(path)),
    }


def tiny_autoencoder(values: int, batch_size: int) -> tuple[AutoencoderTiny, Tensor]:
    """TAESD's shape with random weights, and latents of four channels with as many values an image, or nearly."""
    side = round(math.sqrt(values / 4))
    return AutoencoderTiny(latent_channels=4).eval(), torch.randn(batch_size, 4, side, side)


@torch.inference_mode()
def side_by_side(recipe: str, batch_size: int, rounds: int, folder: Path) -> list[Timed]:
    """Rows: encode, decode and preview in every runtime, as ratios to PyTorch; AutoencoderTiny to our preview."""
    machine = Machine(CPU, "fp32", batch_size, rounds, compile=False)
    tokenizer = HieraTok(recipes.get(recipe).model).eval()
    c = tokenizer.config
    images = torch.rand(batch_size, 3, c.image_size, c.image_size) * 2 - 1
    z = tokenizer.encode(images).mode().clone()
    sides = [c.patch_size * s for s in c.scales]
    k = min(range(len(sides)), key=lambda i: abs(sides[i] - PREVIEW))
    titles = {"encoder": "encode", "decoder": "decode", f"decoder-scale{k}": f"preview of {sides[k]} px"}
    calls: dict[str, Call] = {}
    to: dict[str, str] = {}
    for part in export.parts(tokenizer):
        if part.name not in titles:
            continue
        example = images if part.input == "images" else z
        for runtime, program in programs(part, example, folder).items():
            name = f"{titles[part.name]}, {runtime}"
            calls[name] = lambda program=program, example=example: program(example)
            to[name] = f"{titles[part.name]}, PyTorch"
    tiny, latents = tiny_autoencoder(z[0].numel(), batch_size)
    name = f"AutoencoderTiny, decode {' x '.join(map(str, latents.shape[1:]))}, PyTorch"
    calls[name] = lambda: tiny.decode(latents).sample
    to[name] = f"{titles[f'decoder-scale{k}']}, PyTorch"
    # neither compiled graphs nor ONNX Runtime can be counted
    return measure(machine, calls, batch_size, to, f"{batch_size} images", counts=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="f16d16-multi", help="a tokenizer of several scales")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny-multi, two rounds: figures mean nothing")
    parser.add_argument("--out", help="JSON file to write the figures to")
    args = parser.parse_args()
    recipe, rounds = ("tiny-multi", 2) if args.quick else (args.recipe, args.rounds)
    export.check_packages()
    result = {}
    for batch_size in args.batch_sizes:
        with tempfile.TemporaryDirectory() as folder:
            result[batch_size] = side_by_side(recipe, batch_size, rounds, Path(folder))
        print(f"\n{recipe}, {batch_size} image{'s' * (batch_size > 1)}\n{table(result[batch_size])}", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(as_json(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
