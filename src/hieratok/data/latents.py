"""Latents as data: their statistics."""

from typing import Any

import torch
from torch import Tensor


class LatentStatistics:
    """Mean and standard deviation of every latent channel, over images and positions, as float64 sums.

    Of z as it is sampled in training, so the variance is that of the means plus the mean of the variances. [ours]

    Args:
        channels: d.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.sums = torch.zeros(2, channels, dtype=torch.float64)  # of z, and of its square

    def update(self, mean: Tensor, logvar: Tensor) -> None:
        """Add a batch's moments, each (B, d, h, w)."""
        mean, variance = mean.double().cpu(), logvar.double().exp().cpu()
        self.sums += torch.stack((mean.sum((0, 2, 3)), (mean.square() + variance).sum((0, 2, 3))))
        self.count += mean[:, 0].numel()

    def state(self) -> dict[str, Any]:
        """Everything collected, for `merge_state` in another process."""
        return {"count": self.count, "sums": self.sums}

    def merge_state(self, state: dict[str, Any]) -> None:
        """Add what another process collected."""
        self.count += state["count"]
        self.sums = self.sums + state["sums"]

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float64 (d,) each.

        Raises:
            ValueError: nothing was collected, or it is not finite.
        """
        if not self.count:
            raise ValueError("latent statistics of no images")
        mean, square = self.sums / self.count
        std = (square - mean.square()).clamp(min=0).sqrt()
        if not torch.isfinite(std).all():
            raise ValueError("latents are not finite: no statistics")
        return mean, std
