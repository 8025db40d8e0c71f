"""Sampling latents from a trained DiT: guidance, labels, and noise that belongs to an image and not to its batch."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hieratok.generation import Predict, diffusion, flow
from hieratok.generation.dit import DiT, DiTConfig

Sampler = Literal["ddpm", "ddim", "euler", "heun", "sde"]
SAMPLERS = {"ddpm": ("ddpm", "ddim"), "flow": ("euler", "heun", "sde")}  # by the objective of the generator
LEGACY_CHANNELS = 3  # what DiT, SiT and LightningDiT guide


@dataclass(frozen=True)
class SampleConfig:
    """How latents are sampled. Defaults: DiT's protocol for gFID, 250 DDPM steps, without guidance as in the paper.

    Raises:
        ValueError: settings out of range, or that the sampler does not have.
    """

    sampler: Sampler = "ddpm"
    """ddpm or ddim for a generator trained with objective ddpm; euler, heun (ODE) or sde for flow. [ours]"""
    steps: int = 250
    """Steps from noise to latent, at most 1000 with ddpm and ddim; heun evaluates the generator twice in each. [ours]:
    the paper does not say."""
    cfg: float = 1.0
    """Guidance weight w: unconditional + w (conditional - unconditional). 1: none. The paper's pictures have 4.2."""
    cfg_interval: tuple[float, float] | None = None
    """Times between which to guide, of 0 (data) .. 999 for ddpm and ddim, of 0 (noise) .. 1 for flow. None: always."""
    legacy_cfg: bool = False
    """Guide the first three channels alone, as DiT, SiT and LightningDiT do: for parity with their numbers."""
    time_shift: float = 1.0
    """s in t' = s t / (1 + (s - 1) t), t = 0 noise; for flow. Below 1 more steps are spent near the noise."""
    eta: float = 0.0
    """Randomness of ddim, from 0 to 1."""
    seed: int = 0
    """Image i's noise and random label depend on this and i alone."""
    labels: Literal["balanced", "random"] | tuple[int, ...] = "random"
    """Classes: drawn (random, as DiT's), in turn (balanced: gFID lower by about 0.1), or a list, used in turn."""
    num: int = 16
    """Images."""
    batch_size: int = 64
    """Images at a time."""

    def __post_init__(self):
        for name in ("cfg_interval", "labels"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.sampler not in get_args(Sampler):
            raise ValueError(f"sampler must be one of {', '.join(get_args(Sampler))}, not {self.sampler!r}")
        for name in ("steps", "num", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.objective == "ddpm" and self.steps > diffusion.STEPS:
            raise ValueError(f"steps must be at most {diffusion.STEPS} for sampler {self.sampler}, not {self.steps}")
        if not (math.isfinite(self.cfg) and self.cfg >= 0):
            raise ValueError(f"cfg must be a number of at least 0, not {self.cfg}")
        if self.cfg_interval is not None and (
            len(self.cfg_interval) != 2 or not self.cfg_interval[0] <= self.cfg_interval[1]
        ):
            raise ValueError(f"cfg_interval must be two times, the lower first, not {list(self.cfg_interval)}")
        if self.time_shift <= 0:
            raise ValueError(f"time_shift must be positive, not {self.time_shift}")
        if self.time_shift != 1 and self.objective != "flow":
            raise ValueError(f"time_shift is for the samplers {', '.join(SAMPLERS['flow'])}, not {self.sampler}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], not {self.eta}")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is for the sampler ddim, not {self.sampler}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, it is {self.seed}")
        if isinstance(self.labels, str) and self.labels not in ("balanced", "random"):
            raise ValueError(f"labels must be balanced, random or a list of classes, not {self.labels!r}")
        if not self.labels:
            raise ValueError("labels must not be an empty list")

    @property
    def objective(self) -> str:
        """What a generator must have been trained for."""
        return "ddpm" if self.sampler in SAMPLERS["ddpm"] else "flow"


class Samples(NamedTuple):
    """One batch."""

    indices: list[int]
    """Which images."""
    labels: Tensor
    """(B,) int64, on the generator's device."""
    latents: Tensor
    """(B, d, h, w), as the generator was trained on them: normalised if those were."""


@torch.no_grad()  # and not inference mode, which spoils what FSDP2 keeps between calls
def sample_latents(model: DiT, config: SampleConfig, indices: Sequence[int] | None = None) -> Iterator[Samples]:
    """Latents of the images `indices`, batch by batch; decoding them is the caller's business.

    An image depends on its index, the seed and the settings, not on which others are asked for, in which order, in
    batches of which size: so processes can share the indices, and a half-done job goes on with those that are missing.
    (Up to the last bits: matrix products round differently for other batch sizes. The noise is the same to the bit.)

    Args:
        model: in evaluation mode, on any device.
        config: how.
        indices: of images, from 0; None: 0 .. num - 1.

    Raises:
        ValueError: what `check_fits` refuses, or a model in training mode.
    """
    check_fits(config, model.config)
    if model.training:
        raise ValueError("the generator is in training mode, where it drops labels: call .eval() first")
    predict = guided(
        model,
        config.cfg,
        null_label=model.config.num_classes,
        interval=config.cfg_interval,
        channels=LEGACY_CHANNELS if config.legacy_cfg else None,
    )
    device = next(model.parameters()).device
    indices = range(config.num) if indices is None else indices
    for start in range(0, len(indices), config.batch_size):
        batch = list(indices[start : start + config.batch_size])
        y = class_labels(config.labels, batch, model.config.num_classes, config.seed).to(device)
        draw = ImageNoise(config.seed, batch, model.config.latent_shape, device)
        if config.sampler == "ddpm" or config.sampler == "ddim":
            z = diffusion.sample(predict, draw(), y, draw, config.steps, config.sampler, config.eta)
        else:
            z = flow.sample(predict, draw(), y, draw, config.steps, config.sampler, config.time_shift)
        yield Samples(batch, y, z)


def check_fits(config: SampleConfig, model: DiTConfig) -> None:
    """Whether a generator can be sampled like this.

    Raises:
        ValueError: says in one line why not.
    """
    if config.objective != model.objective:
        raise ValueError(
            f"sampler {config.sampler} does not fit a generator trained with objective {model.objective}:"
            f" use {' or '.join(SAMPLERS[model.objective])}"
        )
    if not isinstance(config.labels, str):
        for label in config.labels:
            if not 0 <= label < model.num_classes:
                raise ValueError(f"label {label} is out of range: the generator knows 0 .. {model.num_classes - 1}")
    if config.cfg != 1 and model.label_dropout == 0:
        raise ValueError("cfg must be 1: the generator was trained without label dropout, which guidance needs")


def guided(
    model: Predict,
    weight: float,
    null_label: int,
    interval: tuple[float, float] | None = None,
    channels: int | None = None,
) -> Predict:
    """Classifier-free guidance (Ho and Salimans 2022): the model with and without the class, in one batch of 2 B.

    Args:
        model: what to guide. A learned variance is taken from its conditional prediction.
        weight: w in unconditional + w (conditional - unconditional); with 1 the model is returned as it is.
        null_label: the label for "no class".
        interval: times, both included, outside which the conditional prediction is used alone (Kynkaanniemi et al.
            2024), without a second pass; None: guide always.
        channels: guide the first ones alone; None: all.
    """
    if weight == 1:
        return model

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if interval is not None:  # a sampler's times are the same for the whole batch
            time = float(t[0])
            if not interval[0] <= time <= interval[1]:
                return model(x, t, y)
        both = model(torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, torch.full_like(y, null_label))))
        conditional, unconditional = both.chunk(2)
        count = min(channels or x.shape[1], x.shape[1])
        guided = unconditional[:, :count] + weight * (conditional[:, :count] - unconditional[:, :count])
        return torch.cat((guided, conditional[:, count:]), dim=1)

    return predict


def class_labels(labels: str | tuple[int, ...], indices: Sequence[int], num_classes: int, seed: int) -> Tensor:
    """The classes of images `indices`, (B,) int64, each a function of its index (and, if random, the seed) alone.

    Args:
        labels: `balanced` (every class in turn), `random`, or classes that are used in turn.
        indices: of images, from 0.
        num_classes: of the generator.
        seed: of random labels.
    """
    if labels == "random":
        chosen = [int(torch.randint(num_classes, (), generator=_generator("label", seed, i))) for i in indices]
    elif labels == "balanced":
        chosen = [i % num_classes for i in indices]
    else:
        assert isinstance(labels, tuple)
        chosen = [labels[i % len(labels)] for i in indices]
    return torch.tensor(chosen, dtype=torch.long)


class ImageNoise:
    """A `Draw` for a batch of images: each has a stream of normals of its own, seeded by (seed, index).

    Args:
        seed: of the whole set.
        indices: of the images in the batch.
        shape: (d, h, w) of one.
        device: where the noise is wanted; it is drawn on the CPU, so that it is the same everywhere.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device):
        self.generators = [_generator("noise", seed, i) for i in indices]
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """The next normals, (B, *shape), float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def _generator(purpose: str, seed: int, index: int) -> torch.Generator:
    """A generator for one use in one image; neighbouring seeds and indices give unrelated streams."""
    digest = hashlib.blake2b(f"{purpose} {seed} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
