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
    """One block's keys and values of the scales decoded so far; `attend` serves the next pass's queries.

    Progressive decoding calls it pass by pass, coarse to fine: eq. 7 in causal mode, eq. 6 in independent mode,
    which keeps nothing. In full mode coarse tokens attend to finer ones, so nothing can be cached.
    """

    def __init__(self, mode: AttentionMode):
        assert mode != "full"
        self.keep = mode == "causal"
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries, keys and values of one pass's scales, (B, heads, N, C / heads) each -> the same shape.

        `mask` (N, M), as `pass_mask` makes it, tells the pass's scales apart.
        """
        if self.keep:
            self.keys.append(k)
            self.values.append(v)
            k, v = torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def pass_mask(scales: Scales, done: int, mode: AttentionMode, device: torch.device) -> Tensor | None:
    """Who may look at whom in a pass of `scales` after one of `done` tokens: bool (N, M); None: everybody.

    The M keys are those of `KeyValueCache`: in causal mode all tokens so far, else the pass's own.
    """
    if len(scales) == 1:
        return None
    mask = scales.mask(mode, device)
    return F.pad(mask, (done, 0), value=True) if mode == "causal" else mask
