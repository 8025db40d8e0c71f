"""The tokenizer's shape. Imports no torch, so that a command's help is fast."""

import re
from dataclasses import dataclass, fields
from typing import Literal, get_args

from hieratok.core.plugins import DOWNSAMPLERS

AttentionMode = Literal["full", "independent", "causal"]
DownsampleMode = Literal["interpolate", "conv"]
# Far beyond any real model: a file with more is wrong, and building the model would never end.
MOST = {
    "image_size": 65_536,
    "patch_size": 4_096,
    "latent_channels": 65_536,
    "encoder_width": 65_536,
    "encoder_depth": 1_000,
    "encoder_heads": 65_536,
    "decoder_width": 65_536,
    "decoder_depth": 1_000,
    "decoder_heads": 65_536,
}
MOST_SCALES = 64
PAPERS_ENCODER = ("encoder_width", "encoder_depth", "encoder_heads")
"""Settings of the paper's encoder, which a frozen one does not have."""
FROZEN = re.compile(r"(timm|diffusers):.*[^/\s]")


def check_name(encoder: str) -> None:
    """Raise ValueError if it names no frozen encoder."""
    if not (isinstance(encoder, str) and FROZEN.fullmatch(encoder)):
        raise ValueError(f"model.encoder must be timm:NAME or diffusers:FOLDER, not {encoder!r}")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's shape. The defaults are the paper's f16d16 multi-scale tokenizer at 256 px (tables 7 and 10).

    Raises:
        ValueError: settings that do not fit together; the message names them.
    """

    image_size: int = 256
    """Side of the (square) training images in pixels; a multiple of `patch_size`."""
    patch_size: int = 16
    """f: pixels per token side, which is the spatial compression."""
    latent_channels: int = 16
    """d: channels of the latent map z."""
    scales: tuple[int, ...] = (1, 2, 4, 8, 16)
    """S: tokens per side of every scale, ascending; the last is image_size / patch_size. One entry: a plain ViT."""
    attention: AttentionMode = "causal"
    """Which scales a decoder token attends to: its own and coarser ones (causal), its own (independent), all (full)."""
    downsample: DownsampleMode | str = "conv"
    """How coarse tokens are made from z: learnable convolutions (conv), area pooling (interpolate), or a plugin's."""
    encoder_width: int = 768
    """Channels of the encoder's tokens."""
    encoder_depth: int = 6
    """Transformer blocks of the encoder."""
    encoder_heads: int = 12
    """Attention heads of the encoder."""
    decoder_width: int = 1024
    """Channels of the decoder's tokens."""
    decoder_depth: int = 24
    """Transformer blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    mlp_ratio: float = 4.0
    """Hidden width of every MLP over its width."""
    drop_path: float = 0.1
    """Stochastic depth of the decoder's last block in training; earlier blocks less, in proportion to depth."""

    init_std: float = 0.02
    """Standard deviation of the initial weights; small models learn sooner with about 1 / sqrt(width). [ours]"""
    encoder: str | None = None
    """An encoder that was trained elsewhere and stays as it is: `timm:NAME` or `diffusers:FOLDER`. None: the paper's,
    which is trained. `--encoder` sets latent_channels, patch_size and scales as well. [ours]"""
    encoder_weights: str | None = None
    """File with the weights of a `timm:` encoder. None: the published ones in the hub's or torch's cache."""
    encoder_sha256: str | None = None
    """Of a frozen encoder's weights, which are refused if they have another. Training notes it."""

    def __post_init__(self):
        object.__setattr__(self, "scales", tuple(self.scales))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and 1 <= value <= MOST[field.name]):
                raise ValueError(
                    f"model.{field.name} must be a whole number from 1 to {MOST[field.name]:,}, not {value!r}"
                )
        if self.attention not in get_args(AttentionMode):
            choices = ", ".join(get_args(AttentionMode))
            raise ValueError(f"model.attention must be one of {choices}, not {self.attention!r}")
        DOWNSAMPLERS.check(self.downsample)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size {self.image_size} is not divisible by model.patch_size {self.patch_size}"
            )
        side = self.image_size // self.patch_size
        if not self.scales or any(not isinstance(s, int) or s < 1 for s in self.scales):
            raise ValueError(f"model.scales must be a list of positive whole numbers, not {list(self.scales)}")
        if sorted(set(self.scales)) != list(self.scales):
            raise ValueError(f"model.scales must ascend without repeats, not {list(self.scales)}")
        if self.scales[-1] != side:
            raise ValueError(
                f"model.scales {list(self.scales)} must end at the latent grid's side,"
                f" image_size / patch_size = {self.image_size} / {self.patch_size} = {side}"
            )
        self._check_encoder()
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads:
                raise ValueError(f"model.{part}_width {width} is not divisible by model.{part}_heads {heads}")
        if len(self.scales) > MOST_SCALES:
            raise ValueError(f"model.scales may have {MOST_SCALES} entries, not {len(self.scales)}")
        for name, most in (("mlp_ratio", 100), ("init_std", 100)):
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"model.{name} must be positive and at most {most}, not {getattr(self, name)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path must be in [0, 1), not {self.drop_path}")

    def _check_encoder(self) -> None:
        if self.encoder is None:
            if self.encoder_weights or self.encoder_sha256:
                raise ValueError("model.encoder_weights and model.encoder_sha256 are for a frozen model.encoder")
            return
        check_name(self.encoder)
        if self.encoder_weights and not self.encoder.startswith("timm:"):
            raise ValueError("model.encoder_weights is for timm: encoders: diffusers:FOLDER holds its own weights")
        for field in fields(self):
            if field.name in PAPERS_ENCODER and getattr(self, field.name) != field.default:
                raise ValueError(f"model.{field.name} is of the paper's encoder: leave it out beside model.encoder")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the latent map at the training size."""
        return (self.scales[-1], self.scales[-1])
