"""The vision-foundation loss of VA-VAE (arXiv 2501.01423).

    z' = W z                                                           1 x 1, without bias, learned with the tokenizer
    L = mean_i  relu(1 - m_cos - cos(f_i, z'_i))                       each position of z' is like the model's feature,
      + mean_ij relu(|cos(z'_i, z'_j) - cos(f_i, f_j)| - m_dist)       and resembles the others as the features do

f: the frozen model's patch features on z's grid; i, j: positions of one image. HieraTok's paper adds this loss when
scaling up and states no setting. VA-VAE's released schedule, by epochs: weight 0.5 without margins, then 0.1, then 0.1
with m_dist 0.25 and m_cos 0.5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok.losses.config import VFConfig
from hieratok.tokenizer.foundation import FoundationModel

VF_MAX_WEIGHT = 1e8
"""VA-VAE's bound of this loss's adaptive weight, `adversarial.adaptive_weight` at the encoder's last layer."""


class VFLoss(nn.Module):
    """Pulls latents towards a foundation model's features.

    Only the projection W is trained and saved; the tokenizer's optimiser must include it.

    Args:
        config: the model and the margins; the caller applies `weight` and `adaptive`.
        latent_channels: d.

    Raises:
        ValueError: no such model, or weights that do not fit.
        FileNotFoundError: no weights.
    """

    def __init__(self, config: VFConfig, latent_channels: int):
        super().__init__()
        self.config = config
        self.model = FoundationModel(
            "vf.model", config.model, config.model_weights, config.random_model, normalize=config.normalize
        )
        self.project = nn.Conv2d(latent_channels, self.model.width, kernel_size=1, bias=False)

    def forward(self, z: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts.

        Args:
            z: latents (B, d, h, w).
            images: the images that z encodes, (B, 3, H, W) in [-1, 1]; get no gradient.

        Returns:
            The scalar loss, unweighted, and its two parts, detached scalars: `vf_cosine` and `vf_distance`.

        Raises:
            ValueError: another shape.
        """
        if z.ndim != 4 or z.shape[1] != self.project.in_channels or z.shape[0] != images.shape[0]:
            wanted = (images.shape[0], self.project.in_channels, "h", "w")
            raise ValueError(f"z must be {wanted} for {images.shape[0]} images, not {tuple(z.shape)}")
        h, w = z.shape[-2:]
        size = (h * self.model.patch_size, w * self.model.patch_size)  # so that the model's grid is that of z
        with torch.no_grad():
            (features,) = self.model(images, size, [self.model.depth - 1])  # (B, C, h, w)

        with torch.autocast(z.device.type, enabled=False):  # bf16 cosines would have errors of 0.004
            dtype = self.project.weight.dtype
            f = F.normalize(features.to(dtype).flatten(2), dim=1)  # (B, C, N), of unit length
            z = F.normalize(self.project(z.to(dtype)).flatten(2), dim=1)  # z', the same
            cosines = (f * z).sum(dim=1)  # (B, N)
            differences = (z.mT @ z - f.mT @ f).abs()  # (B, N, N)
            cosine = F.relu(1 - self.config.cos_margin - cosines).mean()
            distance = F.relu(differences - self.config.distance_margin).mean()
        return cosine + distance, {"vf_cosine": cosine.detach(), "vf_distance": distance.detach()}
