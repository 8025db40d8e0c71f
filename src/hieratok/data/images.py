"""Images for training and evaluation: sources to read them from, crops, and the order in which they are seen.

A `Source` gives whole images by index. Training reads it through `ImageDataset` (crop, flip), `StepBatches` (order) and
`training_loader`; both the order and the augmentation are functions of the seed and a position, without state, so that
a run resumed at step k sees bit for bit what an uninterrupted one sees, with any number of workers and processes.
Evaluation reads it through `evaluation_batches`: every image once, always with `center_crop`.
"""

import difflib
import glob
import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hieratok.core import seeding
from hieratok.core.extras import MissingPackageError
from hieratok.core.files import check_regular, shown
from hieratok.core.pixels import (
    SUFFIXES,
    BadImageError,
    center_crop,
    has_image_suffix,
    random_resized_crop,
    read_image,
    to_float,
    to_uint8,
)
from hieratok.core.plugins import SOURCES
from hieratok.data.folders import (
    HELD_OUT_NAMES,
    TRAIN_NAMES,
    LeftOut,
    images_below,
    kind_left_out,
    kind_of_suffix,
    listdir,
)
from hieratok.data.packed import PackedImages, packed_suffix
from hieratok.data.remote import check_address, files_in, is_address, is_several, matching
from hieratok.data.tables import saved_shards

__all__ = [
    "BadImageError",
    "BundledPhotos",
    "ImageDataset",
    "ImageFiles",
    "PackedImages",
    "Source",
    "StepBatches",
    "center_crop",
    "evaluation_batches",
    "open_source",
    "random_resized_crop",
    "to_float",
    "to_uint8",
    "training_loader",
]

COMPRESSED_SHARDS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
FOLDERS_HOLD = (".tar", ".parquet")
"""Suffixes of files with many images that are looked for in a folder. Zips are not: next to images they are copies."""
BRACES = re.compile(r"\{(?:(?P<first>\d{1,12})\.\.(?P<last>\d{1,12})|(?P<choices>[^{},]*(?:,[^{},]*)+))\}")
MAX_SHARDS = 100_000
MOST_STEM_BYTES = 200

logger = logging.getLogger(__name__)


class Source(Protocol):
    """A set of images that can be read in any order, by any thread or process."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """For messages and output files: a relative path, unique within the source."""
        ...

    def label(self, index: int) -> int:
        """Class index, -1 where there is none."""
        ...

    def image(self, index: int) -> Tensor:
        """uint8 (3, H, W), RGB, upright; not to be written to.

        Raises:
            BadImageError: it cannot be read; the message names the file.
        """
        ...


def read_ahead(source: Source, indices: Sequence[int]) -> None:
    """Tell a source which images come next, if it has a method `read_ahead`."""
    begin = getattr(source, "read_ahead", None)
    if begin is not None:
        begin(indices)


class ImageFiles:
    """Image files: a `Source`.

    Args:
        paths: a folder, which is searched to any depth and whose sub-folders, in alphabetical order, are the classes
            (an image directly in it has none); or a file, or several, without classes.

    A file counts as an image by its suffix, or without one by its first bytes. Others are counted in one warning.

    Raises:
        FileNotFoundError, PermissionError: a file is missing, or a folder may not be read.
        ValueError: no images, a file that is not named like an image or not regular, or a file that is listed twice.
    """

    def __init__(self, paths: str | Sequence[str]):
        if isinstance(paths, str) and os.path.isdir(paths):
            self._folder = os.path.abspath(paths)
            names, left_out = images_below(self._folder)
            if not names:
                raise ValueError(
                    f"no images found in {shown(paths)} (looked for {_suffix_list()}, in sub-folders too)"
                    f"{left_out.words('; it has ')}"
                )
            left_out.say(paths)
            classes = [name.split(os.sep)[0] if os.sep in name else "" for name in names]
        else:
            files = [os.path.abspath(path) for path in ([paths] if isinstance(paths, str) else paths)]
            if not files:
                raise ValueError("no image files given")
            for file in files:
                check_regular(file)
                if kind := kind_left_out(file):
                    raise ValueError(f"{shown(file)} is not named like an image: {kind} is none of {_suffix_list()}")
            if len(set(files)) < len(files):
                raise ValueError(f"{shown(max(files, key=files.count))} is listed twice")
            self._folder = os.path.commonpath([os.path.dirname(file) for file in files])
            names = [os.path.relpath(file, self._folder) for file in files]
            classes = [""] * len(names)
        self.classes = sorted(set(classes) - {""})
        class_index = {"": -1, **{name: i for i, name in enumerate(self.classes)}}
        # Arrays, not lists of objects: forked workers then share the memory.
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self._labels = np.array([class_index[name] for name in classes], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Path below the folder, or below what the listed files have in common."""
        return os.fsdecode(self._names[index])

    def label(self, index: int) -> int:
        """Index into `classes`, -1 where there is none."""
        return int(self._labels[index])

    def image(self, index: int) -> Tensor:
        """uint8 (3, H, W).

        Raises:
            BadImageError: the file is damaged, missing or may not be read.
        """
        return read_image(os.path.join(self._folder, self.name(index)))


def _suffix_list() -> str:
    return " ".join(f".{suffix}" for suffix in SUFFIXES)


class BundledPhotos:
    """Photos inside scikit-image's and scikit-learn's wheels, for a first look without a download: a `Source`.

    `train` has the left three quarters of ten photos, `val` 20 square tiles from their right quarters, two each: pixels
    that are never trained on; `whole` has the whole photos. Of a stereo pair only one photo is taken. All are decoded
    at once and kept in memory. No classes.

    Args:
        split: "train", "val" or "whole".

    Raises:
        ValueError: another split.
        FileNotFoundError: a package is not installed or came without its photos.
    """

    PHOTOS = (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/hubble_deep_field.jpg"),
        ("skimage", "data/ihc.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/retina.jpg"),
        ("skimage", "data/rocket.jpg"),
        ("sklearn", "datasets/images/china.jpg"),
        ("sklearn", "datasets/images/flower.jpg"),
    )

    def __init__(self, split: str = "train"):
        if split not in ("train", "val", "whole"):
            raise ValueError(f"the bundled photos have the splits train, val and whole, not {split!r}")
        self._images: dict[str, Tensor] = {}
        for package, file in self.PHOTOS:
            name, photo = Path(file).stem, _bundled(package, file)
            border = photo.shape[2] * 3 // 4
            if split == "whole":
                self._images[name] = photo
            elif split == "train":
                self._images[name] = photo[:, :, :border].clone()
            else:
                self._images.update({f"{name}-{i}": tile for i, tile in enumerate(self._tiles(photo[:, :, border:]))})
        self._names = list(self._images)

    def _tiles(self, strip: Tensor) -> list[Tensor]:
        """The largest squares in the middles of a strip's upper and lower half."""
        height, width = strip.shape[1] // 2, strip.shape[2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return [strip[:, y + top : y + top + side, left : left + side].clone() for y in (0, height)]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The photo's name, such as `astronaut`, with a tile's number in `val`."""
        return self._names[index]

    def label(self, index: int) -> int:
        """-1: no classes."""
        return -1

    def image(self, index: int) -> Tensor:
        """uint8 (3, H, W); do not modify it."""
        return self._images[self._names[index]]


class Subset:
    """Some images of a source.

    Args:
        source: whole images.
        indices: which.
    """

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """As in the source."""
        return self.source.name(self.indices[index])

    def label(self, index: int) -> int:
        """As in the source."""
        return self.source.label(self.indices[index])

    def image(self, index: int) -> Tensor:
        """As in the source."""
        return self.source.image(self.indices[index])

    def read_ahead(self, indices: Sequence[int]) -> None:
        """As in the source."""
        read_ahead(self.source, [self.indices[index] for index in indices])


def evenly_spread(source: Source, num_images: int) -> Subset:
    """`num_images` images, evenly spread over a source; all if it has fewer."""
    count = min(num_images, len(source))
    return Subset(source, [i * len(source) // count for i in range(count)])


def flat_stem(name: str) -> str:
    """An image's name within its source as the start of a file name: folders become dashes, the suffix is removed, and
    names of more than 200 bytes are cut and get a hash."""
    stem = os.path.splitext(name)[0].replace("/", "-").replace("\\", "-")
    data = os.fsencode(stem)
    if len(data) <= MOST_STEM_BYTES:
        return stem
    return f"{os.fsdecode(data[: MOST_STEM_BYTES - 9])}-{hashlib.sha256(data).hexdigest()[:8]}"


def names_sha256(source: Source) -> str:
    """SHA-256 of the names and classes of a source's images, in order; the same for two sources of the same set."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(f"{source.name(i)}\0{source.label(i)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _bundled(package: str, file: str) -> Tensor:
    """A photo from a package's folder. The package is not imported, which would take seconds."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingPackageError(package)
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise FileNotFoundError(f"this {package} came without {path}: reinstall it, or give --data PATH")
    return read_image(path)


def open_source(path: str | Sequence[str]) -> Source:
    """The source that a user's data setting means.

    - `bundled:train` (or just `bundled`), `bundled:val`, `bundled:whole`: the photos that come with the dependencies;
    - an image file, a folder of images (classes: its sub-folders), a pattern such as `photos/*.jpg`;
    - WebDataset shards: a folder of `.tar` files, one file, a pattern such as `shards/train-*.tar`, or WebDataset's
      notation for several, `shards/train-{000000..000146}.tar`;
    - a zip of images, or several;
    - Hugging Face's `datasets`: a folder from `save_to_disk`, or Parquet files, given like shards;
    - shards, zips and Parquet files by address, given in the same ways: `s3://BUCKET/train-*.tar`, `gs://`, `https://`
      without patterns, `hf://datasets/OWNER/NAME` for a dataset on the hub;
    - a list of these;
    - `NAME:TEXT`, a plugin's data source.

    Raises:
        FileNotFoundError: nothing found; the message offers the nearest name.
        PermissionError: a file or folder that may not be read.
        RemoteError: a server refuses or fails.
        ValueError: no images, images and shards mixed, compressed shards, several sets in one folder, such as train
            and val, or an address that is not supported.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if len(paths) == 1 and paths[0].split(":")[0] == "bundled":
        return BundledPhotos(paths[0].partition(":")[2] or "train")
    name, colon, text = paths[0].partition(":") if len(paths) == 1 else ("", "", "")
    if colon and name in SOURCES:
        return SOURCES[name](text)
    left_out = LeftOut()
    found = [_expand(one if is_address(one) else os.path.expanduser(one), left_out) for one in paths]
    if len(found) == 1 and len(found[0]) == 1 and os.path.isdir(found[0][0]):
        return _open_folder(found[0][0])

    files: list[str] = []
    for matches in found:  # a pattern may match both a folder and what is in it
        files += dict.fromkeys(file for match in matches for file in _files_of(match, left_out))
    shards = [file for file in files if _is_packed(file)]
    where = " ".join(paths)
    if not files:
        raise ValueError(
            f"no images found in {shown(where)} (looked for {_suffix_list()} .tar .zip .parquet)"
            f"{left_out.words('; it has ')}"
        )
    left_out.say(where)
    if not shards:
        return ImageFiles(files)
    if len(shards) < len(files):
        other = next(file for file in files if not _is_packed(file))
        raise ValueError(f"{shown(shards[0])} holds many images and {shown(other)} is a single one: give only one kind")
    return PackedImages(shards)


def _is_packed(file: str) -> bool:
    """Whether a file's name says that it holds many images: a WebDataset shard, a zip, an Arrow or Parquet file.

    Raises:
        ValueError: a compressed one.
    """
    if file.lower().endswith(COMPRESSED_SHARDS):
        raise ValueError(
            f"{shown(file)} is a compressed archive, whose images cannot be read in any order: unpack it to .tar"
            " (such as by gunzip)"
        )
    return packed_suffix(file) != ""


def _files_of(path: str, left_out: LeftOut) -> list[str]:
    if is_address(path) or not os.path.isdir(path):
        return [path]
    names, others = images_below(path)
    left_out.add(others)
    return [os.path.join(path, name) for name in names]


def _expand(path: str, left_out: LeftOut) -> list[str]:
    """A path itself if it exists, else its matches as WebDataset's notation or as a pattern, without files of other
    kinds."""
    if not is_address(path) and os.path.lexists(path):
        return [path]
    if BRACES.search(path):
        return [file for one in _expand_braces(path) for file in _expand(one, left_out)]
    if is_address(path):
        return _expand_address(path, left_out)
    if glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True))
        usable = []
        for match in matches:
            if os.path.isdir(match) or _is_packed(match) or not (kind := kind_left_out(match)):
                usable.append(match)
            else:
                left_out.count(kind)
        if not usable:
            what = "nothing matches" if not matches else "no images or shards match"
            raise FileNotFoundError(f"{what} {shown(path)}{left_out.words('; it matches ')}")
        return usable
    parent, missing = os.path.split(os.path.abspath(path))
    while not os.path.isdir(parent):
        parent, missing = os.path.split(parent)
    known = {name: os.path.join(parent, name) for name in os.listdir(parent)} | {"bundled": "bundled"}
    nearest = difflib.get_close_matches(missing, known, n=1)
    hint = f" (did you mean {shown(known[nearest[0]])}?)" if nearest else ""
    raise FileNotFoundError(f"no such file or folder: {shown(path)}{hint}")


def _expand_address(address: str, left_out: LeftOut) -> list[str]:
    """An address itself if it is named like a file, else its matches, or the files in the folder."""
    check_address(address)
    if not is_several(address) and _is_packed(address):
        return [address]
    files = matching(address) if is_several(address) else files_in(address)
    usable = [file for file in files if _is_packed(file) and not file.lower().endswith(".arrow")]
    for file in files:
        if file not in usable:
            left_out.count(kind_of_suffix(os.path.splitext(file)[1].lower()))
    if not usable:
        hint = " (as Parquet, it is at @refs/convert/parquet)" if address.startswith("hf://datasets/") else ""
        raise ValueError(
            f"no shards found in {shown(address)}{hint} (looked for .tar .zip .parquet){left_out.words('; it has ')}"
        )
    if not is_several(address):
        _check_one_set(address, usable)
    return usable


def _check_one_set(folder: str, files: list[str]) -> None:
    """Refuse files whose names differ in more than numbers, such as those of training and held-out images."""
    start = folder.rstrip("/") + "/"
    sets = sorted({re.sub(r"\d+", "*", file.removeprefix(start)) for file in files})
    if len(sets) > 1:
        choices = ", ".join(repr(start + pattern) for pattern in [*sets[:4], f"*{os.path.splitext(files[0])[1]}"])
        raise ValueError(f"{shown(folder)} holds shards of several sets: choose one of {choices}")


def _expand_braces(path: str) -> Iterator[str]:
    """WebDataset's notation for several shards: `{000..146}` means numbers, `{a,b}` either text.

    Raises:
        ValueError: more than 100,000 shards.
    """
    found = BRACES.search(path)
    if not found:
        yield path
        return
    before, after = path[: found.start()], path[found.end() :]
    if found["choices"] is not None:
        middles: Iterable[str] = found["choices"].split(",")
    else:
        first, last = found["first"], found["last"]
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        if len(numbers) > MAX_SHARDS:
            raise ValueError(f"{shown(path)} stands for {len(numbers):,} shards, and {MAX_SHARDS:,} are the limit")
        middles = (f"{number:0{width}}" for number in numbers)
    for middle in middles:
        yield from _expand_braces(before + middle + after)


def _open_folder(folder: str) -> Source:
    """A folder of shards or of images; a folder of several sets is refused, as mixing them would not be noticed."""
    if (saved := saved_shards(folder)) is not None:
        return PackedImages(saved)
    names = sorted(name for name in listdir(folder) if not name.startswith("."))
    shards = [name for name in names if _is_packed(os.path.join(folder, name)) and packed_suffix(name) in FOLDERS_HOLD]
    if not shards:
        folders = [os.path.join(folder, name) for name in names if os.path.isdir(os.path.join(folder, name))]
        train = [path for path in folders if os.path.basename(path).lower() in TRAIN_NAMES]
        held_out = [path for path in folders if os.path.basename(path).lower() in HELD_OUT_NAMES]
        if train and held_out:
            choices = ", ".join(map(shown, train + held_out))
            raise ValueError(f"{shown(folder)} holds several sets: choose one of {choices}")
        return ImageFiles(folder)
    images = [name for name in names if has_image_suffix(name)]
    if images:
        raise ValueError(
            f"{shown(folder)} holds both shards ({shown(shards[0])}) and images ({shown(images[0])}): choose with a"
            " pattern"
        )
    _check_one_set(folder, [os.path.join(folder, name) for name in shards])
    left_out = LeftOut()
    for name in names:
        if name not in shards:
            left_out.count(kind_left_out(os.path.join(folder, name)) or "images")
    left_out.say(folder)
    return PackedImages([os.path.join(folder, name) for name in shards])


class ImageDataset(Dataset):
    """Training images: decoded, cropped, half of them mirrored.

    An item's key is (index, epoch), and its augmentation depends on (seed, epoch, index) alone: any order and any
    number of processes give the same pixels.

    Args:
        source: whole images.
        size: side of the crop in pixels.
        crop: "random-resized", or "center" for the crop of evaluation.
        flip: mirror with probability one half.
        seed: of crops and flips.
        on_bad_image: "error", or "skip": take the next readable image instead, log and count the bad one.
        min_area: least share of the image's area in a random-resized crop.

    Raises:
        ValueError: settings out of range.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        crop: Literal["random-resized", "center"] = "random-resized",
        flip: bool = True,
        seed: int = 0,
        on_bad_image: Literal["error", "skip"] = "error",
        min_area: float = 0.5,
    ):
        if size < 2:
            raise ValueError(f"the size of images must be at least 2, not {size}")
        if crop not in ("random-resized", "center"):
            raise ValueError(f"crop must be random-resized or center, not {crop!r}")
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be error or skip, not {on_bad_image!r}")
        if not 0 < min_area <= 1:
            raise ValueError(f"min_area must be in (0, 1], not {min_area}")
        if seed < 0:
            raise ValueError(f"the seed must not be negative, it is {seed}")
        self.source = source
        self.size = size
        self.crop = crop
        self.flip = flip
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.min_area = min_area
        self._logged: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """Args: item: (index, epoch).

        Returns:
            `image`: uint8 (3, size, size); `label`: class index or -1; `skipped`: bad images passed over for this one.

        Raises:
            BadImageError: the image cannot be read, or, with "skip", none can.
        """
        index, epoch = item
        generator = seeding.generator("augmentation", self.seed, epoch, index)
        for skipped in range(len(self)):
            place = (index + skipped) % len(self)
            try:
                image = _read(self.source, place, lambda whole: self._crop(whole, generator))
            except BadImageError as error:
                if self.on_bad_image == "error":
                    raise
                if place not in self._logged:
                    logger.warning("skipped: %s", error)
                    self._logged.add(place)
                continue
            if self.flip and torch.rand((), generator=generator) < 0.5:
                image = image.flip(-1)
            return {"image": image.contiguous(), "label": self.source.label(place), "skipped": skipped}
        raise BadImageError(f"none of the {len(self)} images can be read, {shown(self.source.name(index))} among them")

    def __getitems__(self, items: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """Several items: a batch, which a DataLoader reads at once."""
        read_ahead(self.source, [index for index, _ in items])
        return [self[item] for item in items]

    def _crop(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if self.crop == "center":
            return center_crop(image, self.size)
        return random_resized_crop(image, self.size, generator, (self.min_area, 1.0))


def _read(source: Source, index: int, crop: Callable[[Tensor], Tensor]) -> Tensor:
    """One image of a source, cropped; a crop that fails names the image too."""
    image = source.image(index)
    try:
        return crop(image)
    except BadImageError as error:
        raise BadImageError(f"cannot crop {shown(source.name(index))}: {error}") from None


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The images of each micro-batch of this process, as lists of (index, epoch).

    The samples of a run are numbered: position j of step s is number p = s * batch_size + j, which is image
    permutation(seed, epoch)[p % num_images] of epoch p // num_images. So each epoch shows every image exactly once,
    whatever the batch size, and `start_step` alone says what comes next.

    Micro-batch m of a step has the positions from m * micro_batch_size on. Of a step's M micro-batches, process r of P
    takes M / P, from r * M / P on: two processes compute the same micro-batches as one with twice the accumulation.

    Args:
        num_images: of the source.
        batch_size: images per step over all processes.
        micro_batch_size: images per list.
        start_step: number of steps done.
        num_steps: number of steps to do.
        seed: of the permutations.
        process_index: this process, from 0.
        num_processes: number of processes.

    Raises:
        ValueError: numbers out of range, or a batch that does not divide into processes times micro-batches.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        micro_batch_size: int,
        start_step: int,
        num_steps: int,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if num_images < 1 or batch_size < 1 or micro_batch_size < 1:
            raise ValueError(
                f"num_images, batch_size and micro_batch_size must be at least 1, not {num_images}, {batch_size},"
                f" {micro_batch_size}"
            )
        if start_step < 0 or num_steps < 0 or seed < 0:
            raise ValueError(f"start_step, num_steps and seed must not be negative: {start_step}, {num_steps}, {seed}")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"there is no process {process_index} among {num_processes}")
        if batch_size % (micro_batch_size * num_processes):
            raise ValueError(
                f"a batch of {batch_size} does not divide into {num_processes} processes times micro-batches of"
                f" {micro_batch_size}"
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.start_step = start_step
        self.num_steps = num_steps
        self.seed = seed
        self.process_index = process_index
        self.accumulation = batch_size // (micro_batch_size * num_processes)

    def __len__(self) -> int:
        """Micro-batches."""
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = -1, torch.empty(0)
        for step in range(self.start_step, self.start_step + self.num_steps):
            for micro in range(self.process_index * self.accumulation, (self.process_index + 1) * self.accumulation):
                start = step * self.batch_size + micro * self.micro_batch_size
                batch = []
                for number in range(start, start + self.micro_batch_size):
                    if number // self.num_images != epoch:
                        epoch = number // self.num_images
                        permutation = torch.randperm(
                            self.num_images, generator=seeding.generator("order", self.seed, epoch)
                        )
                    batch.append((int(permutation[number % self.num_images]), epoch))
                yield batch


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def training_loader(dataset: Dataset, batches: StepBatches, num_workers: int) -> DataLoader:
    """Loads the micro-batches in worker processes with one thread each, two batches ahead per worker.

    Args:
        dataset: what to load from.
        batches: in what order.
        num_workers: processes, at most one for each available CPU core; 0: load in this process.

    Returns:
        Batches of `image` uint8 (B, 3, size, size), `label` int64 (B,), `skipped` int64 (B,).
    """
    num_workers = min(num_workers, available_cores())
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # The loader draws a seed for its workers, which is not used; it must not come from the run's generator.
        generator=torch.Generator(),
    )


def evaluation_batches(
    source: Source, size: int, batch_size: int, process_index: int = 0, num_processes: int = 1
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Every image of a source exactly once over all processes, cut by `center_crop`, in the source's order.

    Process r of P gets the images r, r + P, r + 2 P, ... The last batch may be smaller. Images are decoded one batch
    ahead, in as many threads as torch uses.

    Yields:
        names; labels int64 (B,), -1: none; images uint8 (B, 3, size, size).

    Raises:
        BadImageError: an image cannot be read: an evaluation leaves none out.
        ValueError: numbers out of range.
    """
    if size < 2 or batch_size < 1 or not 0 <= process_index < num_processes:
        raise ValueError(
            f"size must be at least 2, batch_size 1, and the process one of {num_processes}, not {size}, {batch_size},"
            f" {process_index}"
        )
    indices = range(process_index, len(source), num_processes)
    return _decoded_ahead(source, size, [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)])


def _decoded_ahead(source: Source, size: int, batches: list[range]) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    def load(index: int) -> Tensor:
        return _read(source, index, lambda whole: center_crop(whole, size))

    def begin(batch: range) -> Iterator[Tensor]:
        read_ahead(source, batch)
        return pool.map(load, batch)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        ahead = begin(batches[0] if batches else range(0))
        for batch, following in zip(batches, [*batches[1:], range(0)]):
            images, ahead = ahead, begin(following)
            labels = torch.tensor([source.label(index) for index in batch])
            yield [source.name(index) for index in batch], labels, torch.stack(list(images))
