"""Image autoencoders of diffusers: from their folders, never downloaded and never unpickled."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hieratok.core import checkpoint
from hieratok.core.extras import needs_extras
from hieratok.core.files import check_regular, read_json_table, shown

CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
"""SD-VAE and VA-VAE; DC-AE; TAESD."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
MOST_LAYERS, MOST_NUMBER = 100, 1_000_000  # limits in a config: larger values are wrong
LEAST_LOGVAR = -30.0
"""For a latent without a variance: the posterior's clamp, a deviation of 3e-7, practically zero."""


def class_of(source: str | Path) -> str | None:
    """The class in a folder's `config.json`, if diffusers wrote it.

    Raises:
        ValueError: not JSON, or a class other than the supported autoencoders.
    """
    path = Path(source) / checkpoint.CONFIG
    if not path.is_file():
        return None
    kind = read_json_table(path).get("_class_name")
    if kind is not None and kind not in CLASSES:
        raise ValueError(
            f"{shown(path)} describes a {shown(kind)}; of diffusers' models {', '.join(CLASSES)} can be used"
        )
    return kind


def known_class(folder: Path) -> str:
    """The same of a folder that must hold an autoencoder.

    Raises:
        ValueError: it holds none.
    """
    kind = class_of(folder)
    if kind is None:
        raise ValueError(f"{shown(folder)} holds no autoencoder of diffusers: its {checkpoint.CONFIG} names none")
    return kind


def load(source: str | Path, kind: str) -> Any:
    """diffusers' own model from a local folder, in evaluation mode.

    Raises:
        ValueError: diffusers is not installed, or the files do not fit.
    """
    with needs_extras():
        import diffusers
    where, config = f"{source} cannot be loaded as {kind}", read_json_table(Path(source) / checkpoint.CONFIG)
    for name, value in config.items():
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int | float)]
        most = MOST_LAYERS if name.endswith("layers_per_block") else MOST_NUMBER
        if any(n > most for n in numbers) or (isinstance(value, list) and len(value) > MOST_LAYERS):
            raise ValueError(f"{where}: {name} {shown(value)[:80]} in its {checkpoint.CONFIG} is out of range")
    check_regular(Path(source) / WEIGHTS)
    try:
        return getattr(diffusers, kind).from_pretrained(source, use_safetensors=True, local_files_only=True).eval()
    except Exception as error:  # diffusers raises errors of any type for a wrong config or file
        raise ValueError(f"{where}: {shown(' '.join(str(error).split()))[:300]}") from error


def patch_size(config: Mapping[str, Any]) -> int:
    """f of an autoencoder with this configuration: it halves the image after every block but the last."""
    name = "block_out_channels" if "block_out_channels" in config else "encoder_block_out_channels"
    return 2 ** (len(config[name]) - 1)


def latent_channels(config: Mapping[str, Any]) -> int:
    """d of an autoencoder with this configuration."""
    return int(config["latent_channels"])


def encoding_parts(model: Any) -> nn.ModuleDict:
    """The part that the latents depend on."""
    parts = {name: getattr(model, name, None) for name in ("encoder", "quant_conv")}
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})


def moments(model: Any, images: Tensor, shift: float = 0.0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [-1, 1], of sides divisible by f -> mean and log-variance of the latents, each
    (B, d, h, w): raw, or (latent - shift) * scale. A deterministic autoencoder's log-variance is the lowest."""
    output = model.encode(images)
    if hasattr(output, "latent_dist"):
        mean, logvar = output.latent_dist.mean, output.latent_dist.logvar
        return (mean - shift) * scale, logvar + 2 * math.log(abs(scale))
    z = ((output.latents if hasattr(output, "latents") else output.latent) - shift) * scale
    return z, torch.full_like(z, LEAST_LOGVAR)
