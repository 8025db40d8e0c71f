"""`hieratok reconstruct`: photos through a trained tokenizer, every scale as a picture."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hieratok.core import seeding
from hieratok.core.devices import best_device
from hieratok.core.distributed import process, process_group
from hieratok.core.files import shown
from hieratok.core.pictures import MAX_CELL, fit, picture_table, save_png, to_pil
from hieratok.core.progress import progress
from hieratok.data.images import Source, center_crop, evaluation_batches, open_source, to_float, to_uint8
from hieratok.evaluation.protocols import EvaluateReconstruction, evaluate_reconstruction
from hieratok.evaluation.results import Result, WritePage
from hieratok.tokenizer.model import HieraTok
from hieratok.tokenizer.tiling import reconstruct_tiled
from hieratok.training.tokenizer import reconstruct_pyramid

MOST_STEM_BYTES = 200
SHEET_ROWS = 50  # a contact sheet of more would be too tall to look at


@torch.inference_mode()
def reconstruct(
    tokenizer: HieraTok,
    images: list[str],
    out: str | Path,
    device: str | torch.device = "cpu",
    crop: bool = False,
) -> list[Path]:
    """Write `NAME-16px.png`, ... (every scale, from the posterior mean) for each image, and `contact-sheet.png`.

    Args:
        tokenizer: on any device.
        images: files, folders, globs or shards, of any size.
        out: made if need be.
        device: where to compute.
        crop: cut each image to the tokenizer's size first, as evaluation does (ADM's crop).

    Returns:
        The files written, the contact sheet last (its first 50 images).

    Raises:
        FileNotFoundError, ValueError: no images, an unreadable one, or two whose files would have one name.
    """
    source = open_source(images)
    stems = file_stems(source)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer.to(device).eval()
    side = tokenizer.config.image_size
    finest, patch = tokenizer.config.scales[-1], tokenizer.config.patch_size
    titles = [f"{patch * s} px" if s < finest else "finest" for s in tokenizer.config.scales]
    columns: dict[str, list[Tensor]] = {title: [] for title in [*titles, "original"]}
    written = []
    for i, stem in enumerate(progress(stems, unit="images", title="reconstruct")):
        image = center_crop(source.image(i), side) if crop else source.image(i)
        pyramid = reconstruct_any(tokenizer, image)
        for s, scale in zip(tokenizer.config.scales, pyramid, strict=True):
            written.append(save_png(to_pil(scale), out / f"{stem}-{patch * s}px.png"))
        if i < SHEET_ROWS:
            for column, picture in zip(columns.values(), [*pyramid, image]):
                column.append(fit(picture, min(MAX_CELL, picture.shape[-2]), min(MAX_CELL, picture.shape[-1])))
    written.append(save_png(picture_table(columns), out / "contact-sheet.png"))
    return written


def reconstruct_any(tokenizer: HieraTok, image: Tensor) -> list[Tensor]:
    """Every scale's reconstruction of an image of any size: whole up to the training size, else in tiles.

    Args:
        tokenizer: positions are interpolated for sizes below that of its training.
        image: uint8 (3, H, W).

    Returns:
        uint8 (3, H_k, W_k), coarse to fine; the finest has the image's size.
    """
    config = tokenizer.config
    if max(image.shape[-2:]) <= config.image_size:
        return [x[0] for x in reconstruct_pyramid(tokenizer, image[None])]
    with progress(unit="tiles", title="tiles", leave=False, hide=image[0].numel() < 10 * config.image_size**2) as bar:
        return reconstruct_tiled(
            lambda tiles: reconstruct_pyramid(tokenizer, tiles), image, config, progress=bar.update
        )


@torch.inference_mode()
def reconstruction_pairs(
    tokenizer: HieraTok, source: Source, options: EvaluateReconstruction
) -> Iterator[tuple[list[str], Tensor, list[Tensor]]]:
    """What `evaluate reconstruction` compares: (names, uint8 originals, uint8 reconstructions), this process's share.

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
        FileNotFoundError, ValueError: no such run, images or weights, or options that the protocol fixes.
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
    """Each image's name within its source as the start of a file name: folders become dashes, the suffix goes.

    Raises:
        ValueError: two images would have the same.
    """
    names: dict[str, str] = {}
    for name in (source.name(i) for i in range(len(source))):
        stem = shortened(os.path.splitext(name)[0].replace("/", "-").replace("\\", "-"))
        if stem in names:
            raise ValueError(
                f"{shown(names[stem])} and {shown(name)} would both be written as {shown(stem)}-...px.png: rename one"
            )
        names[stem] = name
    return list(names)


def shortened(stem: str) -> str:
    """A name that leaves room for an ending: of more than 200 bytes the first, and a hash of all."""
    data = os.fsencode(stem)
    if len(data) <= MOST_STEM_BYTES:
        return stem
    return f"{os.fsdecode(data[: MOST_STEM_BYTES - 9])}-{hashlib.sha256(data).hexdigest()[:8]}"
