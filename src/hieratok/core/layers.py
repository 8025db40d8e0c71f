"""Building blocks that the tokenizer and the generator share: attention, MLP, stochastic depth, positions."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# (query, key, value), each (B, heads, N, head width) -> (B, heads, N, head width)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Multi-head self-attention, without biases in the tokenizer, with them in DiT.

    Queries, keys and values have none in the paper (table 10); that the output projection has none either is [ours].
    `attend` gets queries, keys and values: masks and rotary positions are its task.
    With `qk_norm`, queries and keys are RMS-normalised per head, which keeps long bf16 runs from diverging.
    """

    def __init__(self, width: int, num_heads: int, bias: bool = False, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        self.q_norm = HeadNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, attend: Attend = F.scaled_dot_product_attention) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, C / heads)
        x = attend(self.q_norm(q), self.k_norm(k), v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Mlp(nn.Module):
    """Linear, GELU, linear: without biases in the tokenizer (paper, table 10), with them and tanh's GELU in DiT.

    The tokenizer's exact GELU is [ours]: the paper does not name the function.
    """

    def __init__(self, width: int, ratio: float, bias: bool = False, gelu: Literal["none", "tanh"] = "none"):
        super().__init__()
        hidden = int(width * ratio)
        self.gelu = gelu
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class Blocks(nn.ModuleList):
    """Transformer blocks, one after the other.

    With `gradient_checkpointing`, a block's activations are computed again in the backward pass and not kept: about a
    third more time for much less memory; the results stay the same. diffusers sets it, and the function that does it,
    by these names.
    """

    gradient_checkpointing = False

    def _gradient_checkpointing_func(self, block: nn.Module, *args: Any) -> Tensor:
        return checkpoint(block, *args, use_reentrant=False)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """(B, N, C) -> (B, N, C); `args` go to every block."""
        for block in self:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, *args)
            else:
                x = block(x, *args)
        return x


# Not torchvision's StochasticDepth: importing torchvision takes half as long as importing torch.
class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's residual branch is dropped with probability `rate`, else scaled up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < keep
        return x * (mask.to(x.dtype) / keep)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of queries or keys, in the precision of its weight: under bf16 autocast they come in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., head width) -> the same."""
        assert self.weight is not None
        return super().forward(x.to(self.weight.dtype))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions (1, C, H, W), resized for another grid than they were trained on: (1, C, h, w). [ours]"""
    if positions.shape[-2:] == grid:
        return positions
    return F.interpolate(positions, grid, mode="bicubic", antialias=True, align_corners=False)


def init_weights(module: nn.Module, std: float) -> None:
    """Weights from a normal of that standard deviation; biases zero, norms the identity (paper, table 10: 0.02)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
