"""The latent channels: moments, effective number, and KL in nats."""

import torch
from torch import Tensor

ACTIVE_VARIANCE = 0.01  # of the posterior mean; a channel below it carries nothing about the image (Burda et al. 2016)


def channel_moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the channels over images and positions, float64.

    Args:
        latents: (N, d, h, w).
    """
    num_values = latents.shape[0] * latents.shape[2] * latents.shape[3]
    mean = latents.mean((0, 2, 3), dtype=torch.float64)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in latents.split(256):  # keeps the float64 copy small
        centred = part.double().transpose(0, 1).flatten(1) - mean[:, None]  # (d, B h w)
        scatter += centred @ centred.T
    return mean, scatter / num_values


def standardize(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(N, d, h, w) -> every channel standardised with the moments (d,). A constant channel becomes 0.

    Raises:
        ValueError: moments of another number of channels.
    """
    d = latents.shape[1]
    if mean.shape != (d,) or std.shape != (d,):
        raise ValueError(f"latents of {d} channels cannot be standardised with statistics of {len(mean)}")
    scale = torch.where(std > 0, std, 1.0)
    return (latents - mean.to(latents)[:, None, None]) / scale.to(latents)[:, None, None]


def correlation(covariance: Tensor) -> Tensor:
    """Covariance (d, d) of the latents -> that of the standardised latents; zero for constant channels."""
    std = covariance.diagonal().sqrt()
    scale = torch.where(std > 0, std, 1.0)
    return covariance / scale[:, None] / scale[None, :]


def _shares(covariance: Tensor) -> Tensor:
    """Share of the variance along each eigenvector."""
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    if eigenvalues.sum() == 0:
        raise ValueError("the latents are constant: their covariance is zero")
    return eigenvalues / eigenvalues.sum()


def effective_rank(covariance: Tensor) -> float:
    """exp(-sum p ln p) of the eigenvalues' shares p (Roy and Vetterli 2007): between 1 and d.

    Raises:
        ValueError: the covariance is zero.
    """
    return float(torch.special.entr(_shares(covariance)).sum().exp())


def participation_ratio(covariance: Tensor) -> float:
    """(sum lambda)^2 / sum lambda^2 of the eigenvalues: between 1 and d, at most the effective rank.

    Raises:
        ValueError: the covariance is zero.
    """
    return float(1 / _shares(covariance).square().sum())


def channel_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of the posterior from N(0, 1) in nats, summed over a channel's positions.

    Args:
        mean, logvar: (N, d, h, w).

    Returns:
        (N, d); the KL loss is the mean over images of its sum over d.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((2, 3))
