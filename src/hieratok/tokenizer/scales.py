"""The pyramid's layout: the scales' grids and the places of their tokens in the sequence. No parameters."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scales:
    """Token grids (h_k, w_k), coarse to fine, and their places in one concatenated sequence (eq. 5).

    `Scales.of((1, 2, 4, 8, 16), (16, 16))` is the paper's default: 1 + 4 + 16 + 64 + 256 = 341 tokens.
    """

    grids: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, sides: tuple[int, ...], grid: tuple[int, int]) -> "Scales":
        """The scale list `sides` (tokens per side at the training size) in proportion to the finest `grid` (h, w).

        At the training size, grid = (sides[-1], sides[-1]) and scale s is s x s. Elsewhere scale s has
        round(h s / sides[-1]) x round(w s / sides[-1]) tokens, at least one a side. [ours]
        """
        h, w = grid
        finest = sides[-1]
        return cls(tuple((max(1, round(h * s / finest)), max(1, round(w * s / finest))) for s in sides))

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(h * w for h, w in self.grids)

    @property
    def num_tokens(self) -> int:
        """N, the decoder's sequence length."""
        return sum(self.lengths)

    @property
    def num_coarse(self) -> int:
        """Tokens of all scales but the finest, which is where the finest scale's tokens begin."""
        return self.num_tokens - self.lengths[-1]

    def prefix(self, k: int) -> "Scales":
        """Scales 0 .. k."""
        return Scales(self.grids[: k + 1])

    def passes(self, tokens: int) -> "list[Scales]":
        """The scales in groups, coarse to fine: neighbours are together while they have `tokens` at most."""
        groups: list[Scales] = []
        for grid in self.grids:
            joined = Scales((*groups[-1].grids, grid)) if groups else None
            if joined and joined.num_tokens <= tokens:
                groups[-1] = joined
            else:
                groups.append(Scales((grid,)))
        return groups

    def split(self, tokens: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """A sequence (..., N, ...) -> one piece per scale, coarse to fine."""
        return tokens.split(self.lengths, dim)

    def pyramid(self, x: Tensor, unit: int = 1) -> list[Tensor]:
        """T_1(x), ..., T_K(x), coarse to fine: x (B, C, H, W) area-pooled to (unit h_k, unit w_k).

        With unit = 1 the pyramid of a latent map, with unit = f that of its image (eqs. 8, 9).
        """
        return [area_pool(x, (unit * h, unit * w)) for h, w in self.grids]

    def mask(self, mode: str, device: torch.device | None = None) -> Tensor:
        """The attention mask: bool (N, N), True where the query (row) attends to the key (column).

        `independent` is eq. 6, `causal` eq. 7, `full` everything.
        """
        scale_of = torch.tensor([k for k, length in enumerate(self.lengths) for _ in range(length)], device=device)
        query, key = scale_of[:, None], scale_of[None, :]
        if mode == "independent":
            return query == key
        if mode == "causal":
            return query >= key
        assert mode == "full", mode
        return torch.ones_like(query == key)


def area_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """T_k: (B, C, H, W) -> (B, C, *size), the mean of each area, at any ratio (16 -> 12, say)."""
    return x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)
