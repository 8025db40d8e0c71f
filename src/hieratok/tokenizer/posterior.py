"""The latent's distribution."""

import torch
from torch import Tensor


class DiagonalGaussian:
    """Independent normals, one per latent value, from an encoder's output.

    Args:
        mean: (B, d, h, w).
        logvar: (B, d, h, w), logarithm of the variance; clamped to [-30, 20], as in latent diffusion.
        image_size: (H, W) of the images before they were padded to whole patches: `decode` cuts back to it.
    """

    def __init__(self, mean: Tensor, logvar: Tensor, image_size: tuple[int, int] | None = None):
        self.image_size = image_size
        at_least_float32 = torch.promote_types(mean.dtype, torch.float32)  # under bf16 autocast too
        self.mean = mean.to(at_least_float32)
        self.logvar = logvar.to(at_least_float32).clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One sample (B, d, h, w), differentiable in mean and log-variance."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:
        """The mean (B, d, h, w), which evaluation decodes."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from N(0, I) in nats, summed over the latent dimensions: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)
