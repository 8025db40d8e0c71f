"""A decoder's robustness to noise in the latents, as a generator's latents differ from the encoder's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hieratok.analysis.codec import Decode
from hieratok.analysis.intervals import Quantity
from hieratok.core.pixels import to_uint8
from hieratok.core.seeding import generator
from hieratok.evaluation.pixels import psnr

SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def noise_psnr(
    decode: Decode, z: Tensor, images: Tensor, noise: Tensor, std: Tensor, sigmas: Sequence[float] = SIGMAS
) -> dict[Quantity, Tensor]:
    """PSNR in dB of D(z + sigma eps) against the image.

    Args:
        decode: z -> images.
        z: (B, d, h, w).
        images: (B, 3, H, W) in [-1, 1].
        noise: eps, of z's shape; the same for every sigma.
        std: of the latent channels, (d,): sigma is in standard deviations of each.
        sigmas: levels of noise.

    Returns:
        PSNR for each sigma, (B,); infinite for identical images.

    Raises:
        ValueError: an image that is not finite.
    """
    originals = to_uint8(images)
    scaled = noise * std.to(z)[:, None, None]
    return {Quantity("noise_psnr", sigma): psnr(to_uint8(decode(z + sigma * scaled)), originals) for sigma in sigmas}


def seeded_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise of a shape, on the CPU, independent of batches."""
    return torch.randn(*shape, generator=generator("noise", seed))
