"""The multi-scale decoder on latents that already exist: two frozen encoders, trained here first, and our own beside.

    python benchmarks/encoders.py parts --data 'imagenette/train-*.tar' --squeezenet squeezenet1_1-caffe-fp16.npz

writes small parts in their real layouts, as nothing can be downloaded where this project is tested: an `AutoencoderKL`
of diffusers, trained as latent diffusion's but without a GAN; an `AutoencoderTiny` whose decoder is distilled on its
latents, as TAESD's; a timm ViT, trained on the labels. 64 px, one thread, `--minutes` each. What is done stays.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn

from hieratok.core.checkpoint import atomic_file, atomic_folder
from hieratok.core.progress import progress
from hieratok.data.images import evaluation_batches, open_source, to_float
from hieratok.losses.reconstruction import LossConfig, ReconstructionLoss
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.scales import Scales

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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    parts = commands.add_parser("parts", help="train the small frozen networks")
    parts.add_argument("--data", required=True, help="training images")
    parts.add_argument("--squeezenet", required=True, help="weights of the perceptual distance")
    parts.add_argument("--minutes", type=float, default=20, help="for each part (the tiny decoder: half)")
    parts.add_argument("--out", default="encoders/parts")
    parts.set_defaults(run=make_parts)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
