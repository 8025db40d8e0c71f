"""Tokenizers from files: ours, or an autoencoder of diffusers with the same interface."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hieratok.core import checkpoint
from hieratok.core.extras import needs_extras
from hieratok.core.files import check_regular, read_json_table, shown
from hieratok.tokenizer.model import HieraTok, TokenizerConfig
from hieratok.tokenizer.posterior import DiagonalGaussian

DIFFUSERS = ("AutoencoderKL", "AutoencoderDC")
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
MOST_LAYERS, MOST_NUMBER = 100, 1_000_000  # limits in a config: larger values are wrong
LEAST_LOGVAR = -30.0  # the posterior's clamp: a deviation of 3e-7, practically zero


@dataclass(frozen=True)
class OneScaleConfig:
    """The part of `TokenizerConfig` that generators and commands use.

    Raises:
        ValueError: sizes that do not fit together.
    """

    image_size: int
    """Side of the images in pixels."""
    patch_size: int
    """f: pixels per latent."""
    latent_channels: int
    """d."""

    def __post_init__(self):
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} must be a positive multiple of {self.patch_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the latent map."""
        return (self.image_size // self.patch_size, self.image_size // self.patch_size)

    @property
    def scales(self) -> tuple[int, ...]:
        """The single scale."""
        return self.grid[:1]


class DiffusersTokenizer(nn.Module):
    """diffusers' AutoencoderKL (SD-VAE, VA-VAE) or AutoencoderDC (DC-AE) with the interface of a one-scale `HieraTok`.

    Latents are raw: no scaling factor is applied, as generators normalise by measured statistics. A deterministic
    autoencoder's log-variance is the smallest possible.

    Args:
        model: the autoencoder.
        image_size: side of the images; None: the autoencoder's training size.

    Raises:
        ValueError: no size, or one that does not fit.
    """

    latent_mean: Tensor
    """(d,): NaN; folders of latents have their own statistics."""
    latent_std: Tensor

    def __init__(self, model: Any, image_size: int | None = None):
        super().__init__()
        self.model = model
        channels = model.config.latent_channels
        size = image_size or model.config.get("sample_size")
        if not isinstance(size, int):
            raise ValueError(f"this {type(model).__name__} does not say how large its images are: give --size")
        self.config = OneScaleConfig(size, patch_size(model), channels)
        self.register_buffer("latent_mean", torch.full((channels,), torch.nan))
        self.register_buffer("latent_std", torch.full((channels,), torch.nan))

    @property
    def encoder(self) -> nn.Module:
        """The part that the latents depend on."""
        parts = {name: getattr(self.model, name, None) for name in ("encoder", "quant_conv")}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Images (B, 3, H, W) in [-1, 1], of sides divisible by f -> the distribution of z (B, d, h, w)."""
        output = self.model.encode(images)
        if hasattr(output, "latent_dist"):
            return DiagonalGaussian(output.latent_dist.mean, output.latent_dist.logvar)
        return DiagonalGaussian(output.latent, torch.full_like(output.latent, LEAST_LOGVAR))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, d, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.model.decode(z).sample

    def decode_pyramid(self, z: Tensor) -> list[Tensor]:
        """The one scale."""
        return [self.decode(z)]

    def decode_progressive(self, z: Tensor) -> Iterator[Tensor]:
        """The one scale."""
        yield self.decode(z)


def patch_size(model: Any) -> int:
    """f of an autoencoder of diffusers, which halves the image after every block but the last."""
    name = "block_out_channels" if "block_out_channels" in model.config else "encoder_block_out_channels"
    return 2 ** (len(model.config[name]) - 1)


Tokenizer = HieraTok | DiffusersTokenizer


def load_tokenizer(
    source: str, device: str | torch.device = "cpu", image_size: int | None = None, latent_size: int | None = None
) -> Tokenizer:
    """A tokenizer of ours by `HieraTok.from_pretrained`, or an autoencoder of diffusers from its folder.

    Args:
        source: a run, a tokenizer's folder, a hub id of ours, or a folder written by diffusers.
        device: where to put it.
        image_size: side of the images, for a convolutional autoencoder, which takes any; None: its own size.
        latent_size: side of the latents instead, if a generator's is known. Not used for ours.

    Returns:
        The tokenizer in evaluation mode, float32.

    Raises:
        FileNotFoundError, ValueError: nothing there, files that do not fit, or an image size that is not its own.
    """
    kind = diffusers_class(source)
    if kind is not None:
        model = load_diffusers(source, kind)
        if latent_size is not None:
            image_size = latent_size * patch_size(model)
        return DiffusersTokenizer(model, image_size).to(device).eval()
    tokenizer = HieraTok.from_pretrained(source, device=device)
    if image_size not in (None, tokenizer.config.image_size):
        raise ValueError(f"{source} was trained on images of {tokenizer.config.image_size} px, not {image_size}")
    return tokenizer


def diffusers_class(source: str) -> str | None:
    """The class in a folder's `config.json`, if diffusers wrote it.

    Raises:
        ValueError: not JSON, or a class other than the supported autoencoders.
    """
    path = Path(source) / checkpoint.CONFIG
    if not path.is_file():
        return None
    kind = read_json_table(path).get("_class_name")
    if kind is not None and kind not in DIFFUSERS:
        raise ValueError(
            f"{shown(path)} describes a {shown(kind)}; of diffusers' models {' and '.join(DIFFUSERS)} can be used"
        )
    return kind


def load_diffusers(source: str, kind: str) -> Any:
    """diffusers' own model from a local folder, never downloaded and never unpickled, in evaluation mode.

    Raises:
        ValueError: diffusers is not installed, or the files do not fit.
    """
    with needs_extras():
        import diffusers
    where, config = f"{source} cannot be loaded as {kind}", read_json_table(Path(source) / checkpoint.CONFIG)
    for name, value in config.items():
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int | float)]
        most = MOST_LAYERS if name.endswith("layers_per_block") else MOST_NUMBER
        if any(n > most for n in numbers) or (isinstance(value, list) and len(value) > MOST_LAYERS):
            raise ValueError(f"{where}: {name} {shown(value)[:80]} in its {checkpoint.CONFIG} is out of range")
    check_regular(Path(source) / DIFFUSERS_WEIGHTS)
    try:
        return getattr(diffusers, kind).from_pretrained(source, use_safetensors=True, local_files_only=True).eval()
    except Exception as error:  # diffusers raises errors of any type for a wrong config or file
        raise ValueError(f"{where}: {shown(' '.join(str(error).split()))[:300]}") from error


def describe_tokenizer(source: str) -> tuple[str, dict[str, Any]]:
    """SHA-256 of a tokenizer's weights, and its configuration as written."""
    folder = checkpoint.find(source)
    config = read_json_table(folder / checkpoint.CONFIG)
    if diffusers_class(source) is not None:
        return checkpoint.file_sha256(folder / DIFFUSERS_WEIGHTS), config
    checkpoint.load_config(folder, "hieratok", TokenizerConfig)
    del config["model_type"]
    return checkpoint.file_sha256(folder / checkpoint.WEIGHTS), config
