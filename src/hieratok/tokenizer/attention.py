"""Attention between scales: full, independent (eq. 6), causal (eq. 7), and progressive decoding's key/value cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hieratok.core.layers import Attend
from hieratok.tokenizer.config import AttentionMode
from hieratok.tokenizer.scales import Scales


def scale_attention(scales: Scales, mode: AttentionMode, device: torch.device) -> Attend:
    """The `attend` function for a whole pyramid of tokens, the same for every block of a decoder.

    The finest scale has three quarters of the tokens and needs no mask: its queries see every key (causal) or their own
    scale's (independent). Only the coarse prefix (85 of 341 tokens) is masked.
    """
    coarse = scales.num_coarse
    if mode == "full" or coarse == 0:
        return F.scaled_dot_product_attention
    coarse_mask = scales.prefix(len(scales) - 2).mask(mode, device)
    first_key = 0 if mode == "causal" else coarse

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prefix = F.scaled_dot_product_attention(
            q[:, :, :coarse], k[:, :, :coarse], v[:, :, :coarse], attn_mask=coarse_mask
        )
        finest = F.scaled_dot_product_attention(q[:, :, coarse:], k[:, :, first_key:], v[:, :, first_key:])
        return torch.cat((prefix, finest), dim=2)  # (B, heads, N, C / heads)

    return attend


class KeyValueCache:
    """One block's keys and values of the scales decoded so far; `attend` serves the next scale's queries.

    Progressive decoding calls it scale by scale, coarse to fine: eq. 7 in causal mode, eq. 6 in independent mode,
    which keeps nothing. In full mode coarse tokens attend to finer ones, so nothing can be cached.
    """

    def __init__(self, mode: AttentionMode):
        assert mode != "full"
        self.keep = mode == "causal"
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values of one scale, (B, heads, N_k, C / heads) each -> the same shape."""
        if self.keep:
            self.keys.append(k)
            self.values.append(v)
            k, v = torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)
        return F.scaled_dot_product_attention(q, k, v)
