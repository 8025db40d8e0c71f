"""The two transformers: encoder (image -> latent moments) and decoder (token maps -> images), paper appendix E."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok.core.layers import Attend, Attention, Blocks, DropPath, Mlp, resize_positions
from hieratok.tokenizer.attention import AttentionMode, KeyValueCache, pass_mask, scale_attention
from hieratok.tokenizer.scales import Scales

NORM_EPS = 1e-6
FEW_TOKENS = 32
"""Of a batch: a pass of the decoder over no more takes about as long as reading its weights."""


class Block(nn.Module):
    """Pre-norm transformer block: 12 width^2 parameters and two norms at MLP ratio 4."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, attend: Attend = F.scaled_dot_product_attention) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x), attend))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """E: image -> mean and log-variance of the latent map (eq. 1)."""

    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: int,
        latent_channels: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
    ):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.empty(1, width, *grid))
        self.blocks = Blocks(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, 2 * latent_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance, each (B, d, h, w)."""
        x = self.patch_embed(images)  # (B, C, h, w)
        h, w = x.shape[-2:]
        x = x + resize_positions(self.positions, (h, w))
        x = x.flatten(2).transpose(1, 2)  # (B, h w, C)
        x = self.blocks(x)
        moments = self.head(self.norm(x))  # (B, h w, 2 d)
        mean, logvar = moments.transpose(1, 2).unflatten(2, (h, w)).chunk(2, dim=1)
        return mean, logvar


class Decoder(nn.Module):
    """D: token maps of all scales -> an image per scale, one shared transformer and one shared pixel head (eq. 2)."""

    def __init__(
        self,
        grid: tuple[int, int],
        num_scales: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        attention: AttentionMode,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.attention: AttentionMode = attention
        self.positions = nn.Parameter(torch.empty(1, width, *grid))  # P: one map for all scales
        self.scale_embeddings = nn.Parameter(torch.empty(num_scales, width))
        # stochastic depth grows linearly from 0 to its full rate in the last block, as is usual. [ours]
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = Blocks(Block(width, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, 3 * patch_size**2)

    def forward(self, token_maps: Iterable[Tensor], scales: Scales, last: int = -1) -> list[Tensor]:
        """Token maps (B, C, h_k, w_k), coarse to fine -> images (B, 3, f h_k, f w_k), coarse to fine.

        Scales finer than `last` are left out, which changes the others only in full attention.
        """
        last %= len(scales)
        x = torch.cat(list(islice(self.embed(token_maps, scales), last + 1)), dim=1)  # (B, N, C), eq. 5
        scales = scales.prefix(last)
        attend = scale_attention(scales, self.attention, x.device)
        x = self.blocks(x, attend)
        patches = self.head(self.norm(x))  # (B, N, 3 f^2)
        return [self.unpatchify(p, grid) for p, grid in zip(scales.split(patches), scales.grids)]

    def progressive(self, token_maps: Iterable[Tensor], scales: Scales, batch_size: int) -> Iterator[Tensor]:
        """The images of `forward`, coarse to fine, each yielded before any later pass is computed (not in full mode).

        A pass is one scale, or several that have so few tokens together that reading the weights costs most.
        """
        sequences = self.embed(token_maps, scales)
        caches = [KeyValueCache(self.attention) for _ in self.blocks]
        done = 0
        for together in scales.passes(FEW_TOKENS // batch_size):
            x = torch.cat(list(islice(sequences, len(together))), dim=1)  # (B, N, C)
            mask = pass_mask(together, done, self.attention, x.device)
            for block, cache in zip(self.blocks, caches):
                x = block(x, partial(cache.attend, mask=mask))
            done += together.num_tokens
            patches = self.head(self.norm(x))  # (B, N, 3 f^2)
            for p, grid in zip(together.split(patches), together.grids):
                yield self.unpatchify(p, grid)

    def embed(self, token_maps: Iterable[Tensor], scales: Scales) -> Iterator[Tensor]:
        """Token maps -> sequences (B, N_k, C) with their positions (P, area-pooled) and scale embedding added."""
        positions = scales.pyramid(resize_positions(self.positions, scales.grids[-1]))  # K maps (1, C, h_k, w_k)
        for tokens, position, embedding in zip(token_maps, positions, self.scale_embeddings, strict=True):
            yield (tokens + position).flatten(2).transpose(1, 2) + embedding

    def unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h w, 3 f^2) -> (B, 3, f h, f w)."""
        (h, w), f = grid, self.patch_size
        x = patches.view(-1, h, w, f, f, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, h * f, w * f)
