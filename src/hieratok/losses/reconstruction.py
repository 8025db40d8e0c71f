"""Stage 1's loss: L1, MSE and a perceptual distance at every scale, and KL (eqs. 3, 4, 8, 9)."""

from dataclasses import dataclass

from torch import Tensor, nn

from hieratok.losses.lpips import PerceptualLoss, TrunkName
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.scales import area_pool


@dataclass(frozen=True)
class LossConfig:
    """Weights of stage 1's losses (paper, table 9).

    Raises:
        ValueError: a negative weight.
    """

    l1_weight: float = 1.0
    """l_1: mean absolute error."""
    mse_weight: float = 0.4
    """l_2: mean squared error."""
    perceptual_weight: float = 1.0
    """l_p: perceptual distance; 0 needs no trunk."""
    kl_weight: float = 1e-6
    """l_kl: KL divergence, summed over latent dimensions, averaged over the batch."""
    scale_weights: tuple[float, ...] | None = None
    """One weight per scale, coarse to fine; the losses are their weighted average. None: all alike."""
    trunk: TrunkName = "vgg"
    """The network of the perceptual distance: vgg, alex, squeeze (LPIPS), or squeeze-caffe (LPIPS-like)."""
    trunk_weights: str | None = None
    """File with the trunk's weights. None: torchvision's cache."""
    head_weights: str | None = None
    """File with LPIPS's linear heads. None: those of the installed lpips package."""
    random_trunk: bool = False
    """Train on an untrained trunk: for tests only."""

    def __post_init__(self):
        if self.scale_weights is not None:
            object.__setattr__(self, "scale_weights", tuple(self.scale_weights))
            if any(w < 0 for w in self.scale_weights) or not sum(self.scale_weights):
                raise ValueError(f"loss.scale_weights must be non-negative, not all 0: {list(self.scale_weights)}")
        for name in ("l1_weight", "mse_weight", "perceptual_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} must not be negative, it is {getattr(self, name)}")


class ReconstructionLoss(nn.Module):
    """Compares every scale's reconstruction with the image at that size.

    Args:
        config: weights and the perceptual trunk.
        num_scales: K.

    Raises:
        ValueError: `scale_weights` has another length than K.
        FileNotFoundError: the trunk's weights are not there.
    """

    def __init__(self, config: LossConfig, num_scales: int):
        super().__init__()
        self.config = config
        weights = config.scale_weights or (1.0,) * num_scales
        if len(weights) != num_scales:
            raise ValueError(f"loss.scale_weights has {len(weights)} entries for {num_scales} scales")
        # [ours] scales weigh the same and are averaged, so that single- and multi-scale losses have one magnitude
        self.scale_weights = [weight / sum(weights) for weight in weights]
        self.perceptual = None
        if config.perceptual_weight:
            self.perceptual = PerceptualLoss(
                config.trunk, config.trunk_weights, config.head_weights, random_weights=config.random_trunk
            )

    def forward(
        self, pyramid: list[Tensor], images: Tensor, posterior: DiagonalGaussian
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts.

        Args:
            pyramid: reconstructions (B, 3, H_k, W_k), coarse to fine.
            images: (B, 3, H, W) in [-1, 1].
            posterior: of the images.

        Returns:
            The scalar loss, and detached, unweighted scalars by name: `l1`, `mse`, the perceptual distance's name
            (weighted means over scales), `l1/16`, `l1/32`, ... (per scale, named by its height in pixels), and `kl`
            in nats per image.
        """
        c = self.config
        weights = {"l1": c.l1_weight, "mse": c.mse_weight}
        if self.perceptual is not None:
            weights[self.perceptual.name] = c.perceptual_weight
        terms: dict[str, Tensor] = {}
        total = images.new_zeros(())
        for reconstruction, scale_weight in zip(pyramid, self.scale_weights, strict=True):
            size = reconstruction.shape[-2:]
            target = area_pool(images, (size[0], size[1]))  # T_k(I), eqs. 8 and 9
            for name, value in self._at_one_scale(reconstruction.to(images.dtype), target).items():
                total = total + scale_weight * weights[name] * value
                terms[f"{name}/{size[0]}"] = value.detach()
                terms[name] = terms.get(name, 0) + scale_weight * value.detach()
        kl = posterior.kl().mean()
        terms["kl"] = kl.detach()
        return total + c.kl_weight * kl, terms

    def _at_one_scale(self, reconstruction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Means over pixels (and over the batch)."""
        error = reconstruction - target
        values = {"l1": error.abs().mean(), "mse": error.square().mean()}
        if self.perceptual is not None:
            values[self.perceptual.name] = self.perceptual(reconstruction, target).mean()
        return values
