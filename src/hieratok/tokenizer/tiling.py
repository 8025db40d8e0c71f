"""Images of other sizes than the training size, in tiles of that size: no seam shows. [ours]

Tiles are what the tokenizer was trained on. Whole images with interpolated positions are as good at the finest scale
and worse at coarse ones, whose few tokens then stand for areas that they never stood for (measured: docs/results.md).
"""

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from hieratok.tokenizer.model import TokenizerConfig

# uint8 (B, 3, tile, tile) -> every scale's uint8 (B, 3, tile_k, tile_k), coarse to fine
Reconstruct = Callable[[Tensor], list[Tensor]]


def overlap_of(config: TokenizerConfig) -> int:
    """Pixels that neighbouring tiles share: about a quarter, so that tiles begin at whole pixels at every scale.

    Raises:
        ValueError: no overlap does that for these scales.
    """
    finest, f = config.scales[-1], config.patch_size
    for overlap in range(-(-finest // 4), finest):  # in tokens
        if all(f * side * (finest - overlap) % finest == 0 for side in config.scales):
            return f * overlap
    raise ValueError(f"images cannot be tiled with scales {list(config.scales)} and patches of {f} px: crop them")


def fits_tiles(config: TokenizerConfig, image_size: tuple[int, int]) -> bool:
    """Whether an image (H, W) can be reconstructed in tiles: it fits into one, or the scales have an overlap."""
    try:
        return max(image_size) <= config.image_size or overlap_of(config) > 0
    except ValueError:
        return False


def reconstruct_tiled(
    reconstruct: Reconstruct,
    image: Tensor,
    config: TokenizerConfig,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Tensor]:
    """Every scale's reconstruction of an image, in one tile or several.

    Tiles of the training size overlap by a quarter; where they do, each counts in proportion to the distance from its
    own edge. At scale s of S, an H x W image becomes ceil(H s/S) x ceil(W s/S).

    Args:
        reconstruct: the tokenizer's way with tiles.
        image: uint8 (3, H, W), any size; padded to whole tiles, at least one, by repeating its last column and row.
        config: of the tokenizer.
        batch_size: tiles at a time.
        progress: called with the number of tiles done.

    Returns:
        uint8 (3, H_k, W_k), coarse to fine.

    Raises:
        ValueError: several tiles are needed, and no overlap fits the scales.
    """
    tile, (H, W) = config.image_size, image.shape[-2:]
    stride = tile - (overlap_of(config) if max(H, W) > tile else 0)
    starts = [range(0, max(side - tile, 0) + stride, stride) if side > tile else range(1) for side in (H, W)]
    places = list(product(*starts))
    height, width = (max(start) + tile for start in starts)
    padded = F.pad(image[None].float(), (0, width - W, 0, height - H), mode="replicate")[0].to(torch.uint8)
    sums: list[Tensor] = []
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        pyramids = reconstruct(torch.stack([padded[:, y : y + tile, x : x + tile] for y, x in batch]))
        if not sums:
            sums = [torch.zeros(4, height * p.shape[-1] // tile, width * p.shape[-1] // tile) for p in pyramids]
        for total, tiles in zip(sums, pyramids, strict=True):
            side = tiles.shape[-1]
            weight = window(side, side - stride * side // tile)
            for (y, x), pixels in zip(batch, tiles):
                top, left = y * side // tile, x * side // tile
                place = total[:, top : top + side, left : left + side]  # colours, and the sum of the weights
                place[:3] += pixels.float() * weight
                place[3] += weight
        progress(len(batch))
    return [
        (total[:3] / total[3])[:, : -(-H * total.shape[1] // height), : -(-W * total.shape[2] // width)]
        .round()
        .to(torch.uint8)
        for total in sums
    ]


def window(side: int, overlap: int) -> Tensor:
    """A tile's weights (side, side): 1 inside, falling linearly over `overlap` pixels towards the edges, never 0."""
    ramp = ((torch.arange(side) + 1.0) / (overlap + 1)).clamp(max=1)
    edge = torch.minimum(ramp, ramp.flip(0))
    return edge[:, None] * edge[None, :]
