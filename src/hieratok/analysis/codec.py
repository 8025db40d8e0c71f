"""Any image tokenizer as functions for the analysis, and the latents of a set of images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hieratok.core.pixels import to_float
from hieratok.core.seeding import generator
from hieratok.tokenizer.autoencoders import LEAST_LOGVAR

# images (B, 3, H, W) in [-1, 1] -> mean (B, d, h, w) and log-variance of the same shape; None if not variational
Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]
# z (B, d, h, w) -> images (B, 3, H, W), about [-1, 1]
Decode = Callable[[Tensor], Tensor]
# z (B, d, h, w) -> an image per scale, coarse to fine
DecodePyramid = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Codec:
    """A tokenizer for the analysis. All tensors are float32 on the CPU.

    The functions may be any; `codec_of` makes them from a model of this package or of diffusers.
    """

    encode: Encode
    decode: Decode
    decode_pyramid: DecodePyramid | None = None
    """For a tokenizer of several scales, else None."""


@dataclass(frozen=True)
class Latents:
    """The latents of N images."""

    mean: Tensor
    """(N, d, h, w)."""
    logvar: Tensor | None
    """(N, d, h, w); None for a tokenizer without a posterior."""

    def sample(self, seed: int) -> Tensor:
        """One sample of every posterior, (N, d, h, w); the mean if there is no posterior."""
        if self.logvar is None:
            return self.mean
        noise = torch.randn(self.mean.shape, generator=generator("posterior", seed))
        return self.mean + torch.exp(0.5 * self.logvar) * noise


def codec_of(model: Any) -> Codec:
    """The codec of a `HieraTok`, or of an autoencoder of diffusers such as AutoencoderKL or AutoencoderDC.

    Args:
        model: on any device and of any precision. Its `encode` returns something with `latent_dist`, `latent` or
            `latents`, or a distribution with `mean` and `logvar`, or a tensor; its `decode` a tensor or something with
            `sample`. Latents are raw: no scaling factor is applied.
    """
    parameter = next(model.parameters())
    there = {"device": parameter.device, "dtype": parameter.dtype}

    def here(x: Tensor) -> Tensor:
        return x.float().cpu()

    @torch.no_grad()
    def encode(images: Tensor) -> tuple[Tensor, Tensor | None]:
        output = model.encode(images.to(**there))
        padded_from = getattr(output, "image_size", None)  # a HieraTok pads, but here pixels are compared
        if padded_from and any(side % model.config.patch_size for side in padded_from):
            raise ValueError(f"image sides {padded_from} must be multiples of the patch size {model.config.patch_size}")
        for name in ("latent_dist", "latent", "latents"):
            output = getattr(output, name, output)
        if isinstance(output, Tensor):
            return here(output), None
        mean, logvar = here(output.mean), here(output.logvar)
        return mean, logvar if (logvar > LEAST_LOGVAR).any() else None

    @torch.no_grad()
    def decode(z: Tensor) -> Tensor:
        output = model.decode(z.to(**there))
        return here(output if isinstance(output, Tensor) else output.sample)

    @torch.no_grad()
    def decode_pyramid(z: Tensor) -> list[Tensor]:
        return [here(image) for image in model.decode_pyramid(z.to(**there))]

    return Codec(encode, decode, decode_pyramid if hasattr(model, "decode_pyramid") else None)


def encode_all(encode: Encode, batches: Iterable[tuple[Sequence[str], Tensor]]) -> Latents:
    """The latents of every image.

    Args:
        encode: of a codec.
        batches: names, and uint8 (B, 3, H, W) of one size.

    Raises:
        ValueError: no images; latents that are not maps, not finite (names the image) or of different shapes.
    """
    means, logvars = [], []
    for names, images in batches:
        mean, logvar = encode(to_float(images))
        check_latents(mean, names, tuple(means[0].shape[1:]) if means else None)
        if logvar is not None:
            check_latents(logvar, names, tuple(mean.shape[1:]))
            logvars.append(logvar)
        means.append(mean)
    if not means:
        raise ValueError("no images to encode")
    return Latents(torch.cat(means), torch.cat(logvars) if logvars else None)


def check_latents(latents: Tensor, names: Sequence[str], shape: tuple[int, ...] | None) -> None:
    """Raise ValueError unless `latents` are finite maps (B, d, h, w), one for each name, of the given (d, h, w)."""
    if latents.ndim != 4 or len(latents) != len(names):
        raise ValueError(f"{names[0]}: latents must have shape ({len(names)}, d, h, w), not {tuple(latents.shape)}")
    if shape is not None and tuple(latents.shape[1:]) != shape:
        raise ValueError(f"{names[0]}: latents are {tuple(latents.shape[1:])} where {shape} is expected")
    finite = latents.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"{names[int((~finite).nonzero()[0])]}: its latents hold NaN or infinite values")
