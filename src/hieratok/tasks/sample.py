"""`hieratok sample`: images from a generator, decoded at one scale or at all (paper, appendix D).

Image i depends on the seed, i and the settings alone, which its PNG records: so processes can share the images, and the
same command makes missing or damaged ones. Several processes: `torchrun --nproc-per-node 8 -m -- hieratok
sample ...` (without the `--` torchrun may take `--num` for an option of its own).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from hieratok.core import checkpoint
from hieratok.core.devices import best_device
from hieratok.core.distributed import process, process_group, wait
from hieratok.core.files import read_bytes, read_json_table, shown
from hieratok.core.lock import lock
from hieratok.core.pictures import save_png, to_pil
from hieratok.core.pixels import MAX_IMAGE_BYTES, open_image
from hieratok.core.pixels import read_image as read_pixels
from hieratok.core.progress import progress
from hieratok.data.images import to_uint8
from hieratok.data.latents import whose
from hieratok.generation.config import Sample, SampleConfig
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import Samples, class_labels, fitted, sample_latents
from hieratok.tokenizer.pretrained import Tokenizer, describe_tokenizer, load_tokenizer
from hieratok.training.runs import read_run

logger = logging.getLogger(__name__)

METADATA, ARCHIVE, SHEET = "metadata.json", "samples.npz", "contact-sheet.png"
MARK = "hieratok"
"""Name of the text in each PNG that identifies it: `mark`."""
SHEET_IMAGES, SHEET_COLUMNS = 64, 8
SHEET_ROWS = 16  # of a contact sheet with every scale


def sample(options: Sample) -> None:
    """The command `hieratok sample`.

    Raises:
        FileNotFoundError, ValueError: missing models, models that do not fit each other or the settings, images of
            other settings in `out`, or another process that writes there.
    """
    with process_group():
        device = options.device or best_device()
        generator = DiT.from_pretrained(options.run, device=device)
        tokenizer = load_tokenizer(options.tokenizer, device, latent_size=generator.config.latent_size)
        options = fitted(options, generator.config)
        check_models(generator, tokenizer, options.run, options.tokenizer)
        out = Path(options.out)
        sides = written_sides(tokenizer, options)
        with lock(out, "sample"):
            metadata = describe(options, sides)
            settings = settings_sha256(metadata)
            missing = start(out, metadata, settings)
            draw(generator, tokenizer, options, sides, settings, missing)
            wait()
            if process()[0] == 0:
                labels = class_labels(options.labels, range(options.num), generator.config.num_classes, options.seed)
                write_npz(out / ARCHIVE, out, sides[-1], labels)
                save_png(contact_sheet(out, sides, options.num), out / SHEET)
                print(f"{options.num:,} images: {out / folder_name(sides[-1])}\npictures: {out / SHEET}")
                print(f"next:     hieratok evaluate samples {quote(str(out / ARCHIVE))} --reference PATH")
            wait()


def check_models(generator: DiT, tokenizer: Tokenizer, run: str, source: str) -> None:
    """Check that a generator's latents are those of a tokenizer.

    Args:
        generator: loaded from `run`.
        tokenizer: loaded from `source`.
        run: for messages, and to find its tokenizer.
        source: for messages.

    Raises:
        ValueError: they are not.
    """
    shape = (tokenizer.config.latent_channels, *tokenizer.config.grid)
    if generator.config.latent_shape != shape:
        made, taken = (" x ".join(map(str, s)) for s in (generator.config.latent_shape, shape))
        raise ValueError(f"{run} makes latents {made}, but {source} takes {taken}")
    if generator.latents is None:
        raise ValueError(f"{run} does not name the tokenizer of its latents (no `latents` in config.json)")
    if generator.latents.encoder_sha256 != tokenizer.encoder_sha256:
        settings = read_run(Path(run)).settings if Path(run).is_dir() else {}
        raise ValueError(f"{run} was trained on latents of {whose(settings.get('tokenizer'), source)}")


def written_sides(tokenizer: Tokenizer, options: Sample) -> list[int]:
    """The sides in pixels of the written scales, coarse to fine."""
    sides = [tokenizer.config.patch_size * s for s in tokenizer.config.scales]
    return sides if options.preview or options.scales == "all" else sides[-1:]


def folder_name(side: int) -> str:
    """Folder of a scale's images."""
    return f"{side}px"


def image_path(out: Path, side: int, index: int) -> Path:
    """Path of one image at one scale."""
    return out / folder_name(side) / f"{index:06d}.png"


def start(out: Path, metadata: dict[str, Any], settings: str) -> list[int]:
    """Begin a folder, or resume it; every process must call it.

    Returns:
        The images of this process's share that are missing or damaged at any scale.

    Raises:
        ValueError: it holds images of other settings. The number of images may differ.
    """
    if (out / METADATA).is_file():
        before = read_settings(out)
        differing = [
            f"{name} {before.get(name)!r} -> {value!r}"
            for name, value in metadata["settings"].items()
            if before.get(name) != value and not (name == "num" and before.get(name, 0) < value)
        ]
        if differing:
            raise ValueError(f"{out} holds images of other settings ({', '.join(differing)}): choose another --out")
    rank, world = process()
    sides, mine = metadata["settings"]["sides"], range(metadata["settings"]["num"])[rank::world]
    missing = [i for i in mine if not all(is_whole(out, side, i, settings) for side in sides)]
    wait()  # until all processes have looked
    if rank == 0:
        for side in sides:
            (out / folder_name(side)).mkdir(parents=True, exist_ok=True)
            checkpoint.remove_leftovers(out / folder_name(side) / "*.png")
        for name in (METADATA, ARCHIVE, SHEET):
            checkpoint.remove_leftovers(out / name)
        checkpoint.write_json(out / METADATA, metadata)
    wait()
    return missing


def is_whole(out: Path, side: int, index: int, settings: str) -> bool:
    """Whether an image of these settings, scale and index exists and is intact."""
    path = image_path(out, side, index)
    if not path.is_file():
        return False
    try:
        with open_image(read_bytes(path, MAX_IMAGE_BYTES), with_texts=True) as image:
            found = image.info.get(MARK) == mark(settings, side, index) and image.size == (side, side)
            image.verify()  # every chunk's checksum, which decoding does not check
    except (OSError, ValueError, SyntaxError):
        found = False
    if not found:
        logger.warning("%s is damaged, or a picture of something else: it is drawn again", path)
    return found


def mark(settings: str, side: int, index: int) -> str:
    """The text that identifies an image's PNG."""
    return f"{settings} {side}px {index}"


def settings_sha256(metadata: dict[str, Any]) -> str:
    """SHA-256 of all that an image depends on besides its index: the settings without the number of images."""
    settings = {name: value for name, value in metadata["settings"].items() if name not in ("num", "sides")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def describe(options: Sample, sides: list[int]) -> dict[str, Any]:
    """`metadata.json`: under `settings` all that the images depend on, and other facts."""
    values = dataclasses.asdict(options)
    sampling = {f.name: values[f.name] for f in dataclasses.fields(SampleConfig) if f.name != "batch_size"}
    generator = checkpoint.file_sha256(checkpoint.find(options.run, inside="generator") / checkpoint.WEIGHTS)
    hashes = {"generator_sha256": generator, "tokenizer_sha256": describe_tokenizer(options.tokenizer)[0]}
    settings = {**sampling, "precision": options.precision, "sides": sides, **hashes}
    others = {"run": options.run, "tokenizer": options.tokenizer, "batch_size": options.batch_size}
    versions = {f"{name}_version": importlib.metadata.version(name) for name in ("hieratok", "torch")}
    return json.loads(json.dumps({"settings": settings, **others, **versions}))  # lists for tuples, as in the file


def read_settings(out: Path) -> dict[str, Any]:
    """The settings of the images in `out`."""
    settings = read_json_table(out / METADATA).get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{shown(out / METADATA)} is damaged: choose another --out")
    return settings


def draw(
    generator: DiT, tokenizer: Tokenizer, options: Sample, sides: list[int], settings: str, missing: list[int]
) -> None:
    """Write this process's missing images; on a GPU a batch is decoded while the next is sampled."""
    if options.compile:
        generator.compile(dynamic=False)
    device = next(generator.parameters()).device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    indices = whole_batches(missing, options) if options.compile else missing
    written = None
    with (
        progress(unit="images", title="sample", total=len(missing)) as bar,
        ThreadPoolExecutor(1) as pool,
    ):
        for batch in sample_latents(generator, options, indices, options.precision):
            if written:
                written.result()
            if stream:
                stream.wait_stream(torch.cuda.current_stream(device))
            written = pool.submit(write_images, generator, tokenizer, options, sides, settings, batch, stream)
            if stream is None:  # on a CPU all cores sample already
                written.result()
            bar.update(len(set(batch.indices)))
        if written:
            written.result()


def whole_batches(indices: list[int], options: Sample) -> list[int]:
    """Repeats the last index until every batch has the same size, for a compiled generator."""
    size = min(options.batch_size, len(indices))
    return indices + indices[-1:] * (-len(indices) % max(1, size))


@torch.inference_mode()
def write_images(
    generator: DiT,
    tokenizer: Tokenizer,
    options: Sample,
    sides: list[int],
    settings: str,
    batch: Samples,
    stream: "torch.cuda.Stream | None",
) -> None:
    """Decode a batch of latents, on a stream of its own if there is one, and write its pictures."""
    assert generator.latents is not None
    with torch.cuda.stream(stream):  # does nothing for None
        z = generator.latents.denormalize(batch.latents.float())
        for side, images in zip(sides, decoded(tokenizer, z, options)):
            for index, image in zip(batch.indices, to_uint8(images).cpu()):
                text = {MARK: mark(settings, side, index)}
                save_png(to_pil(image), image_path(Path(options.out), side, index), text)


def decoded(tokenizer: Tokenizer, z: Tensor, options: Sample) -> Iterator[Tensor]:
    """z (B, d, h, w) -> images (B, 3, H_k, W_k) of the written scales, coarse to fine."""
    if options.preview:
        yield from tokenizer.decode_progressive(z)
    elif options.scales == "all":
        yield from tokenizer.decode_pyramid(z)
    else:
        yield tokenizer.decode(z)


def read_image(out: Path, side: int, index: int) -> Tensor:
    """uint8 (3, H, W)."""
    return read_pixels(image_path(out, side, index))


def write_npz(path: Path, out: Path, side: int, labels: Tensor) -> None:
    """The layout of ADM's evaluation suite: `arr_0` uint8 (N, H, W, 3), `arr_1` int64 (N,) classes.

    Written image by image, as 50,000 images of 256 px take 10 GB.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), side, side, 3)}
    with checkpoint.atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
            for index in range(len(labels)):
                file.write(read_image(out, side, index).permute(1, 2, 0).contiguous().numpy().tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy(), allow_pickle=False)


def contact_sheet(out: Path, sides: list[int], num: int) -> Image.Image:
    """The first images side by side; with several scales one row per image, coarse to fine, enlarged to one size."""
    if len(sides) == 1:
        images = [read_image(out, sides[0], i) for i in range(min(num, SHEET_IMAGES))]
        return to_pil(make_grid(images, nrow=SHEET_COLUMNS, pad_value=255))
    rows = range(min(num, SHEET_ROWS))
    images = [read_image(out, side, i)[None] for i in rows for side in sides]
    images = [F.interpolate(image, (sides[-1], sides[-1]), mode="nearest") for image in images]
    return to_pil(make_grid(torch.cat(images), nrow=len(sides), pad_value=255))
