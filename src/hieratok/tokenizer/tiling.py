"""Images of other sizes than the training size, in overlapping tiles of that size, without seams. [ours]

Tiles have the size that the tokenizer was trained on. Whole images with interpolated positions are as good at the
finest scale and worse at coarse ones, whose tokens then cover areas of another size (measured: docs/results.md).
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
    """Overlap of neighbouring tiles in pixels: about a quarter, so that tiles begin at whole pixels at every scale.

    Raises:
        ValueError: these scales have no such overlap.
    """
    finest, f = config.scales[-1], config.patch_size
    for overlap in range(-(-finest // 4), finest):  # in tokens
        if all(f * side * (finest - overlap) % finest == 0 for side in config.scales):
            return f * overlap
    raise ValueError(f"images cannot be tiled with scales {list(config.scales)} and patches of {f} px: crop them")


def fits_tiles(config: TokenizerConfig, image_size: tuple[int, int]) -> bool:
    """Whether an image (H, W) can be reconstructed in tiles: it fits into one, or the scales allow an overlap."""
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

    Tiles of the training size overlap by a quarter. In an overlap, a tile's weight is proportional to the distance from
    its edge. At scale s of S, an H x W image becomes ceil(H s/S) x ceil(W s/S).

    Args:
        reconstruct: reconstructs a batch of tiles.
        image: uint8 (3, H, W), any size; padded to whole tiles, at least one, by repeating its last column and row.
        config: of the tokenizer.
        batch_size: tiles at a time.
        progress: called with the number of tiles done.

    Returns:
        uint8 (3, H_k, W_k), coarse to fine.

    Raises:
        ValueError: several tiles are needed, and no overlap fits the scales.
    """
    tile = config.image_size
    pyramid = in_tiles(
        lambda tiles: reconstruct(tiles.to(torch.uint8)),
        image[None].float(),
        tile,
        overlap_of(config) if max(image.shape[-2:]) > tile else 0,
        batch_size,
        progress,
    )
    return [scale[0].round().to(torch.uint8) for scale in pyramid]


def in_tiles(
    function: Callable[[Tensor], list[Tensor]],
    x: Tensor,
    tile: int,
    overlap: int,
    batch_size: int = 1,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Tensor]:
    """A function of square maps, applied to tiles of larger ones; where tiles overlap, its outputs are blended.

    Args:
        function: maps (B, C, tile, tile) -> any number of maps (B, C_k, side_k, side_k).
        x: (B, C, H, W), any size; padded to whole tiles, at least one, by repeating its last column and row.
        tile: side of a tile.
        overlap: of neighbouring tiles, less than `tile`; (tile - overlap) side_k / tile must be whole.
        batch_size: tiles at a time, each of the whole batch.
        progress: called with the number of tiles done.

    Returns:
        (B, C_k, ceil(H side_k / tile), ceil(W side_k / tile)), float32 at least.
    """
    stride, (H, W) = tile - overlap, x.shape[-2:]
    starts = [range(0, max(side - tile, 0) + stride, stride) if side > tile else range(1) for side in (H, W)]
    places = list(product(*starts))
    height, width = (max(start) + tile for start in starts)
    padded = F.pad(x, (0, width - W, 0, height - H), mode="replicate")
    sums: list[Tensor] = []
    weights: list[Tensor] = []
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        outputs = function(torch.cat([padded[..., top : top + tile, left : left + tile] for top, left in batch]))
        if not sums:
            shapes = [(y.shape[1], height * y.shape[-1] // tile, width * y.shape[-1] // tile) for y in outputs]
            dtype = torch.promote_types(outputs[0].dtype, torch.float32)
            sums = [torch.zeros(len(x), *shape, dtype=dtype, device=y.device) for y, shape in zip(outputs, shapes)]
            weights = [torch.zeros(*shape[1:], dtype=dtype, device=y.device) for y, shape in zip(outputs, shapes)]
        for total, total_weight, output in zip(sums, weights, outputs, strict=True):
            side = output.shape[-1]
            weight = window(side, side - stride * side // tile).to(total)
            for place, part in zip(batch, output.chunk(len(batch))):
                rows, columns = (slice(start * side // tile, start * side // tile + side) for start in place)
                total[..., rows, columns] += part * weight
                total_weight[rows, columns] += weight
        progress(len(batch))
    return [
        (total / weight)[..., : -(-H * total.shape[-2] // height), : -(-W * total.shape[-1] // width)]
        for total, weight in zip(sums, weights)
    ]


def window(side: int, overlap: int) -> Tensor:
    """A tile's weights (side, side): 1 inside, falling linearly over `overlap` pixels towards the edges, never 0."""
    ramp = ((torch.arange(side) + 1.0) / (overlap + 1)).clamp(max=1)
    edge = torch.minimum(ramp, ramp.flip(0))
    return edge[:, None] * edge[None, :]
