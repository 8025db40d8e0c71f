"""Multi-scale tokens (eq. 5): from the latent map z to the decoder's token maps, coarse to fine.

Both modules come after z, so a generator sees only z. They give one map after the other, so that coarse scales can be
decoded before finer maps are computed.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok.layers import LayerNorm2d
from hieratok.tokenizer.scales import Scales, area_pool

DownsampleMode = Literal["interpolate", "conv"]


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
    """`conv`: three learnable convolutions per coarse scale, from the finest resolution to the target (appendix E).

    The sizes are [ours], found from table 7's parameters: z is lifted linearly to `lifted_width`, then per coarse scale
    2 x 2, 1 x 1 and 3 x 3 convolutions at the decoder's width, with the norms of ViTDet's pyramid: 13 width^2
    parameters at the paper's 768 and 1024. The finest scale is projected linearly, as in `interpolate`.
    """

    def __init__(self, latent_channels: int, lifted_width: int, width: int, sides: tuple[int, ...]):
        super().__init__()
        self.proj = nn.Conv2d(latent_channels, width, kernel_size=1)
        self.lift = nn.Conv2d(latent_channels, lifted_width, kernel_size=1)
        self.branches = nn.ModuleList(ConvBranch(lifted_width, width, side, sides[-1]) for side in sides[:-1])

    def forward(self, z: Tensor, scales: Scales) -> Iterator[Tensor]:
        """z (B, d, h, w) -> token maps (B, C, h_k, w_k), coarse to fine."""
        lifted = self.lift(z)
        for branch, grid in zip(self.branches, scales.grids):
            yield branch(lifted, grid)
        yield self.proj(z)


def repeat_last(x: Tensor, right: int, bottom: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h + bottom, w + right), with the last column and row once more where that is 1.

    Not F.pad(mode="replicate"): torch.compile expects another memory layout of its gradient than it has.
    """
    x = torch.cat((x, x[..., -1:]), dim=3) if right else x
    return torch.cat((x, x[..., -1:, :]), dim=2) if bottom else x


class ConvBranch(nn.Module):
    """One coarse scale of ConvDownsample."""

    def __init__(self, lifted_width: int, width: int, side: int, finest_side: int):
        super().__init__()
        # The first convolution halves the map wherever the target is at most half; area pooling does the rest, so
        # that ratios which are no power of two (16 -> 12) work too. [ours]
        self.stride = 2 if 2 * side <= finest_side else 1
        self.down = nn.Conv2d(lifted_width, width, kernel_size=2, stride=self.stride, bias=False)
        self.down_norm = LayerNorm2d(width, eps=1e-6)
        self.mix = nn.Conv2d(width, width, kernel_size=1, bias=False)
        self.mix_norm = LayerNorm2d(width, eps=1e-6)
        self.smooth = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.smooth_norm = LayerNorm2d(width, eps=1e-6)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Lifted latent map (B, lifted width, h, w) -> (B, C, *grid)."""
        h, w = x.shape[-2:]
        right, bottom = (w % 2, h % 2) if self.stride == 2 else (1, 1)  # no column or row is left out
        x = repeat_last(x, right, bottom)
        x = F.gelu(self.down_norm(self.down(x)))
        x = area_pool(x, grid)
        x = self.mix_norm(self.mix(x))
        return self.smooth_norm(self.smooth(x))
