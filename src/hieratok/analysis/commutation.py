"""Whether decoding commutes with reducing and rotating: appendix B's approximation, and EQ-VAE's equivariance.

Functions take one batch and give one number per image for each quantity; `Quantity.key` is its name in `metrics.json`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hieratok.analysis.codec import Decode, DecodePyramid, Encode
from hieratok.analysis.intervals import Quantity
from hieratok.tokenizer.scales import area_pool


def commutation_error(coarse: Tensor, full: Tensor) -> Tensor:
    """e_k = |D(T_k z) - T_k D(z)|^2 / |T_k D(z)|^2 of each image (appendix B, eq. 12).

    Args:
        coarse: D(T_k z), (B, 3, H_k, W_k).
        full: D(z), (B, 3, H, W).

    Returns:
        (B,).
    """
    pooled = area_pool(full, (coarse.shape[-2], coarse.shape[-1]))
    return (coarse - pooled).square().flatten(1).sum(1) / pooled.square().flatten(1).sum(1)


def target_mse(coarse: Tensor, images: Tensor) -> Tensor:
    """Mean of |D(T_k z) - T_k x|^2 over pixels (eq. 10): (B, 3, H_k, W_k) and (B, 3, H, W) -> (B,).

    Reported with the commutation error, which is also small for a blurred reconstruction and then means nothing.
    """
    return (coarse - area_pool(images, (coarse.shape[-2], coarse.shape[-1]))).square().flatten(1).mean(1)


def commutation(decode: Decode, z: Tensor, images: Tensor, grids: list[tuple[int, int]]) -> dict[Quantity, Tensor]:
    """Commutation of any tokenizer: z area-pooled to each grid and decoded on its own.

    Args:
        decode: z -> images.
        z: (B, d, h, w).
        images: x, (B, 3, H, W) in [-1, 1].
        grids: (h_k, w_k) of the pooled latents, without the finest.

    Returns:
        `commutation_error/{height}px` and `commutation_target_mse/{height}px`, (B,) each.
    """
    full = decode(z)
    return _errors("commutation", [decode(area_pool(z, grid)) for grid in grids], full, images)


def pyramid_commutation(decode_pyramid: DecodePyramid, z: Tensor, images: Tensor) -> dict[Quantity, Tensor]:
    """Commutation of a multi-scale tokenizer, whose decoder pools z itself: each scale of one pyramid with its finest.

    This is what HieraTok trains (eqs. 8, 9). Returns `pyramid_error/{height}px` and `pyramid_target_mse/{height}px`.
    """
    *coarse, full = decode_pyramid(z)
    return _errors("pyramid", coarse, full, images)


def _errors(name: str, coarse: list[Tensor], full: Tensor, images: Tensor) -> dict[Quantity, Tensor]:
    errors = {Quantity(f"{name}_error", f"{x.shape[-2]}px"): commutation_error(x, full) for x in coarse}
    return errors | {Quantity(f"{name}_target_mse", f"{x.shape[-2]}px"): target_mse(x, images) for x in coarse}


def halve(x: Tensor) -> Tensor:
    """(B, C, H, W) -> half the size, by area."""
    return area_pool(x, (x.shape[-2] // 2, x.shape[-1] // 2))


# tau of EQ-VAE (arXiv 2502.09509), for images and latents
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotate_90": lambda x: torch.rot90(x, 1, (-2, -1)),
    "rotate_180": lambda x: torch.rot90(x, 2, (-2, -1)),
    "scale_half": halve,
}


def equivariance(encode: Encode, decode: Decode, z: Tensor, images: Tensor, std: Tensor) -> dict[Quantity, Tensor]:
    """Differences between transforming latents and transforming images: root mean squares, one per image.

    Args:
        encode, decode: of the tokenizer.
        z: E(x), (B, d, h, w).
        images: x, (B, 3, H, W) in [-1, 1].
        std: of the latent channels, (d,): latent differences are given in standard deviations.

    Returns:
        `equivariance_decoder/{tau}`: |D(tau z) - tau x|, in pixel units of [-1, 1]; `equivariance_encoder/{tau}`:
        |E(tau x) - tau E(x)|; and `reconstruction_rms`: |D(z) - x|, a floor of the first. Halving is left out if the
        latent grid has an odd side.
    """
    scale = torch.where(std > 0, std, 1.0).to(z)[:, None, None]
    errors = {Quantity("reconstruction_rms"): rms(decode(z) - images)}
    for name, tau in TRANSFORMS.items():
        if name == "scale_half" and (z.shape[-2] % 2 or z.shape[-1] % 2):
            continue
        errors[Quantity("equivariance_decoder", name)] = rms(decode(tau(z)) - tau(images))
        errors[Quantity("equivariance_encoder", name)] = rms((encode(tau(images))[0] - tau(z)) / scale)
    return errors


def rms(x: Tensor) -> Tensor:
    """Root mean square of each image: (B, ...) -> (B,)."""
    return x.square().flatten(1).mean(1).sqrt()
