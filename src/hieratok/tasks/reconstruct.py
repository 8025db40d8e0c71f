"""`hieratok reconstruct`: reconstruct photos with a trained tokenizer, at every scale."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from hieratok.core import seeding
from hieratok.core.devices import best_device
from hieratok.core.distributed import process, process_group
from hieratok.core.files import shown
from hieratok.core.pictures import MAX_CELL, fit, picture_table, save_png, to_pil
from hieratok.core.progress import progress
from hieratok.data.images import Source, center_crop, evaluation_batches, flat_stem, open_source, to_float, to_uint8
from hieratok.evaluation.protocols import EvaluateReconstruction, evaluate_reconstruction
from hieratok.evaluation.results import Result, WritePage
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.tiling import fits_tiles, reconstruct_tiled
from hieratok.training.tokenizer import reconstruct_pyramid

SHEET_ROWS = 50  # largest number on a contact sheet


@dataclass(frozen=True)
class Reconstructions:
    """The result of `reconstruct`."""

    files: list[Path]
    """One PNG for each scale of each photo."""
    sheet: Path
    """The contact sheet."""
    photos: int
    whole: int
    """Number of photos that were not reconstructed in tiles."""
    sizes: list[tuple[int, int]]
    """The different sizes (H, W) of the photos."""
    tile: int
    """Side of a tile in pixels."""
    images: list[str]
    """Paths as given."""
    cropped: bool
    """Whether photos were cropped first."""

    def summary(self) -> str:
        """A summary, one line for each fact."""
        lines = [f"{len(self.files)} pictures and {self.sheet}"]
        if self.photos > SHEET_ROWS:
            lines.append(f"the sheet stops after {SHEET_ROWS} of {self.photos:,} photos")
        if self.sizes != [(self.tile, self.tile)] and self.whole < self.photos:
            lines.append(
                f"every scale in tiles of {self.tile} px, the training size: overlapping for larger photos, padded for"
                " smaller ones"
            )
        if self.whole:
            lines.append(f"whole: {self.whole:,} of {self.photos:,} photos, as these scales cannot be tiled")
        if len(self.images) == 1 and len(self.sizes) == 1:  # only then one suffix fits all photos
            words = ["hieratok", "evaluate", "images", self.images[0], str(self.sheet.parent)]
            words += [f"--suffix=-{size_name(self.sizes[0])}", *(["--size", str(self.tile)] if self.cropped else [])]
            lines.append(f"next: {shlex.join(words)} --features none --lpips '[]'")
        return "\n".join(lines)


@torch.inference_mode()
def reconstruct(
    tokenizer: HieraTok,
    images: list[str],
    out: str | Path,
    device: str | torch.device = "cpu",
    crop: bool = False,
) -> Reconstructions:
    """Write a PNG for every scale of each photo, from the posterior mean, and `contact-sheet.png` of the first 50.

    File names have the picture's size: NAME-16px.png or NAME-64x48px.png. If scales of a tiny photo have the same size,
    the finest is kept.

    Args:
        tokenizer: on any device.
        images: files, folders, globs or shards, of any size.
        out: created if needed.
        device: where to compute.
        crop: crop each image to the tokenizer's size first, as evaluation does (ADM's crop).

    Raises:
        FileNotFoundError, ValueError: no images, an unreadable image, or two whose files would have the same name.
    """
    source = open_source(images)
    stems = file_stems(source)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer.to(device).eval()
    config, side = tokenizer.config, tokenizer.config.image_size
    rows: list[list[Tensor]] = []  # of the sheet: a photo's pictures and the photo, as large as its cells
    names: list[list[str]] = []  # their sizes
    files: dict[Path, None] = {}
    sizes: dict[tuple[int, int], None] = {}
    whole = 0
    for i, stem in enumerate(progress(stems, unit="images", title="reconstruct")):
        image = center_crop(source.image(i), side) if crop else source.image(i)
        size = size_of(image)
        pyramid = reconstruct_any(tokenizer, image)
        for scale in pyramid:
            files[save_png(to_pil(scale), out / f"{stem}-{size_name(size_of(scale))}.png")] = None
        sizes[size] = None
        whole += not fits_tiles(config, size)
        if i < SHEET_ROWS:
            pictures = [*pyramid, image]
            rows.append([fit(x, min(MAX_CELL, x.shape[-2]), min(MAX_CELL, x.shape[-1])) for x in pictures])
            names.append([size_name(size_of(picture)) for picture in pyramid])
    titles = [*column_titles(names, config.scales), "original"]
    sheet = save_png(picture_table(dict(zip(titles, zip(*rows), strict=True))), out / "contact-sheet.png")
    return Reconstructions(list(files), sheet, len(stems), whole, list(sizes), side, images, crop)


def size_of(image: Tensor) -> tuple[int, int]:
    """(H, W)."""
    return image.shape[-2], image.shape[-1]


def size_name(size: tuple[int, int]) -> str:
    """(H, W) in file names and titles: 16px, or 64x48px, width by height, if they differ."""
    height, width = size
    return f"{width}px" if width == height else f"{width}x{height}px"


def column_titles(names: list[list[str]], scales: tuple[int, ...]) -> list[str]:
    """Column titles of a contact sheet: the pictures' size if equal in all rows, else their share of the photo's size.

    Args:
        names: the sizes in each row, coarse to fine.
        scales: the tokenizer's; their titles differ.
    """
    columns = [set(column) for column in zip(*names)]
    if all(len(column) == 1 for column in columns) and len(set.union(*columns)) == len(columns):
        return names[0]
    return [f"{Fraction(s, scales[-1])} size" if s < scales[-1] else "full size" for s in scales]


def reconstruct_any(tokenizer: HieraTok, image: Tensor) -> list[Tensor]:
    """Every scale's reconstruction of an image of any size, in tiles of the training size.

    A smaller image is padded to one tile. If several are needed and the scales cannot be tiled, the image is
    reconstructed whole, with interpolated positions; the cost of attention is then quadratic in the number of tokens.

    Args:
        tokenizer: on any device.
        image: uint8 (3, H, W).

    Returns:
        uint8 (3, H_k, W_k), coarse to fine; the finest has the image's size.
    """
    config = tokenizer.config
    if not fits_tiles(config, size_of(image)):
        return [x[0] for x in reconstruct_pyramid(tokenizer, image[None])]
    with progress(unit="tiles", title="tiles", leave=False, hide=image[0].numel() < 10 * config.image_size**2) as bar:
        return reconstruct_tiled(
            lambda tiles: reconstruct_pyramid(tokenizer, tiles), image, config, progress=bar.update
        )


@torch.inference_mode()
def reconstruction_pairs(
    tokenizer: HieraTok, source: Source, options: EvaluateReconstruction
) -> Iterator[tuple[list[str], Tensor, list[Tensor]]]:
    """This process's share of (names, uint8 originals, uint8 reconstructions) for `evaluate reconstruction`.

    Originals are ADM-cropped to the tokenizer's size; reconstructions are of the finest scale, or of all if
    `options.scales`, from the posterior's mean, or a sample if `options.sample` (seeded by the image's name).
    """
    device = next(tokenizer.parameters()).device
    rank, world = process()
    for names, _, originals in evaluation_batches(source, tokenizer.config.image_size, options.batch_size, rank, world):
        posterior = tokenizer.encode(to_float(originals.to(device)))
        if options.sample:
            generators = [seeding.generator("posterior", name) for name in names]
            noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in generators]).to(device)
            z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
        else:
            z = posterior.mode()
        pyramid = tokenizer.decode_pyramid(z)
        yield names, originals, [to_uint8(x).cpu() for x in (pyramid if options.scales else pyramid[-1:])]


def evaluate_tokenizer(options: EvaluateReconstruction, write_page: WritePage | None = None) -> Result:
    """The command `hieratok evaluate reconstruction`; `write_page` adds a page to `options.out`.

    Raises:
        FileNotFoundError, ValueError: a missing run, images or weights, or options that the protocol fixes.
    """
    tokenizer = HieraTok.from_pretrained(options.run)
    side = tokenizer.config.image_size
    if options.size not in (None, side):
        raise ValueError(f"--size {options.size}: images are cut to the tokenizer's own size, {side}")
    with process_group():
        tokenizer = tokenizer.to(options.device or best_device())
        source = open_source(options.data)
        rank, world = process()
        return evaluate_reconstruction(
            reconstruction_pairs(tokenizer, source, options),
            options,
            total=len(range(rank, len(source), world)),
            details={"crop": f"ADM centre crop to {side}", "precision": "float32"},
            write_page=write_page,
            patch_size=tokenizer.config.patch_size,
        )


def file_stems(source: Source) -> list[str]:
    """Each image's name within its source as the start of a file name (`flat_stem`).

    Raises:
        ValueError: two images would have the same.
    """
    names: dict[str, str] = {}
    for name in (source.name(i) for i in range(len(source))):
        stem = flat_stem(name)
        if stem in names:
            raise ValueError(
                f"{shown(names[stem])} and {shown(name)} would both be written as {shown(stem)}-...px.png: rename one"
            )
        names[stem] = name
    return list(names)
