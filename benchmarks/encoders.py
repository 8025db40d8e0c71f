"""The multi-scale decoder on latents that already exist: two frozen encoders, trained here first, and our own beside.

    python benchmarks/encoders.py parts --data 'imagenette/train-*.tar' --squeezenet squeezenet1_1-caffe-fp16.npz

writes small parts in their real layouts, as nothing can be downloaded where this project is tested: an `AutoencoderKL`
of diffusers, trained as latent diffusion's but without a GAN; an `AutoencoderTiny` whose decoder is distilled on its
latents, as TAESD's; a timm ViT, trained on the labels. 64 px, one thread, `--minutes` each. What is done stays.

    python benchmarks/encoders.py train --data ... --val ... --squeezenet ... --mobilenet mobilenet_v2-keras-fp16.npz

trains one multi-scale decoder on each, and on the paper's encoder, with the same steps, and prints a table: PSNR per
scale beside one colour per token, distances, and the same numbers of the autoencoders' own decoders. It resumes.

    python benchmarks/encoders.py time

times previews beside whole decodes at Stable Diffusion's size, 256 px, with random weights, in turns in one process.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn

import readings
from hieratok import HieraTok
from hieratok.bench.suite import Machine, measure, table
from hieratok.bench.timing import Call
from hieratok.core.checkpoint import atomic_file, atomic_folder, write_json
from hieratok.core.progress import progress
from hieratok.core.tables import Table
from hieratok.data.images import evaluation_batches, open_source, to_float
from hieratok.losses.reconstruction import LossConfig, ReconstructionLoss
from hieratok.studies import recipes
from hieratok.tokenizer.frozen import with_encoder
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.pretrained import DiffusersTokenizer
from hieratok.tokenizer.scales import Scales
from hieratok.training.config import TokenizerRun
from hieratok.training.tokenizer import train_tokenizer

SIDE = 64
VIT = "vit_tiny_patch16_224"
VIT_SIDE = 128  # what the ViT sees: 8 x 8 patches, the grid of the autoencoder's latents
BATCH = 16


def read_all(path: str) -> tuple[Tensor, Tensor]:
    """All images, uint8 (N, 3, 64, 64), and their labels (N,)."""
    batches = list(evaluation_batches(open_source(path), SIDE, 256))
    return torch.cat([images for _, _, images in batches]), torch.cat([labels for _, labels, _ in batches])


def train(
    title: str, parameters: Iterator[nn.Parameter], loss: Callable[[Tensor], Tensor], count: int, minutes: float
) -> None:
    """AdamW for so many minutes; the learning rate falls to zero along a cosine.

    Args:
        title: for the progress bar.
        parameters: to be trained.
        loss: of the images with these indices.
        count: how many images there are.
        minutes: how long.
    """
    torch.manual_seed(0)
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    start, step = time.monotonic(), 0
    with progress(total=round(minutes * 60), unit="s", title=title) as bar:
        while (passed := (time.monotonic() - start) / 60) < minutes:
            rate = 1e-3 * min(1.0, (step + 1) / 200)
            optimizer.param_groups[0]["lr"] = rate * (1 + torch.tensor(passed / minutes * torch.pi).cos().item()) / 2
            value = loss(torch.randint(count, (BATCH,)))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
            bar.set_postfix(loss=f"{value.item():.3f}", steps=step, refresh=False)
            bar.update(round(passed * 60) - bar.n)


def mirrored(images: Tensor) -> Tensor:
    """Half of a batch, in [-1, 1]."""
    flip = torch.rand(len(images)) < 0.5
    return to_float(torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images))


def make_autoencoder(images: Tensor, squeezenet: str, minutes: float, folder: Path) -> None:
    """f8, d 4, as Stable Diffusion's, but small: L1, MSE, perceptual, KL; then its scaling factor."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    settings = LossConfig(trunk="squeeze-caffe", trunk_weights=squeezenet)
    criterion = ReconstructionLoss(settings, Scales.of((8,), (8, 8)))

    def loss(indices: Tensor) -> Tensor:
        batch = mirrored(images[indices])
        output = model.encode(batch).latent_dist
        posterior = DiagonalGaussian(output.mean, output.logvar)
        return criterion([model.decode(posterior.sample()).sample], batch, posterior)[0]

    train("AutoencoderKL", model.parameters(), loss, len(images), minutes)
    with torch.inference_mode():
        z = torch.cat([model.encode(to_float(batch)).latent_dist.mean for batch in images[:2048].split(64)])
    model.register_to_config(scaling_factor=1 / z.std().item())
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)


def make_tiny(images: Tensor, squeezenet: str, minutes: float, autoencoder: Path, folder: Path) -> None:
    """TAESD's shape at a quarter of its width: a decoder for the autoencoder's scaled latents."""
    teacher = AutoencoderKL.from_pretrained(autoencoder).eval().requires_grad_(False)
    scale = teacher.config.scaling_factor
    widths = (16,) * 4
    model = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=4)
    settings = LossConfig(trunk="squeeze-caffe", trunk_weights=squeezenet, kl_weight=0)
    criterion = ReconstructionLoss(settings, Scales.of((8,), (8, 8)))

    def loss(indices: Tensor) -> Tensor:
        batch = mirrored(images[indices])
        with torch.no_grad():
            z = teacher.encode(batch).latent_dist.mean * scale
        drawn = model.decode(z).sample
        latents = F.mse_loss(model.encode(batch).latents, z)
        return criterion([drawn], batch, DiagonalGaussian(z, torch.zeros_like(z)))[0] + 0.1 * latents

    train("AutoencoderTiny", model.parameters(), loss, len(images), minutes)
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)


def make_vit(images: Tensor, labels: Tensor, minutes: float, file: Path) -> None:
    """A classifier; what the decoder will see are its patch features."""
    model = timm.create_model(VIT, num_classes=int(labels.max()) + 1, dynamic_img_size=True, drop_path_rate=0.05)

    def loss(indices: Tensor) -> Tensor:
        batch = F.interpolate(mirrored(images[indices]), VIT_SIDE, mode="bicubic", antialias=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
        return F.cross_entropy(logits.float(), labels[indices], label_smoothing=0.1)

    train(VIT, model.parameters(), loss, len(images), minutes)
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if not name.startswith("head.")}
    head = {"head.weight": torch.zeros(1000, model.embed_dim), "head.bias": torch.zeros(1000)}  # as published files
    with atomic_file(file) as unfinished:
        save_file(weights | head, unfinished)


def make_parts(options: argparse.Namespace) -> None:
    """Whatever part is not there yet."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = read_all(options.data)
    if not (out / "autoencoder").is_dir():
        make_autoencoder(images, options.squeezenet, options.minutes, out / "autoencoder")
    if not (out / "tiny").is_dir():
        make_tiny(images, options.squeezenet, options.minutes / 2, out / "autoencoder", out / "tiny")
    if not (out / "vit.safetensors").is_file():
        make_vit(images, labels, options.minutes, out / "vit.safetensors")


# --- Decoders ---------------------------------------------------------------------------------------------------------


def runs(options: argparse.Namespace) -> dict[str, TokenizerRun]:
    """One decoder on each encoder: width 160, 4 layers, scales 1, 2, 4, 8, f8."""
    base = readings.base(options, seed=0)
    base = replace(base, model=replace(base.model, decoder_width=160, decoder_depth=4))
    parts = Path(options.parts)

    def on(encoder: str, noise: float = 0.0, **settings: Any) -> TokenizerRun:
        model = with_encoder(base.model, encoder, **settings)
        loss = replace(base.loss, kl_weight=0.0)
        return replace(base, model=model, loss=loss, latent_noise=noise, cache_latents=True)

    weights = {"encoder_weights": str(parts / "vit.safetensors")}
    return {
        "the paper's ViT, trained with it, d 8": base,
        "AutoencoderKL, frozen, d 4": on(f"diffusers:{parts / 'autoencoder'}"),
        f"{VIT}, frozen, d 192": on(f"timm:{VIT}", **weights),
        f"{VIT}, frozen, d 192, noise up to 0.8": on(f"timm:{VIT}", 0.8, **weights),
    }


class TinyDecoder(DiffusersTokenizer):
    """What draws previews today: AutoencoderTiny's decoder on the autoencoder's latents."""

    def __init__(self, autoencoder: AutoencoderKL, tiny: AutoencoderTiny):
        super().__init__(autoencoder, SIDE)
        self.tiny = tiny

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents -> images."""
        return self.tiny.decode(z * self.model.config.scaling_factor).sample


def file_name(row: str) -> str:
    """A row's name as that of a file."""
    return row.replace(",", "").replace(" ", "-")


def train_decoders(options: argparse.Namespace) -> None:
    """Train and measure what is missing, then print the table."""
    options.out = Path(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    parts, results = Path(options.parts), {}
    autoencoder = AutoencoderKL.from_pretrained(parts / "autoencoder").eval()
    tiny = AutoencoderTiny.from_pretrained(parts / "tiny").eval()
    own = {
        "AutoencoderKL, its own decoder": DiffusersTokenizer(autoencoder, SIDE).eval(),
        "AutoencoderKL, AutoencoderTiny's decoder": TinyDecoder(autoencoder, tiny).eval(),
    }
    for name, run in runs(options).items():
        file = options.out / file_name(name) / "results.json"
        if not file.is_file():
            tokenizer = train_tokenizer(run, file.parent)
            trained = sum(p.numel() for p in tokenizer.parameters())
            write_json(file, readings.measure(tokenizer, options) | {"parameters": trained})
        results[name] = json.loads(file.read_text())
    for name, model in own.items():
        file = options.out / f"{file_name(name)}.json"
        if not file.is_file():
            write_json(file, readings.measure(model, options))
        results[name] = json.loads(file.read_text())
    write_json(options.out / "results.json", results)
    print(decoder_table(results))


def decoder_table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, a row each."""
    keys = {"SSIM": "ssim", "perceptual": "perceptual[squeeze-caffe]", "FD-SqueezeNet": "fd-squeezenet"}
    keys |= {"FD-MobileNetV2": "fd-mobilenetv2"}
    rows = []
    for name, result in results.items():
        psnr = {int(side): row["psnr"] for side, row in result.get("scales", {}).items()} or {SIDE: result["psnr"]}
        cells = [f"{psnr[side]:.2f}" if side in psnr else "" for side in (8, 16, 32, 64)]
        rows.append([name, *cells, *(f"{result.get(key, math.nan):.4g}" for key in keys.values())])
    return Table(["", "8 px", "16 px", "32 px", "64 px", *keys], rows).markdown()


# --- Time -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def time_previews(options: argparse.Namespace) -> None:
    """preview-sd's decoder up to each scale, the whole decoder of Stable Diffusion's autoencoder, and TAESD's."""
    tokenizer = HieraTok(recipes.get("preview-sd").model).eval()  # decoding reads no encoder
    blocks = (128, 256, 512, 512)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=blocks,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    ).eval()
    tiny = AutoencoderTiny(latent_channels=4).eval()
    for size in options.batch_sizes:
        z = torch.randn(size, 4, 32, 32)
        whole = "AutoencoderKL, 256 px"
        calls: dict[str, Call] = {whole: lambda z=z: autoencoder.decode(z).sample}
        calls["AutoencoderTiny, 256 px"] = lambda z=z: tiny.decode(z).sample
        for k, side in enumerate(tokenizer.config.scales):
            calls[f"ours, {8 * side} px"] = lambda k=k, z=z: tokenizer.decode(z, k)
        machine = Machine(torch.device("cpu"), "fp32", size, options.rounds, compile=False)
        timed = measure(machine, calls, size, dict.fromkeys(calls, whole), f"{size} images")
        print(f"\n{size} image{'s' * (size > 1)}\n{table(timed)}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    parts = commands.add_parser("parts", help="train the small frozen networks")
    parts.add_argument("--data", required=True, help="training images")
    parts.add_argument("--squeezenet", required=True, help="weights of the perceptual distance")
    parts.add_argument("--minutes", type=float, default=16, help="for each part (the tiny decoder: half)")
    parts.add_argument("--out", default="encoders/parts")
    parts.set_defaults(run=make_parts)
    decoders = commands.add_parser("train", help="train a decoder on each, and measure it")
    for name, text in (("data", "training images"), ("val", "held-out images")):
        decoders.add_argument(f"--{name}", required=True, help=text)
    decoders.add_argument("--squeezenet", required=True, help="weights of the perceptual trunk and of FD-SqueezeNet")
    decoders.add_argument("--mobilenet", required=True, help="weights of FD-MobileNetV2")
    decoders.add_argument("--parts", default="encoders/parts", help="where `parts` wrote them")
    decoders.add_argument("--images", default=24_000, type=int, help="of training, each run")
    decoders.add_argument("--out", default="encoders/decoders")
    decoders.set_defaults(run=train_decoders)
    timing = commands.add_parser("time", help="time previews")
    timing.add_argument("--batch_sizes", type=int, nargs="+", default=[1])
    timing.add_argument("--rounds", type=int, default=5)
    timing.set_defaults(run=time_previews)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
