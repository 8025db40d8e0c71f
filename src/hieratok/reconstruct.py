"""`hieratok reconstruct`: photos through a trained tokenizer, every scale as a picture."""

from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from hieratok import checkpoint
from hieratok.data.images import center_crop, open_source, to_float, to_uint8
from hieratok.pictures import pyramid_sheet, to_pil
from hieratok.tokenizer.model import HieraTok

SHEET_ROWS = 50  # a contact sheet of more would be too tall to look at


@torch.inference_mode()
def reconstruct(
    tokenizer: HieraTok, images: list[str], out: str | Path, device: str | torch.device = "cpu"
) -> list[Path]:
    """Write `NAME-16px.png`, ... (every scale, from the posterior mean) for each image, and `contact-sheet.png`.

    Args:
        tokenizer: on any device.
        images: files, folders, globs or shards; each image is ADM-cropped to the tokenizer's size.
        out: made if need be.
        device: where to compute.

    Returns:
        The files written, the contact sheet last (its first 50 images).

    Raises:
        FileNotFoundError, ValueError: no images, or an unreadable one.
    """
    source = open_source(images)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer.to(device).eval()
    written, rows, pyramids = [], [], []
    for i in tqdm(range(len(source)), unit=" images", desc="reconstruct"):
        image = center_crop(source.image(i), tokenizer.config.image_size)
        z = tokenizer.encode(to_float(image[None].to(device))).mode()
        pyramid = [to_uint8(x)[0].cpu() for x in tokenizer.decode_pyramid(z)]
        stem = file_stem(source.name(i))
        for scale in pyramid:
            written.append(save_png(to_pil(scale), out / f"{stem}-{scale.shape[-1]}px.png"))
        if len(rows) < SHEET_ROWS:
            rows.append(image)
            pyramids.append(pyramid)
    columns = [torch.stack(column) for column in zip(*pyramids)]
    written.append(save_png(pyramid_sheet(torch.stack(rows), columns), out / "contact-sheet.png"))
    return written


def file_stem(name: str) -> str:
    """An image's name within its source as the start of a file name: folders become dashes, the suffix goes."""
    return str(Path(name).with_suffix("")).replace("/", "-").replace("\\", "-")


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a PNG whole or not at all."""
    with checkpoint.atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")
    return path
