"""Frequencies of images and latents: blockwise cosine transform and radial power spectrum.

After Skorokhodov et al. (arXiv 2502.14831), who find that latents with too much high frequency are hard to learn for a
diffusion model; natural images are the reference.
"""

import math
from functools import cache

import torch
from torch import Tensor

BLOCK = 8
MIN_SIDE = 6  # smallest map with a slope: three frequencies


@cache
def dct_matrix(size: int = BLOCK) -> Tensor:
    """The orthonormal DCT-II: (size, size) float64, row u = frequency u."""
    position = torch.arange(size, dtype=torch.float64) + 0.5
    frequency = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * frequency[:, None] * position) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


@cache
def zigzag(size: int = BLOCK) -> tuple[tuple[int, int], ...]:
    """The places (u, v) of a block in JPEG's zigzag order, from DC to the highest frequency."""
    places = [(u, v) for u in range(size) for v in range(size)]
    return tuple(sorted(places, key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1])))


def block_dct(x: Tensor) -> Tensor:
    """(N, C, H, W) -> cosine coefficients of all whole 8 x 8 blocks from the top left, (N, C, blocks, 64), in zigzag
    order, float64.

    Raises:
        ValueError: a side below 8.
    """
    height, width = x.shape[-2:]
    if min(height, width) < BLOCK:
        raise ValueError(
            f"the {BLOCK} x {BLOCK} cosine transform needs maps of at least that size, not {height} x {width}"
        )
    blocks = x.double().unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK)  # (N, C, rows, columns, 8, 8)
    matrix = dct_matrix()
    coefficients = (matrix @ blocks @ matrix.T).flatten(2, 3)  # (N, C, blocks, 8, 8)
    u, v = zip(*zigzag())
    return coefficients[..., list(u), list(v)]


def dct_profile(x: Tensor) -> Tensor:
    """Mean |coefficient| over blocks and channels in zigzag order, relative to DC: (N, C, H, W) -> (N, 64).

    Raises ValueError for a side below 8.
    """
    amplitude = block_dct(x).abs().mean((1, 2))
    return amplitude / amplitude[:, :1]


def high_frequency_share(x: Tensor) -> Tensor:
    """Share of the energy, without DC, in the 28 coefficients with u + v >= 8: (N, C, H, W) -> (N,). [ours]

    White noise has 28 / 63 = 0.44. Raises ValueError for a side below 8.
    """
    energy = block_dct(x).square().mean((1, 2))
    high = torch.tensor([u + v >= BLOCK for u, v in zigzag()])
    return energy[:, high].sum(1) / energy[:, 1:].sum(1)


def radial_power(x: Tensor) -> tuple[Tensor, Tensor]:
    """Power over spatial frequency, averaged over directions and channels.

    Args:
        x: (N, C, H, W).

    Returns:
        Frequencies in cycles per map, 1 to half the smaller side, (F,), and power (N, F): means over the rings of
        frequencies that round to each. Each map's mean is subtracted; no window is applied.

    Raises:
        ValueError: a side below 6, which leaves fewer than three frequencies.
    """
    height, width = x.shape[-2:]
    side = min(height, width)
    if side < MIN_SIDE:
        raise ValueError(f"a power spectrum needs maps of at least {MIN_SIDE} x {MIN_SIDE}, not {height} x {width}")
    centred = x.double() - x.double().mean((2, 3), keepdim=True)
    power = torch.fft.fft2(centred, norm="ortho").abs().square().mean(1).flatten(1)  # (N, H W)
    fy, fx = (torch.fft.fftfreq(n, dtype=torch.float64) * side for n in (height, width))
    ring = torch.hypot(fy[:, None], fx[None, :]).round().long().flatten()
    sums = torch.zeros(len(power), int(ring.max()) + 1, dtype=torch.float64).index_add_(1, ring, power)
    frequencies = torch.arange(1, side // 2 + 1)
    return frequencies, (sums / ring.bincount())[:, frequencies]


def power_slope(x: Tensor) -> Tensor:
    """Slope of log power over log frequency, by least squares: (N, C, H, W) -> (N,).

    0 for white noise, -2 to -3 for photos. A constant image gives NaN. Raises ValueError as `radial_power`.
    """
    frequencies, power = radial_power(x)
    log_f = frequencies.double().log()
    log_f -= log_f.mean()
    return (power.log() * log_f).sum(1) / log_f.square().sum()
