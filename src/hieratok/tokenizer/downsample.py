"""Multi-scale tokens (eq. 5): from the latent map z to the decoder's token maps, coarse to fine.

Both modules come after z, so a generator sees only z. They yield maps one by one, so that coarse scales can be decoded
before finer maps are computed.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok.core.layers import LayerNorm2d
from hieratok.tokenizer.scales import Scales


class AreaDownsample(nn.Module):
    """`interpolate`: parameter-free area pooling of z, then one linear map to the decoder's width for all scales.

    With a single scale this is a plain ViT decoder's input projection.
    """

    def __init__(self, latent_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(latent_channels, width, kernel_size=1)

    def forward(self, z: Tensor, scales: Scales) -> Iterator[Tensor]:
        """z (B, d, h, w) -> token maps (B, C, h_k, w_k), coarse to fine."""
        for z_k in scales.pyramid(z):
            yield self.proj(z_k)


class ConvDownsample(nn.Module):
    """`conv`: three learnable convolutions per coarse scale, from the finest grid to the target (appendix E).

    Their strides do the whole reduction, so that a coarse token keeps the layout of its area, which an average loses.
    The finest scale is projected linearly, as in `interpolate`. Sizes and norms are [ours],
    like ViTDet's pyramid; table 7's parameters are met to 0.03%.
    """

    def __init__(self, latent_channels: int, width: int, sides: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList(
            ConvBranch(latent_channels, width, strides(side, sides[-1])) for side in sides[:-1]
        )
        self.proj = nn.Conv2d(latent_channels, width, kernel_size=1)

    def forward(self, z: Tensor, scales: Scales) -> Iterator[Tensor]:
        """z (B, d, h, w) -> token maps (B, C, h_k, w_k), coarse to fine."""
        for branch, grid in zip(self.branches, scales.grids):
            yield branch(z, grid)
        yield self.proj(z)


def strides(side: int, finest: int) -> tuple[int, int, int]:
    """Strides of a branch's convolutions from `finest` to `side` tokens: the last two halve, the first does the rest.

    Their product is finest / side, or the next larger number that can be split so: 16 to 8, 4, 2, 1 tokens are
    (1, 2, 1), (1, 2, 2), (2, 2, 2), (4, 2, 2), and 16 to 12 is (1, 2, 1).
    """
    return (1, 2, 1) if 2 * side >= finest else (-(-finest // (4 * side)), 2, 2)


class ConvBranch(nn.Module):
    """One coarse scale of ConvDownsample: patches of z, then 2 x 2 and 3 x 3 at the decoder's width.

    The first convolution has few input channels, so its patches can be large; the expensive ones work on small maps.
    """

    def __init__(self, latent_channels: int, width: int, strides: tuple[int, int, int]):
        super().__init__()
        self.reduction = math.prod(strides)
        first, second, third = strides
        self.patch = nn.Conv2d(latent_channels, width, kernel_size=first, stride=first, bias=False)
        self.patch_norm = LayerNorm2d(width, eps=1e-6)
        self.merge = SmallMapConv2d(width, width, kernel_size=2, stride=second, bias=False)
        self.merge_norm = LayerNorm2d(width, eps=1e-6)
        self.mix = SmallMapConv2d(width, width, kernel_size=3, stride=third, padding=1, bias=False)
        self.mix_norm = LayerNorm2d(width, eps=1e-6)

    def forward(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latent map (B, d, h, w) -> (B, C, *grid)."""
        x = resize(z, (self.reduction * grid[0], self.reduction * grid[1]))
        x = F.gelu(self.patch_norm(self.patch(x)))
        x = F.gelu(self.merge_norm(self.merge(x)))
        return self.mix_norm(self.mix(x))


class SmallMapConv2d(nn.Conv2d):
    """A convolution without bias, as one matrix product where it gives few positions and nothing is trained.

    On a CPU a convolution first rearranges its weights. A few positions, as of one image's coarse scales, need less
    time than that.
    """

    FEW = 64
    """Positions of a batch, up to which the product was faster (docs/performance.md)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        stride, padding = self.stride, tuple(int(p) for p in self.padding)
        size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(input.shape[2:], padding, self.kernel_size, stride)]
        if (
            input.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()  # also while it is exported, for any batch size
            or len(input) * math.prod(size) > self.FEW
        ):
            return super().forward(input)
        patches = F.unfold(input, self.kernel_size, padding=padding, stride=stride)  # (B, C k k, h' w')
        return F.linear(patches.transpose(1, 2), self.weight.flatten(1)).transpose(1, 2).unflatten(2, size)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), for grids that a branch's reduction does not divide (16 -> 12, odd). [ours]"""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
