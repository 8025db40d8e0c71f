"""HieraTok: the multi-scale tokenizer.

Shapes used throughout: B batch, H W pixels, f patch size, h w = H/f W/f latent grid, d latent channels,
K scales (coarse to fine), h_k w_k token grid of scale k, N tokens of all scales, C transformer width.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok import checkpoint
from hieratok.layers import init_weights
from hieratok.tokenizer.attention import AttentionMode
from hieratok.tokenizer.downsample import AreaDownsample, ConvDownsample, DownsampleMode
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.scales import Scales
from hieratok.tokenizer.vit import Decoder, Encoder

# Far beyond any model there is: a file that asks for more is wrong, and building it would never end.
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
    """Who sees whom in the decoder: every scale up to one's own (causal), one's own (independent), all (full)."""
    downsample: DownsampleMode = "conv"
    """How coarse tokens are made from z: learnable convolutions (conv) or area pooling (interpolate)."""
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

    def __post_init__(self):
        object.__setattr__(self, "scales", tuple(self.scales))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and 1 <= value <= MOST[field.name]):
                raise ValueError(
                    f"model.{field.name} must be a whole number from 1 to {MOST[field.name]:,}, not {value!r}"
                )
        for name, choices in (("attention", get_args(AttentionMode)), ("downsample", get_args(DownsampleMode))):
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
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

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the latent map at the training size."""
        return (self.scales[-1], self.scales[-1])


class HieraTok(nn.Module):
    """Image -> latent map z -> image at every scale (paper, section 3.2)."""

    latent_mean: Tensor
    """(d,): mean of every latent channel over training images; NaN until measured."""
    latent_std: Tensor
    """(d,): its standard deviation."""

    def __init__(self, config: TokenizerConfig | None = None):
        super().__init__()
        self.config = c = config or TokenizerConfig()
        self.encoder = Encoder(
            c.grid, c.patch_size, c.latent_channels, c.encoder_width, c.encoder_depth, c.encoder_heads, c.mlp_ratio
        )
        if c.downsample == "conv" and len(c.scales) > 1:
            self.downsample = ConvDownsample(c.latent_channels, c.decoder_width, c.scales)
        else:
            self.downsample = AreaDownsample(c.latent_channels, c.decoder_width)
        self.decoder = Decoder(
            c.grid,
            len(c.scales),
            c.patch_size,
            c.decoder_width,
            c.decoder_depth,
            c.decoder_heads,
            c.mlp_ratio,
            c.drop_path,
            c.attention,
        )
        self.apply(lambda module: init_weights(module, c.init_std))
        for parameter in (self.encoder.positions, self.decoder.positions, self.decoder.scale_embeddings):
            nn.init.normal_(parameter, std=0.02)
        # Of the training images' latents, per channel; not known until measured (training does it when it ends).
        self.register_buffer("latent_mean", torch.full((c.latent_channels,), math.nan))
        self.register_buffer("latent_std", torch.full((c.latent_channels,), math.nan))

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """The latent's distribution.

        Args:
            images: (B, 3, H, W) in [-1, 1], of any size. Sides that are no multiples of the patch size are padded on
                the right and at the bottom by repeating the last column and row; positions are interpolated. [ours]

        Returns:
            Mean and log-variance over (B, d, ceil(H/f), ceil(W/f)); `.mode()` or `.sample()` gives z, `.image_size` is
            (H, W).

        Raises:
            ValueError: another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"encode takes images of shape (B, 3, H, W), not {tuple(images.shape)}")
        f, (H, W) = self.config.patch_size, images.shape[2:]
        if H % f or W % f:
            images = F.pad(images, (0, -W % f, 0, -H % f), mode="replicate")
        return DiagonalGaussian(*self.encoder(images), image_size=(H, W))

    def decode(self, z: Tensor, scale: int = -1, image_size: tuple[int, int] | None = None) -> Tensor:
        """z (B, d, h, w) -> one scale's image, the finest (B, 3, f h, f w) unless said otherwise, about [-1, 1] (not
        clamped).

        Args:
            z: latents.
            scale: k, counted from 0, coarse to fine; -1 is the finest. In causal and independent mode finer scales are
                not computed.
            image_size: (H, W) of what was encoded: the padding is cut off.

        Raises:
            ValueError: z has another shape, or there is no such scale.
        """
        scales = self.scales_of(z)
        if not -len(scales) <= scale < len(scales):
            raise ValueError(f"this tokenizer has scales 0 to {len(scales) - 1}, not {scale}")
        k = scale % len(scales)
        last = len(scales) - 1 if self.config.attention == "full" else k
        image = self.decoder(self.downsample(z, scales), scales, last)[k]
        return self._crop(image, scales.grids[-1], image_size)

    def decode_pyramid(self, z: Tensor, image_size: tuple[int, int] | None = None) -> list[Tensor]:
        """z (B, d, h, w) -> an image per scale, (B, 3, f h_k, f w_k), coarse to fine, about [-1, 1] (not clamped).

        With `image_size`, (H, W) of what was encoded, the padding is cut off, in proportion at coarse scales.

        Raises:
            ValueError: z has another number of dimensions or channels.
        """
        scales = self.scales_of(z)
        pyramid = self.decoder(self.downsample(z, scales), scales)
        return [self._crop(image, scales.grids[-1], image_size) for image in pyramid]

    def decode_progressive(self, z: Tensor, image_size: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """The images of `decode_pyramid`, each yielded as soon as it is known.

        In causal mode scale k's pixels depend on scales <= k alone, so a preview costs only its own prefix; keys and
        values are kept for the next scale. In full mode nothing is known before everything is.
        """
        scales = self.scales_of(z)
        if self.config.attention == "full":
            yield from self.decode_pyramid(z, image_size)
        else:
            for image in self.decoder.progressive(self.downsample(z, scales), scales):
                yield self._crop(image, scales.grids[-1], image_size)

    def _crop(self, image: Tensor, grid: tuple[int, int], image_size: tuple[int, int] | None) -> Tensor:
        """Cut a scale's image to the part that stands for an original of `image_size`, padded to `grid` patches."""
        if image_size is None:
            return image
        f = self.config.patch_size
        (h, w), (H, W) = grid, image_size
        if not (0 < H <= f * h and 0 < W <= f * w):
            raise ValueError(f"image_size {image_size} does not fit latents of {h} x {w} patches of {f} px")
        return image[..., : math.ceil(image.shape[-2] * H / (f * h)), : math.ceil(image.shape[-1] * W / (f * w))]

    def forward(self, images: Tensor) -> tuple[list[Tensor], DiagonalGaussian, Tensor]:
        """Training's pass: images (B, 3, H, W) -> pyramid of reconstructions of a sampled z, its posterior, and z."""
        posterior = self.encode(images)
        z = posterior.sample()
        return self.decode_pyramid(z), posterior, z

    def normalize(self, z: Tensor) -> Tensor:
        """z (B, d, h, w) with mean 0 and deviation 1 in every channel over the training images: what a generator
        learns.

        Raises:
            ValueError: the statistics were never measured.
        """
        mean, std = self._statistics()
        return (z - mean) / std

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of `normalize`: from what a generator made to what `decode` takes, (B, d, h, w)."""
        mean, std = self._statistics()
        return z * std + mean

    def _statistics(self) -> tuple[Tensor, Tensor]:
        if not (torch.isfinite(self.latent_mean).all() and torch.isfinite(self.latent_std).all()):
            raise ValueError(
                "this tokenizer's latent statistics were not measured: hieratok latents RUN --data PATH --stats-only"
            )
        if not (self.latent_std > 0).all():
            channel = int((self.latent_std <= 0).nonzero()[0])
            raise ValueError(f"channel {channel} of this tokenizer's latents is constant: it cannot be normalised")
        return self.latent_mean.view(-1, 1, 1), self.latent_std.view(-1, 1, 1)

    def scales_of(self, z: Tensor) -> Scales:
        """The token grids that belong to a latent map (B, d, h, w)."""
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"decode takes latents of shape (B, {self.config.latent_channels}, h, w), not {tuple(z.shape)}"
            )
        return Scales.of(self.config.scales, (z.shape[2], z.shape[3]))

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write `config.json` and `model.safetensors` into `folder` (made if need be).

        `state_dict` is the whole model's where this module holds only a part of it (FSDP).
        """
        weights = self.state_dict() if state_dict is None else state_dict
        checkpoint.save(folder, weights, {"model_type": "hieratok", **asdict(self.config)})

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, device: str | torch.device = "cpu"
    ) -> "HieraTok":
        """A tokenizer from a run's folder, a folder written by `save_pretrained`, or a hub id ("name/model").

        Returns it in evaluation mode. A hub id is downloaded only if no such folder exists here.

        Raises:
            FileNotFoundError: nothing there, or a file is missing.
            ValueError: the files do not fit this class or each other; the message says where.
        """
        folder = checkpoint.find(source, revision, inside="tokenizer")
        config, _ = checkpoint.load_config(folder, "hieratok", TokenizerConfig)
        refuse_former_downsampling(folder)
        with torch.device("meta"):
            model = cls(config)
        checkpoint.load_weights(folder, model, device)
        return model.eval()


def refuse_former_downsampling(folder: Path) -> None:
    """Nothing converts the weights of a down-sampler that computed something else.

    Raises:
        ValueError: the folder holds them.
    """
    if "downsample.lift.weight" in checkpoint.tensor_names(folder):
        raise ValueError(
            f"{folder} was trained with the conv down-sampling of hieratok 0.1, which averaged the layout away and was"
            " replaced: train it again"
        )
