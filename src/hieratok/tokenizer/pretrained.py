"""Tokenizers from files: ours, or an autoencoder of diffusers with the same interface."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hieratok.core import checkpoint
from hieratok.core.files import read_json_table
from hieratok.tokenizer import autoencoders
from hieratok.tokenizer.model import HieraTok, TokenizerConfig
from hieratok.tokenizer.posterior import DiagonalGaussian


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
    """diffusers' AutoencoderKL (SD-VAE, VA-VAE), AutoencoderDC (DC-AE) or AutoencoderTiny (TAESD) with the face of a
    `HieraTok` of one scale.

    Latents are raw: no scaling factor is applied, as generators normalise by measured statistics.

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
        channels = autoencoders.latent_channels(model.config)
        size = image_size or model.config.get("sample_size")
        if not isinstance(size, int):
            raise ValueError(f"this {type(model).__name__} does not say how large its images are: give --size")
        self.config = OneScaleConfig(size, autoencoders.patch_size(model.config), channels)
        self.register_buffer("latent_mean", torch.full((channels,), torch.nan))
        self.register_buffer("latent_std", torch.full((channels,), torch.nan))

    @property
    def encoder_sha256(self) -> str:
        """Of all that decides what the latents are."""
        return checkpoint.tensors_sha256(autoencoders.encoding_parts(self.model))

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Images (B, 3, H, W) in [-1, 1], of sides divisible by f -> the distribution of z (B, d, h, w)."""
        return DiagonalGaussian(*autoencoders.moments(self.model, images))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, d, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.model.decode(z).sample

    def decode_pyramid(self, z: Tensor) -> list[Tensor]:
        """The one scale."""
        return [self.decode(z)]

    def decode_progressive(self, z: Tensor) -> Iterator[Tensor]:
        """The one scale."""
        yield self.decode(z)


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
    kind = autoencoders.class_of(source)
    if kind is not None:
        model = autoencoders.load(source, kind)
        if latent_size is not None:
            image_size = latent_size * autoencoders.patch_size(model.config)
        return DiffusersTokenizer(model, image_size).to(device).eval()
    tokenizer = HieraTok.from_pretrained(source, device=device)
    if image_size not in (None, tokenizer.config.image_size):
        raise ValueError(f"{source} was trained on images of {tokenizer.config.image_size} px, not {image_size}")
    return tokenizer


def describe_tokenizer(source: str) -> tuple[str, dict[str, Any]]:
    """SHA-256 of a tokenizer's weights, and its configuration as written."""
    folder = checkpoint.find(source)
    config = read_json_table(folder / checkpoint.CONFIG)
    if autoencoders.class_of(source) is not None:
        return checkpoint.file_sha256(folder / autoencoders.WEIGHTS), config
    checkpoint.load_config(folder, "hieratok", TokenizerConfig)
    del config["model_type"]
    return checkpoint.file_sha256(folder / checkpoint.WEIGHTS), config
