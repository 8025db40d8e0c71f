"""From photos to the tensors that models take, and back."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hieratok.core.pictures import to_pil
from hieratok.core.pixels import center_crop, from_picture, read_image, to_float, to_uint8

Photo = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A file, a Pillow image, or uint8 pixels: an array (H, W, 3) or a tensor (3, H, W)."""


def preprocess(photos: Photo | Sequence[Photo], size: int | None) -> Tensor:
    """`HieraTok.preprocess`, on the CPU.

    Args:
        photos: one or several; an array (B, H, W, 3) or a tensor (B, 3, H, W) counts as several.
        size: side for `center_crop`; None: no crop.

    Returns:
        float32 (B, 3, H, W) in [-1, 1].

    Raises:
        BadImageError: a file that cannot be read.
        ValueError: no photos, of another type or shape, or of different sizes.
    """
    several = photos if isinstance(photos, Sequence) and not isinstance(photos, str) else [photos]
    images = [image for photo in several for image in pixels_of(photo)]
    if size is not None:
        images = [center_crop(image, size) for image in images]
    if not images:
        raise ValueError("preprocess was given no photos")
    shapes = list(dict.fromkeys(tuple(image.shape[1:]) for image in images))
    if len(shapes) > 1:
        (h, w), (H, W) = shapes[:2]
        raise ValueError(
            f"photos of {w} x {h} and {W} x {H} px cannot be one batch: let preprocess crop them, or give one at a time"
        )
    return to_float(torch.stack(images))


def pixels_of(photo: object) -> list[Tensor]:
    """The image or images of one argument: uint8 (3, H, W) each, on the CPU."""
    if isinstance(photo, str | os.PathLike):
        return [read_image(photo)]
    if isinstance(photo, Image.Image):
        return [from_picture(photo)]
    if not isinstance(photo, np.ndarray | Tensor):
        raise ValueError(
            f"preprocess takes paths, Pillow images, uint8 arrays and tensors, or a list of them, not"
            f" {type(photo).__name__}"
        )
    if isinstance(photo, Tensor):
        kind, layout, channels = "tensor", "(3, H, W) or (B, 3, H, W)", photo.shape[-3:-2]
    else:
        kind, layout, channels = "array", "(H, W, 3) or (B, H, W, 3)", photo.shape[-1:]
    if str(photo.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(
            f"preprocess takes uint8 pixels, 0 to 255, not a {kind} of {photo.dtype}: what is in [-1, 1] already, as"
            " floating-point (B, 3, H, W), goes to encode as it is"
        )
    if photo.ndim not in (3, 4) or tuple(channels) != (3,) or 0 in photo.shape:
        raise ValueError(f"preprocess takes a uint8 {kind} of shape {layout}, not {tuple(photo.shape)}")
    if isinstance(photo, Tensor):
        images = photo.detach().cpu()
    else:
        images = torch.from_numpy(np.array(photo)).movedim(-1, -3)  # copied: torch refuses some arrays' strides
    return [images] if images.ndim == 3 else list(images)


def postprocess(images: Tensor) -> list[Image.Image]:
    """`HieraTok.postprocess`.

    Raises:
        NotFinite: NaN or infinite values.
        ValueError: another type or shape.
    """
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        kind = f"a {images.dtype} tensor" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"postprocess takes the floating-point images that decode gives, not {kind}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"postprocess takes images of shape (B, 3, H, W), not {tuple(images.shape)}")
    return [to_pil(image) for image in to_uint8(images.detach()).cpu()]
