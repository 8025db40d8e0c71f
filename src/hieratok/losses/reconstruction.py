"""Stage 1's loss: L1, MSE and a perceptual distance at every scale, and KL (eqs. 3, 4, 8, 9)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hieratok.core.plugins import LOSSES
from hieratok.losses.config import LossConfig
from hieratok.losses.lpips import PerceptualLoss
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.scales import Scales, area_pool


class ReconstructionLoss(nn.Module):
    """Compares every scale's reconstruction with the image at that size.

    Args:
        config: weights, reductions and the perceptual trunk.
        scales: token grids at the training size.

    Attributes:
        finest_share: the finest scale's share in the pixel terms, 1 for a single scale. Losses on the finest scale or
            on z (KL, GAN, vf) are multiplied by it: their weights relative to the finest scale's reconstruction then
            do not depend on the number of scales. [ours]

    Raises:
        ValueError: `scale_weights` has another length than there are scales.
        FileNotFoundError: the trunk's weights are missing.
    """

    def __init__(self, config: LossConfig, scales: Scales):
        super().__init__()
        self.config = config
        weights = config.scale_weights or (1.0,) * len(scales)
        if len(weights) != len(scales):
            raise ValueError(f"loss.scale_weights has {len(weights)} entries for {len(scales)} scales")
        tokens = scales.lengths if config.pixel_reduction == "tokens" else (1,) * len(scales)
        self.pixel_shares = shares([weight * n for weight, n in zip(weights, tokens)])
        finest_alone = [0.0] * (len(scales) - 1) + [1.0]
        self.perceptual_shares = {
            "mean": shares(weights),
            "sum": [weight * len(scales) for weight in shares(weights)],
            "finest": finest_alone,
        }[config.perceptual_reduction]
        self.finest_share = self.pixel_shares[-1]
        self.perceptual = None
        if config.perceptual_weight:
            self.perceptual = PerceptualLoss(
                config.trunk, config.trunk_weights, config.head_weights, random_weights=config.random_trunk
            )

    def forward(
        self, pyramid: list[Tensor], images: Tensor, posterior: DiagonalGaussian
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss, the finest scale's part of it, and its terms.

        Args:
            pyramid: reconstructions (B, 3, H_k, W_k), coarse to fine.
            images: (B, 3, H, W) in [-1, 1].
            posterior: of the images.

        Returns:
            The scalar loss; the finest scale's contribution to it, the reference of adaptive weights of other losses;
            and detached, unweighted scalars by name: `l1`, `mse`, the perceptual
            distance's name (reduced over scales), `l1/16`, `l1/32`, ... (per scale, named by its height in pixels),
            `kl` in nats per image, and the plugins' losses.
        """
        c = self.config
        terms: dict[str, Tensor] = {}
        parts = []
        for reconstruction, pixel_share, perceptual_share in zip(
            pyramid, self.pixel_shares, self.perceptual_shares, strict=True
        ):
            height, width = reconstruction.shape[-2:]
            target = area_pool(images, (height, width))  # T_k(I), eqs. 8 and 9
            reconstruction = reconstruction.to(images.dtype)
            error = reconstruction - target
            values = [
                ("l1", c.l1_weight, pixel_share, error.abs().mean()),
                ("mse", c.mse_weight, pixel_share, error.square().mean()),
            ]
            if self.perceptual is not None and perceptual_share:
                distance = self.perceptual(reconstruction, target).mean()
                values.append((self.perceptual.name, c.perceptual_weight, perceptual_share, distance))
            parts.append(torch.stack([weight * share * value for _, weight, share, value in values]).sum())
            for name, _, share, value in values:
                terms[f"{name}/{height}"] = value.detach()
                terms[name] = terms.get(name, 0) + share * value.detach()
        finest = parts[-1]
        for name, weight in c.plugin_weights().items():
            value = LOSSES[name]([x.to(images.dtype) for x in pyramid], images)
            if not (isinstance(value, Tensor) and value.ndim == 0):
                raise ValueError(f"the plugin's loss {name} must give a scalar tensor")
            parts.append(weight * value)
            terms[name] = value.detach()
        kl = posterior.kl().mean()
        terms["kl"] = kl.detach()
        return torch.stack(parts).sum() + self.finest_share * c.kl_weight * kl, finest, terms


def shares(weights: Sequence[float]) -> list[float]:
    """Weights scaled to a sum of 1."""
    return [weight / sum(weights) for weight in weights]
