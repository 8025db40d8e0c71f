"""HieraTok: the multi-scale tokenizer.

Shapes used throughout: B batch, H W pixels, f patch size, h w = H/f W/f latent grid, d latent channels,
K scales (coarse to fine), h_k w_k token grid of scale k, N tokens of all scales, C transformer width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hieratok.core import checkpoint
from hieratok.core.layers import init_weights
from hieratok.core.plugins import DOWNSAMPLERS
from hieratok.core.pretrained import Pretrained
from hieratok.tokenizer.config import TokenizerConfig
from hieratok.tokenizer.downsample import AreaDownsample, ConvDownsample
from hieratok.tokenizer.frozen import FrozenEncoder
from hieratok.tokenizer.photos import Photo, postprocess, preprocess
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.scales import Scales
from hieratok.tokenizer.vit import Decoder, Encoder


class HieraTok(Pretrained):
    """Image -> latent map z -> image at every scale (paper, section 3.2)."""

    model_type, kind, config_class = "hieratok", "tokenizer", TokenizerConfig
    config: TokenizerConfig

    latent_mean: Tensor
    """(d,): mean of every latent channel over training images; NaN until measured."""
    latent_std: Tensor
    """(d,): its standard deviation."""

    def __init__(self, config: TokenizerConfig | None = None):
        super().__init__()
        self.config = c = config or TokenizerConfig()
        self.encoder: nn.Module = FrozenEncoder(c) if c.encoder else papers_encoder(c)
        self.downsample: nn.Module
        if c.downsample in DOWNSAMPLERS:
            self.downsample = DOWNSAMPLERS[c.downsample](c.latent_channels, c.decoder_width, c.scales)
        elif c.downsample == "conv" and len(c.scales) > 1:
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
        positions = [self.encoder.positions] if isinstance(self.encoder, Encoder) else []
        for parameter in (*positions, self.decoder.positions, self.decoder.scale_embeddings):
            nn.init.normal_(parameter, std=0.02)
        # Statistics of the training images' latents, measured at the end of training.
        self.register_buffer("latent_mean", torch.full((c.latent_channels,), math.nan))
        self.register_buffer("latent_std", torch.full((c.latent_channels,), math.nan))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.positions.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.decoder.positions.dtype

    @property
    def encoder_sha256(self) -> str:
        """Of what decides what the latents are: the encoder's weights."""
        if isinstance(self.encoder, FrozenEncoder):
            return self.encoder.sha256
        return checkpoint.tensors_sha256(self.encoder)

    def pin_encoder(self) -> None:
        """Note in the configuration which weights a frozen encoder has; nothing to do for the paper's.

        Raises:
            FileNotFoundError, ValueError: they are not on this machine, or do not fit.
        """
        if isinstance(self.encoder, FrozenEncoder) and self.config.encoder_sha256 is None:
            self.config = self.encoder.config = replace(self.config, encoder_sha256=self.encoder.sha256)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """As of every model of ours; a frozen encoder is named with its weights' hash, and not written."""
        self.pin_encoder()
        super().save_pretrained(folder, state_dict)

    def preprocess(self, photos: Photo | Sequence[Photo], crop: bool = True) -> Tensor:
        """Photos -> what `encode` takes, on the tokenizer's device and in its dtype.

        Args:
            photos: one or a list: file names, Pillow images, uint8 arrays (H, W, 3) or (B, H, W, 3), uint8 tensors
                (3, H, W) or (B, 3, H, W). Files and Pillow images are turned upright and become RGB.
            crop: cut the middle square and resize it to the training size, as evaluation does. Otherwise photos keep
                their size, which must be the same for a batch.

        Returns:
            (B, 3, H, W) in [-1, 1].

        Raises:
            BadImageError: a file that cannot be read; a ValueError.
            ValueError: no photos, of another type or shape, or of different sizes.
        """
        images = preprocess(photos, self.config.image_size if crop else None)
        return images.to(self.device, self.dtype)

    def postprocess(self, images: Tensor) -> list[Image.Image]:
        """Outputs of `decode`, (B, 3, H, W) about [-1, 1] -> B Pillow images; values outside are clamped.

        Raises:
            ValueError: another type or shape, NaN or infinite values.
        """
        return postprocess(images)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """The latent's distribution.

        Args:
            images: (B, 3, H, W) in [-1, 1], of any size, as from `preprocess`. Sides that are not multiples of the
                patch size are padded on the right and at the bottom by repeating the last column and row; positions
                are interpolated. [ours]

        Returns:
            Mean and log-variance over (B, d, ceil(H/f), ceil(W/f)); `.mode()` or `.sample()` gives z, `.image_size` is
            (H, W).

        Raises:
            ValueError: another type or shape. A frozen encoder's files that do not
                fit.
            FileNotFoundError: a frozen encoder's weights are not on this machine.
        """
        check_images(images)
        images = images.to(self.dtype)
        f, (H, W) = self.config.patch_size, images.shape[2:]
        if H % f or W % f:
            images = F.pad(images, (0, -W % f, 0, -H % f), mode="replicate")
        return DiagonalGaussian(*self.encoder(images), image_size=(H, W))

    def decode(self, z: Tensor, scale: int = -1, image_size: tuple[int, int] | None = None) -> Tensor:
        """z (B, d, h, w) -> one scale's image, by default the finest (B, 3, f h, f w), about [-1, 1] (not clamped).

        Args:
            z: latents.
            scale: k, counted from 0, coarse to fine; -1 is the finest. In causal and independent mode finer scales are
                not computed.
            image_size: (H, W) of the encoded image: the padding is cut off.

        Raises:
            ValueError: z has another shape, or there is no such scale.
        """
        scales = self.scales_of(z)
        if not -len(scales) <= scale < len(scales):
            raise ValueError(f"this tokenizer has scales 0 to {len(scales) - 1}, not {scale}")
        k = scale % len(scales)
        last = len(scales) - 1 if self.config.attention == "full" else k
        image = self.decoder(self.downsample(z.to(self.dtype), scales), scales, last)[k]
        return self._crop(image, scales.grids[-1], image_size)

    def decode_pyramid(self, z: Tensor, image_size: tuple[int, int] | None = None) -> list[Tensor]:
        """z (B, d, h, w) -> an image per scale, (B, 3, f h_k, f w_k), coarse to fine, about [-1, 1] (not clamped).

        With `image_size`, (H, W) of the encoded image, the padding is cut off, in proportion at coarse scales.

        Raises:
            ValueError: z has another number of dimensions or channels.
        """
        scales = self.scales_of(z)
        pyramid = self.decoder(self.downsample(z.to(self.dtype), scales), scales)
        return [self._crop(image, scales.grids[-1], image_size) for image in pyramid]

    def decode_progressive(self, z: Tensor, image_size: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """The images of `decode_pyramid`, each yielded as soon as it is decoded.

        In causal mode scale k's pixels depend on scales <= k alone, so a preview costs only its prefix; keys and values
        are kept for the next scale. Coarse scales of a few images, which cost little besides reading the weights, are
        computed together. In full mode all scales come at the end.
        """
        scales = self.scales_of(z)
        if self.config.attention == "full":
            yield from self.decode_pyramid(z, image_size)
        else:
            for image in self.decoder.progressive(self.downsample(z.to(self.dtype), scales), scales, len(z)):
                yield self._crop(image, scales.grids[-1], image_size)

    def _crop(self, image: Tensor, grid: tuple[int, int], image_size: tuple[int, int] | None) -> Tensor:
        """Cut a scale's image to the part of an original of `image_size`, which was padded to `grid` patches."""
        if image_size is None:
            return image
        f = self.config.patch_size
        (h, w), (H, W) = grid, image_size
        if not (0 < H <= f * h and 0 < W <= f * w):
            raise ValueError(f"image_size {image_size} does not fit latents of {h} x {w} patches of {f} px")
        return image[..., : math.ceil(image.shape[-2] * H / (f * h)), : math.ceil(image.shape[-1] * W / (f * w))]

    if TYPE_CHECKING:  # torch does not declare what calling a module returns

        def __call__(
            self, images: Tensor, posterior: DiagonalGaussian | None = None, noise: float = 0.0
        ) -> tuple[list[Tensor], DiagonalGaussian, Tensor]: ...

    def forward(
        self, images: Tensor, posterior: DiagonalGaussian | None = None, noise: float = 0.0
    ) -> tuple[list[Tensor], DiagonalGaussian, Tensor]:
        """Training's pass.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            posterior: of the images, where it is known; None: they are encoded.
            noise: what the decoder sees is z plus normal noise, whose deviation is drawn for each image between 0 and
                this, so that it learns to stand a generator's errors. RAE's code does so, with 0.8; its paper draws the
                deviation from a half-normal.

        Returns:
            Pyramid of reconstructions of a sampled z, its posterior, and z without noise.
        """
        posterior = posterior or self.encode(images)
        z = posterior.sample()
        deviation = noise * torch.rand(len(z), 1, 1, 1, dtype=z.dtype, device=z.device) if noise else 0.0
        return self.decode_pyramid(z + deviation * torch.randn_like(z) if noise else z), posterior, z

    def normalize(self, z: Tensor) -> Tensor:
        """z (B, d, h, w), with mean 0 and deviation 1 in each channel over the training images, as generators learn it.

        Raises:
            ValueError: the statistics were not measured.
        """
        mean, std = self._statistics()
        return (z - mean) / std

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of `normalize`: a generator's latents -> the input of `decode`, (B, d, h, w)."""
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
        """The token grids of a latent map (B, d, h, w)."""
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"decode takes latents of shape (B, {self.config.latent_channels}, h, w), not {tuple(z.shape)}"
            )
        return Scales.of(self.config.scales, (z.shape[2], z.shape[3]))

    def _take_over(self, others: dict[str, Any], folder: Path) -> None:
        refuse_former_downsampling(folder)
        if isinstance(self.encoder, FrozenEncoder) and (folder / checkpoint.ENCODER).is_dir():
            self.encoder.folder = folder / checkpoint.ENCODER


def papers_encoder(config: TokenizerConfig) -> Encoder:
    """E of eq. 1."""
    c = config
    return Encoder(
        c.grid, c.patch_size, c.latent_channels, c.encoder_width, c.encoder_depth, c.encoder_heads, c.mlp_ratio
    )


def check_images(images: object) -> None:
    """Raise ValueError for inputs that `encode` does not take. Values are not checked: a GPU would have to wait."""
    if not isinstance(images, Tensor):
        found = type(images).__name__
    elif not images.is_floating_point():
        found = f"a {images.dtype} tensor"
    elif images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        found = f"shape {tuple(images.shape)}"
    else:
        return
    raise ValueError(
        f"encode takes floating-point images (B, 3, H, W) in [-1, 1], not {found}: preprocess(photos) makes them"
    )


def refuse_former_downsampling(folder: Path) -> None:
    """Refuse weights of the first version's down-sampler, which computed something else: they cannot be converted.

    Raises:
        ValueError: the folder holds them.
    """
    if "downsample.lift.weight" in checkpoint.tensor_names(folder):
        raise ValueError(
            f"{folder} was trained with the conv down-sampling of hieratok 0.1, which averaged the layout away and was"
            " replaced: train it again"
        )
