"""DiT: a transformer over latents with adaptive layer norm (Peebles and Xie 2023), the paper's generator.

Shapes: B batch, d latent channels, h w latent grid, p patch size, N = h/p w/p tokens, C width.
Weights are named as in facebookresearch/DiT, so that its state dicts load unchanged.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok.core import checkpoint
from hieratok.core.files import shown
from hieratok.core.layers import Attend, Attention, Blocks, Mlp
from hieratok.core.pretrained import Pretrained
from hieratok.generation.config import DiTConfig

NORM_EPS = 1e-6
TIME_FREQUENCIES = 256  # features of a timestep before its MLP
MAX_PERIOD = 10_000  # of timestep features, fixed positions and rotary positions


@dataclass(frozen=True)
class LatentSpace:
    """The latents that a generator was trained on: their tokenizer and their normalisation.

    [ours] Each channel has its own mean and deviation, as in LightningDiT; DiT scales all channels by one number.

    Raises:
        ValueError: a channel without variance, which cannot be normalised.
    """

    encoder_sha256: str
    """SHA-256 of the tokenizer's encoder."""
    mean: tuple[float, ...]
    """(d,): mean of every channel over the training images."""
    std: tuple[float, ...]
    """(d,): standard deviation of every channel."""

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for channel, std in enumerate(self.std):
            if not 0 < std < math.inf:
                raise ValueError(f"channel {channel} of the latents has deviation {std}: it cannot be normalised")

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents (B, d, h, w) -> normalised ones, with mean 0 and deviation 1 in every channel."""
        return (z - z.new_tensor(self.mean).view(-1, 1, 1)) / z.new_tensor(self.std).view(-1, 1, 1)

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse: normalised latents -> raw ones for the tokenizer, (B, d, h, w)."""
        return z * z.new_tensor(self.std).view(-1, 1, 1) + z.new_tensor(self.mean).view(-1, 1, 1)


class DiT(Pretrained):
    """Noisy latent, time and class -> the process's prediction."""

    model_type, kind, config_class, others = "hieratok-dit", "generator", DiTConfig, ("latents",)
    config: DiTConfig

    pos_embed: Tensor  # a buffer: fixed, but saved with the weights, as in DiT
    latents: LatentSpace | None
    """Its latent space, saved in `config.json`; None: not known, as for weights of other projects."""

    def __init__(self, config: DiTConfig | None = None):
        super().__init__()
        self.config = c = config or DiTConfig()
        self.latents = None
        self.grid = c.latent_size // c.patch_size
        self.x_embedder = PatchEmbed(c.latent_channels, c.width, c.patch_size)
        self.t_embedder = TimestepEmbedder(c.width)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width, c.label_dropout)
        if c.positions == "sincos":
            self.register_buffer("pos_embed", sincos_positions(c.width, self.grid))
        self.blocks = Blocks(Block(c) for _ in range(c.depth))
        self.wide_head = WideHead(c) if c.wide_width else None
        self.final_layer = FinalLayer(c.wide if c.wide_width else c)
        self.initialize()

    def initialize(self) -> None:
        """DiT's initial weights: every block starts as the identity, and the prediction as zero (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in [self.x_embedder, *([self.wide_head.x_embedder] if self.wide_head else [])]:
            patches = embedder.proj
            nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))  # as a linear map
            assert patches.bias is not None
            nn.init.zeros_(patches.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        blocks = [*self.blocks, *(self.wide_head.blocks if self.wide_head else [])]
        zero = [block.adaLN_modulation[-1] for block in blocks]  # type: ignore[index]
        for layer in (*zero, self.final_layer.adaLN_modulation[-1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction.

        Args:
            x: noisy latents (B, d, h, w).
            t: (B,) time in the process's own units: 0 .. 999 for ddpm (0: least noise), [0, 1] for flow (1: data).
            y: (B,) class labels, `num_classes` for none. In training mode some are dropped (`label_dropout`).

        Returns:
            (B, d, h, w): noise or velocity; with `learn_sigma` (B, 2 d, h, w), the variance's interpolation after it.

        Raises:
            ValueError: latents of another shape.
        """
        if x.shape[1:] != self.config.latent_shape:
            d, h, w = self.config.latent_shape
            raise ValueError(f"the generator takes latents (B, {d}, {h}, {w}), not {tuple(x.shape)}")
        tokens = self.x_embedder(x)  # (B, N, C)
        if self.config.positions == "sincos":
            tokens = tokens + self.pos_embed
        time = self.t_embedder(t).unsqueeze(1)
        condition = time + self.y_embedder(y).unsqueeze(1)  # (B, 1, C)
        tokens = self.blocks(tokens, condition, attention_of(self.config, x.device))
        if self.wide_head is not None:
            tokens, condition = self.wide_head(x, tokens + time)
        return self.unpatchify(self.final_layer(tokens, condition))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, p^2 c) -> (B, c, h, w)."""
        p, n = self.config.patch_size, self.grid
        x = patches.view(-1, n, n, p, p, self.config.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, n * p, n * p).contiguous()

    def _others(self) -> dict[str, Any]:
        return {"latents": asdict(self.latents)} if self.latents else {}

    def _take_over(self, others: dict[str, Any], folder: Path) -> None:
        if others.get("latents") is None:
            return
        where = f"{shown(folder / checkpoint.CONFIG)}: latents"
        latents = checkpoint.from_json(LatentSpace, others["latents"], where)
        if not len(latents.mean) == len(latents.std) == self.config.latent_channels:
            raise ValueError(
                f"{where} has {len(latents.mean)} means and {len(latents.std)}"
                f" deviations for {self.config.latent_channels} channels"
            )
        self.latents = latents


class WideHead(nn.Module):
    """A few wide blocks over the noisy latents, conditioned at each token on the trunk's output and on time.

    RAE (Zheng et al. 2025) after DDT (Wang et al. 2025): a token has to be as wide as its latent to carry its noise,
    and a head of two blocks is where that width is cheap. The final layer is conditioned in the same way.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config.wide
        self.x_embedder = PatchEmbed(config.latent_channels, self.config.width, config.patch_size)
        self.project = nn.Linear(config.width, self.config.width)
        self.blocks = Blocks(Block(self.config) for _ in range(self.config.depth))

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents (B, d, h, w), and the trunk's tokens with their time (B, N, C) -> tokens and the final layer's
        condition, (B, N, wide width) each."""
        condition = self.project(condition)
        return self.blocks(self.x_embedder(x), condition, attention_of(self.config, x.device)), condition


class PatchEmbed(nn.Module):
    """Latent patches -> tokens."""

    def __init__(self, latent_channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(latent_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, h, w) -> (B, N, C)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """A time -> cosines and sines -> an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, C)."""
        weight_dtype = next(self.mlp.parameters()).dtype
        # at least float32: bf16 could not distinguish neighbouring times
        features = timestep_features(t.to(torch.promote_types(weight_dtype, torch.float32)))
        return self.mlp(features.to(weight_dtype))


class LabelEmbedder(nn.Module):
    """A class label -> a learned vector. With dropout there is one more row, for "no class"."""

    def __init__(self, num_classes: int, width: int, dropout: float):
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), width)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) -> (B, C)."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout
            y = y.masked_fill(dropped, self.num_classes)
        return self.embedding_table(y)


class Block(nn.Module):
    """Transformer block whose norms are shifted and scaled, and whose branches are gated, by time and class."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config.width, config.heads, bias=True, qk_norm=config.qk_norm)
        self.norm2 = make_norm(config)
        if config.mlp == "gelu":
            self.mlp = Mlp(config.width, config.mlp_ratio, bias=True, gelu="tanh")
        else:
            self.mlp = SwiGlu(config.width, config.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, condition: Tensor, attend: Attend) -> Tensor:
        """Tokens (B, N, C) and condition, one for all (B, 1, C) or each (B, N, C) -> (B, N, C)."""
        modulation = self.adaLN_modulation(condition)  # (B, 1 or N, 6 C)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), attend)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens -> predicted patches."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm_final = make_norm(config)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, N, C) and condition, (B, 1, C) or (B, N, C) -> (B, N, p^2 c)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SwiGlu(nn.Module):
    """Gated MLP, fc2(silu(gate) * value) with gate and value from fc1, of about `Mlp`'s number of parameters."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        hidden = max(8, int(width * ratio * 2 / 3) // 8 * 8)  # multiples of 8 are fast on GPUs
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def make_norm(config: DiTConfig) -> nn.Module:
    """Without a learned scale and shift: those come from time and class."""
    norm = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return norm(config.width, eps=NORM_EPS, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's shift and scale, both (B, 1, C) or (B, N, C), of tokens (B, N, C)."""
    return x * (1 + scale) + shift


def frequencies(count: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """1, ..., falling geometrically towards 1 / MAX_PERIOD: (count,)."""
    return torch.exp(-math.log(MAX_PERIOD) * torch.arange(count, dtype=dtype, device=device) / count)


def timestep_features(t: Tensor) -> Tensor:
    """Times (B,) in floating point -> cosines, then sines: (B, TIME_FREQUENCIES)."""
    angles = t[:, None] * frequencies(TIME_FREQUENCIES // 2, t.dtype, t.device)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed positions of a grid, row by row: (1, grid^2, width), a quarter each of sines and cosines of the column,
    then of the row."""
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies(width // 4, torch.float64)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # (grid, width / 2)
    column, row = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return torch.cat((column, row), dim=1)[None].float()


def attention_of(config: DiTConfig, device: torch.device) -> Attend:
    """Attention that sees where tokens lie if the tokens themselves do not say it."""
    if config.positions == "sincos":
        return F.scaled_dot_product_attention
    return rotary_attention(config.latent_size // config.patch_size, config.width // config.heads, device)


def rotary_attention(grid: int, head_width: int, device: torch.device) -> Attend:
    """Attention with queries and keys rotated by their token's row and column, half of the pairs each, so that it
    depends on relative positions (Su et al. 2021, in two dimensions [ours])."""
    index = torch.arange(grid, dtype=torch.float32, device=device)
    angles = index[:, None] * frequencies(head_width // 4, torch.float32, device)  # (grid, head width / 4)
    row, column = angles.repeat_interleave(grid, dim=0), angles.repeat(grid, 1)
    angles = torch.cat((row, column), dim=1)  # (N, head width / 2)
    cosine, sine = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1)  # in float32 at least

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(rotate(q).to(v.dtype), rotate(k).to(v.dtype), v)

    return attend
