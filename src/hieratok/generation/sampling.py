"""Sampling latents from a trained DiT: guidance, labels, and noise per image, independent of its batch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from hieratok.core.precision import Precision, autocast
from hieratok.core.seeding import generator
from hieratok.generation import diffusion, flow
from hieratok.generation.config import SAMPLERS, SampleConfig
from hieratok.generation.dit import DiT, DiTConfig
from hieratok.generation.process import Predict

Settings = TypeVar("Settings", bound=SampleConfig)
LEGACY_CHANNELS = 3  # the channels that DiT, SiT and LightningDiT guide


class Samples(NamedTuple):
    """One batch."""

    indices: list[int]
    """Which images."""
    labels: Tensor
    """(B,) int64, on the generator's device."""
    latents: Tensor
    """(B, d, h, w), normalised if the generator was trained on normalised latents."""


@torch.no_grad()  # not inference mode, whose tensors FSDP2 could not reuse later
def sample_latents(
    model: DiT, config: SampleConfig, indices: Sequence[int] | None = None, precision: Precision = "fp32"
) -> Iterator[Samples]:
    """Latents of the images `indices`, batch by batch, not decoded.

    An image depends on its index, the seed and the settings, not on the other images, their order or the batch size. So
    processes can share the indices, and an interrupted job needs only the missing ones. (Up to the last bits: matrix
    products round differently for other batch sizes. The noise is bit-equal.)

    Args:
        model: in evaluation mode, on any device.
        config: the settings.
        indices: of images, from 0; None: 0 .. num - 1.
        precision: of the generator; noise and steps are float32.

    Yields:
        `indices` of the batch; `labels` int64 (B,); `latents` (B, d, h, w), as the generator was trained on them.

    Raises:
        ValueError: what `fitted` refuses, or a model in training mode.
    """
    config = fitted(config, model.config)
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
        with autocast(device, precision):
            if config.sampler == "ddpm" or config.sampler == "ddim":
                z = diffusion.sample(predict, draw(), y, draw, config.steps, config.sampler, config.eta)
            else:
                assert config.sampler is not None
                assert config.time_shift is not None
                z = flow.sample(predict, draw(), y, draw, config.steps, config.sampler, config.time_shift)
        yield Samples(batch, y, z)


def fitted(config: Settings, model: DiTConfig) -> Settings:
    """The settings for a generator, with a sampler and a shift of times that fit it if they name none.

    Raises:
        ValueError: the settings do not fit the generator.
    """
    if config.sampler is None:
        config = replace(config, sampler=SAMPLERS[model.objective][0])
    if config.time_shift is None:
        config = replace(config, time_shift=model.shift)
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
    return config


def guided(
    model: Predict,
    weight: float,
    null_label: int,
    interval: tuple[float, float] | None = None,
    channels: int | None = None,
) -> Predict:
    """Classifier-free guidance (Ho and Salimans 2022): the model with and without the class, in one batch of 2 B.

    Args:
        model: to guide. A learned variance is taken from its conditional prediction.
        weight: w in unconditional + w (conditional - unconditional); with 1 the model is returned as it is.
        null_label: the label for "no class".
        interval: times, both included, outside which the conditional prediction is used alone (Kynkaanniemi et al.
            2024), without a second pass; None: guide always.
        channels: guide only the first ones; None: all.
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
    """The classes of images `indices`, (B,) int64; each depends on its index (and, if random, the seed) alone.

    Args:
        labels: `balanced` (every class in turn), `random`, or a list of classes, used in turn.
        indices: of images, from 0.
        num_classes: of the generator.
        seed: of random labels.
    """
    if labels == "random":
        chosen = [int(torch.randint(num_classes, (), generator=generator("label", seed, i))) for i in indices]
    elif labels == "balanced":
        chosen = [i % num_classes for i in indices]
    else:
        assert isinstance(labels, tuple)
        chosen = [labels[i % len(labels)] for i in indices]
    return torch.tensor(chosen, dtype=torch.long)


class ImageNoise:
    """A `Draw` for a batch of images: each image has its own stream of normals, seeded by (seed, index).

    Args:
        seed: of the whole set.
        indices: of the images in the batch.
        shape: (d, h, w) of one.
        device: of the result; the noise is drawn on the CPU, so that it is the same everywhere.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device):
        self.generators = [generator("noise", seed, i) for i in indices]
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """The next normals, (B, *shape), float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
