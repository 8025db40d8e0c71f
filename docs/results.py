"""The picture of docs/results.md, from finished runs.

    python docs/results.py SINGLE MULTI --data 'imagenette/val-*.tar'

SINGLE and MULTI are run folders of a single-scale and a multi-scale tokenizer of one size.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from hieratok import HieraTok
from hieratok.core.pictures import picture_table
from hieratok.data.images import center_crop, evenly_spread, open_source
from hieratok.training.tokenizer import reconstruct_pyramid

PICTURE = Path(__file__).parent / "imagenette.webp"
NUM_IMAGES = 6
ENLARGED = 2
"""Pixels a side that a pixel of the largest scale is shown as."""


def main() -> None:
    """Write imagenette.webp."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("single")
    parser.add_argument("multi")
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    single, multi = HieraTok.from_pretrained(options.single), HieraTok.from_pretrained(options.multi)
    source = evenly_spread(open_source(options.data), NUM_IMAGES)
    originals = torch.stack([center_crop(source.image(i), multi.config.image_size) for i in range(len(source))])
    pyramid = reconstruct_pyramid(multi, originals)
    columns = {
        "original": originals,
        "single": reconstruct_pyramid(single, originals)[-1],
        **{f"{x.shape[-1]} px": x for x in reversed(pyramid)},
    }
    side = multi.config.image_size
    enlarged = {
        title: F.interpolate(x, scale_factor=ENLARGED * side // x.shape[-1], mode="nearest")
        for title, x in columns.items()
    }
    picture_table(enlarged).save(PICTURE, quality=82, method=6)


if __name__ == "__main__":
    main()
