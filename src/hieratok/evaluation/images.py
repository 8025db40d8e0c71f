"""Images for an evaluation: every image once, at its own size or cropped, and two sets paired by name."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hieratok.core.files import map_npz, shown
from hieratok.data.images import Source, center_crop, flat_stem, open_source


class NpzImages:
    """The images in an .npz of ADM's evaluation suite: `arr_0`, uint8, N x H x W x 3. A `Source` without classes.

    An uncompressed file, as from numpy's `savez`, is mapped; a compressed one is read as a whole.

    Raises:
        FileNotFoundError, PermissionError: no file, or one that may not be read.
        ValueError: damaged, without such an array, or a compressed one that would take more than 2 GiB.
    """

    def __init__(self, path: str | Path):
        images = map_npz(path, "arr_0")
        if images is None:
            raise ValueError(f"{shown(path)} holds no images: it has no array called arr_0")
        self.images = images
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise ValueError(
                f"{shown(path)}: arr_0 must be uint8 of shape (images, height, width, 3), "
                f"not {self.images.dtype} {self.images.shape}"
            )
        if not self.images.size:
            raise ValueError(f"{shown(path)} holds no images: arr_0 has shape {self.images.shape}")

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The index, in six digits."""
        return f"{index:06}"

    def label(self, index: int) -> int:
        """-1: no classes."""
        return -1

    def image(self, index: int) -> Tensor:
        """uint8 (3, H, W)."""
        return torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1)


def open_images(path: str | Path) -> Source:
    """An .npz of images, or any source of `hieratok.data.images.open_source`: a folder, a pattern, shards."""
    return NpzImages(path) if str(path).endswith(".npz") else open_source(str(path))


def load_image(source: Source, index: int, size: int | tuple[int, int]) -> Tensor:
    """uint8 (3, H, W), cut by `center_crop` if `size` is a side; if it is (H, W), the image must have it.

    Raises a ValueError that names the image if it cannot be read or has another size.
    """
    image = source.image(index)
    if isinstance(size, int):
        return center_crop(image, size)
    if tuple(image.shape[1:]) != size:
        height, width = image.shape[1:]
        raise ValueError(
            f"{shown(source.name(index))} has {height} x {width} pixels where {size[0]} x {size[1]} are expected: "
            "give --size to crop every image"
        )
    return image


def batches(
    source: Source,
    size: int | tuple[int, int],
    batch_size: int,
    indices: Sequence[int] | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and uint8 (B, 3, H, W) of the images at `indices` (default: all), each once over all processes.

    Process r of P gets every P-th from the r-th on; the last batch may be smaller. Images are decoded in threads, one
    batch ahead.

    Raises ValueError for a batch size below 1 and for images as `load_image` does.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, not {batch_size}")
    mine = list(range(len(source)) if indices is None else indices)[process_index::num_processes]
    parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        ahead = pool.map(lambda i: load_image(source, i, size), parts[0] if parts else ())
        for part, following in zip(parts, [*parts[1:], []]):
            images = list(ahead)
            ahead = pool.map(lambda i: load_image(source, i, size), following)
            yield [source.name(i) for i in part], torch.stack(images)


def pair(a: Source, b: Source, name_a: str, name_b: str, suffix: str = "") -> tuple[list[str], list[int], list[int]]:
    """Indices into two sources of the images with the same id, which is the name without its suffix.

    Args:
        a, b: images.
        name_a, name_b: the sources' names, for messages.
        suffix: of names in `b`: images without it are left out, and ids are flat stems, as
            `hieratok reconstruct` writes them.

    Returns:
        Ids in order, indices into a, indices into b.

    Raises:
        ValueError: an id that is missing on one side or occurs twice.
    """
    stems_a = {i: flat_stem(name) if suffix else os.path.splitext(name)[0] for i, name in _names(a)}
    stems_b = {i: os.path.splitext(name)[0] for i, name in _names(b)}
    if suffix:
        flat = {
            i: re.sub(r"[/\\]", "-", stem) for i, stem in stems_b.items()
        }  # unless the name was shortened, which cuts the suffix off
        stems_b = {i: stem.removesuffix(suffix) for i, stem in flat.items() if stem.endswith(suffix)}
    if not stems_b:
        raise ValueError(f"{shown(name_b)} has no image whose name ends in {shown(suffix)}")
    index_a, index_b = _by_id(stems_a, name_a), _by_id(stems_b, name_b)
    for one, other, where, end in ((index_a, index_b, name_b, suffix), (index_b, index_a, name_a, "")):
        lacking = sorted(one.keys() - other.keys())
        if lacking:
            count = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            hint = "" if suffix else "; --suffix=TEXT is for a suffix of the reconstructions' names"
            raise ValueError(
                f"{shown(where)} has no image named {shown(lacking[0] + end)}{count}: images are paired by name{hint}"
            )
    ids = sorted(index_a)
    return ids, [index_a[key] for key in ids], [index_b[key] for key in ids]


def _names(source: Source) -> list[tuple[int, str]]:
    return [(i, source.name(i)) for i in range(len(source))]


def _by_id(stems: dict[int, str], name: str) -> dict[str, int]:
    twice = [key for key, count in Counter(stems.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"{shown(name)} has two images named {shown(twice[0])}: images are paired by name without the suffix"
        )
    return {key: i for i, key in stems.items()}
