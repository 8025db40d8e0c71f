"""Encoders that were trained elsewhere and are not trained here: the latents already exist, the decoder is ours.

`TokenizerConfig.encoder` names one:

- `timm:NAME`, a vision transformer. z is its patch features, layer-normalised without scale and shift, as in RAE (Zheng
  et al. 2025). Images are resized so that its patch grid is z's, so f need not be its patch size: RAE's DINOv2 sees
  224 px in patches of 14, and the decoder draws 256 px in patches of 16.
- `diffusers:FOLDER`, an autoencoder. z is (latent - shift_factor) * scaling_factor: what diffusers' pipelines denoise.

The network's weights are read when it first encodes, so that decoding needs none. It is no submodule: no optimiser,
average, checkpoint or parallel wrapper sees it. It computes in float32, or under autocast.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hieratok.core import checkpoint
from hieratok.core.files import read_json_table, shown
from hieratok.tokenizer import autoencoders
from hieratok.tokenizer.config import PAPERS_ENCODER, TokenizerConfig, check_name
from hieratok.tokenizer.foundation import FoundationModel

NORM_EPS = 1e-6


class Network(Protocol):
    """A frozen network and what is known of its latents."""

    @property
    def module(self) -> nn.Module:
        """The part that the latents depend on."""
        ...

    @property
    def latent_channels(self) -> int:
        """d."""
        ...

    @property
    def patch_size(self) -> int | None:
        """f; None: any."""
        ...

    def moments(self, images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance, each (B, d, *grid)."""
        ...

    def save(self, folder: Path) -> None:
        """Write its files into `folder`."""
        ...


class Features:
    """A ViT's features after its last block.

    Args:
        name: in timm.
        weights: their file; None: the published ones in a cache.
    """

    patch_size = None

    def __init__(self, name: str, weights: str | Path | None):
        self.model = FoundationModel("model.encoder", name, weights)
        self.module = self.model.network
        self.latent_channels = self.model.width

    def moments(self, images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As of `Network`."""
        follow(self.model, self.module, images)
        size = (grid[0] * self.model.patch_size, grid[1] * self.model.patch_size)
        (features,) = self.model(images, size, [self.model.depth - 1], norm=False)  # (B, C, h, w)
        z = F.layer_norm(features.movedim(1, -1).float(), (self.latent_channels,), eps=NORM_EPS).movedim(-1, 1)
        return z, torch.full_like(z, autoencoders.LEAST_LOGVAR)

    def save(self, folder: Path) -> None:
        """As of `Network`."""
        weights = {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}
        save_file(weights, folder / checkpoint.WEIGHTS)


class Autoencoder:
    """An autoencoder of diffusers.

    Args:
        folder: as diffusers writes it.

    Raises:
        ValueError: no such files, or no image autoencoder that is known here.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = autoencoders.load(folder, autoencoders.known_class(folder)).requires_grad_(False)
        self.module = autoencoders.encoding_parts(self.model).eval()
        config = self.model.config
        self.latent_channels = autoencoders.latent_channels(config)
        self.patch_size = autoencoders.patch_size(config)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.scale = float(config.get("scaling_factor") or 1.0)

    def moments(self, images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As of `Network`."""
        follow(self.model, self.module, images)
        return autoencoders.moments(self.model, images.float(), self.shift, self.scale)

    def save(self, folder: Path) -> None:
        """As of `Network`: the whole autoencoder, as its folder has it."""
        for name in (checkpoint.CONFIG, autoencoders.WEIGHTS):
            shutil.copyfile(self.folder / name, folder / name)


def follow(model: nn.Module, module: nn.Module, images: Tensor) -> None:
    """Move a model to the images' device, if its weights (those of `module`) are on another."""
    if next(module.parameters()).device != images.device:
        model.to(images.device)


class Shared:
    """The network, once loaded: one for a tokenizer and for its copies, such as the average of its weights."""

    network: Network | None = None
    sha256: str | None = None
    """Of its weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self


class FrozenEncoder(nn.Module):
    """The encoder that a configuration names, in the place of the paper's.

    Args:
        config: of the tokenizer.

    Attributes:
        folder: the folder with a copy of its files, if there is one.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        assert config.encoder is not None
        self.config = config
        self.folder: Path | None = None
        self._shared = Shared()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1], sides divisible by f -> mean and log-variance, each (B, d, H/f, W/f); no gradient.

        Raises:
            ValueError, FileNotFoundError: as of `load`.
        """
        f = self.config.patch_size
        with torch.no_grad():
            mean, logvar = self.load().moments(images, (images.shape[-2] // f, images.shape[-1] // f))
        return mean.contiguous(), logvar.contiguous()  # noise is drawn in memory order, as for cached latents

    def load(self) -> Network:
        """The network, read from its files at the first call.

        Raises:
            FileNotFoundError: its weights are not on this machine.
            ValueError: files that do not fit, other latents than the configuration has, or other weights than the
                tokenizer was trained with.
        """
        if self._shared.network is None:
            self._shared.network = self._read()
        return self._shared.network

    @property
    def sha256(self) -> str:
        """Of its weights: what the configuration states, or else of what is loaded."""
        if self.config.encoder_sha256 is None:
            self.load()
        sha256 = self.config.encoder_sha256 or self._shared.sha256
        assert sha256 is not None
        return sha256

    def save(self, folder: Path) -> None:
        """Copy its files into `folder`, so that a tokenizer's folder needs nothing else."""
        with checkpoint.atomic_folder(folder) as unfinished:
            self.load().save(unfinished)

    def _read(self) -> Network:
        assert self.config.encoder is not None
        kind, name = parse(self.config.encoder)
        network: Network
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            if kind == "timm":
                weights = self.folder / checkpoint.WEIGHTS if self.folder else self.config.encoder_weights
                network = Features(name, weights)
            else:
                network = Autoencoder(self.folder or autoencoder_folder(name))
        check_geometry(self.config, network.latent_channels, network.patch_size)
        found, wanted = checkpoint.tensors_sha256(network.module), self.config.encoder_sha256
        if wanted not in (None, found):
            raise ValueError(
                f"the weights of {shown(self.config.encoder)} are not those that this tokenizer was trained with: their"
                f" SHA-256 is {found[:12]}..., not {str(wanted)[:12]}..."
            )
        self._shared.sha256 = found
        return network


def parse(encoder: str) -> tuple[str, str]:
    """`timm:NAME` -> ("timm", "NAME"); the same for diffusers.

    Raises:
        ValueError: anything else.
    """
    check_name(encoder)
    kind, _, name = encoder.partition(":")
    return kind, name


def autoencoder_folder(name: str) -> Path:
    """A folder, or a hub id's files in the hub's cache; nothing is downloaded.

    Raises:
        FileNotFoundError: neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if checkpoint.is_hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        files = [try_to_load_from_cache(name, file) for file in (checkpoint.CONFIG, autoencoders.WEIGHTS)]
        if all(isinstance(file, str) for file in files):
            return Path(str(files[0])).parent
        raise FileNotFoundError(
            f"diffusers:{name}: no such folder, and it is not in the hub's cache: `hf download {name}"
            f" {checkpoint.CONFIG} {autoencoders.WEIGHTS}` gets it where there is a network"
        )
    raise FileNotFoundError(f"diffusers:{shown(name)}: no such folder")


def check_geometry(config: TokenizerConfig, latent_channels: int, patch_size: int | None) -> None:
    """Raise ValueError, with the settings to change, if an encoder's latents are not the configuration's."""
    if (config.latent_channels, config.patch_size) != (latent_channels, patch_size or config.patch_size):
        f = f"model.patch_size {patch_size}, " if patch_size else ""
        raise ValueError(
            f"{shown(config.encoder)} has latents of {latent_channels} channels"
            + (f" and {patch_size} pixels a side" if patch_size else "")
            + f": set {f}model.latent_channels {latent_channels}, or give it with --encoder, which sets them"
        )


def geometry(encoder: str) -> tuple[int, int | None]:
    """d, and f or None for any, of an encoder's latents; no weights are read.

    Raises:
        ValueError, FileNotFoundError: no such network.
    """
    kind, name = parse(encoder)
    if kind == "timm":
        with torch.device("meta"):
            return FoundationModel("model.encoder", name, random_weights=True).width, None
    folder = autoencoder_folder(name)
    autoencoders.known_class(folder)
    config = read_json_table(folder / checkpoint.CONFIG)
    try:
        return autoencoders.latent_channels(config), autoencoders.patch_size(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{shown(folder / checkpoint.CONFIG)} lacks the shape of an autoencoder: {error!r}") from error


def with_encoder(config: TokenizerConfig, encoder: str, **changes: Any) -> TokenizerConfig:
    """A configuration for another encoder: d, f and the scale list follow from its latents.

    Args:
        config: whose other settings stay.
        encoder: `timm:NAME` or `diffusers:FOLDER`.
        changes: settings that are given, and so do not follow.

    Raises:
        ValueError, FileNotFoundError: no such network, or settings that do not fit it.
    """
    latent_channels, patch_size = geometry(encoder)
    own = TokenizerConfig()
    follows: dict[str, Any] = {name: getattr(own, name) for name in PAPERS_ENCODER}
    follows |= {"latent_channels": latent_channels, "patch_size": patch_size or config.patch_size}
    new = {"encoder": encoder, "encoder_weights": None, "encoder_sha256": None, **follows, **changes}
    size = new.get("image_size", config.image_size)
    side = size // new["patch_size"]
    if "scales" not in changes and side >= 1 and side != config.scales[-1]:
        new["scales"] = halved(side) if len(config.scales) > 1 else (side,)
    return replace(config, **new)


def halved(side: int) -> tuple[int, ...]:
    """A scale list for a grid of this side: halved as often as that gives whole tokens. 32: 1, 2, 4, 8, 16, 32."""
    sides = [side]
    while sides[0] % 2 == 0:
        sides.insert(0, sides[0] // 2)
    return tuple(sides)
