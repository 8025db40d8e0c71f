"""Previews of a running diffusers pipeline, from the coarse scales of a multi-scale decoder.

    preview = HieraTokPreview(HieraTok.from_pretrained("runs/preview-sd"), pixels=64, every=5)
    image = pipeline(prompt, callback_on_step_end=preview).images[0]
    preview.images[-1].pictures[0]

The pipeline's latents after a step are a mixture of image and noise. The image is estimated from the latents before and
after the step: within a step x / alpha is a straight line over sigma / alpha, and its value at sigma 0 is the image
that the network predicted. This is exact for DDIM and Euler's method, and first order for other ODE samplers; samplers
that add new noise in every step have no such line.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hieratok.tokenizer.model import HieraTok

ADDS_NOISE = ("DDPM", "Ancestral", "SDE", "LCM", "TCD")
"""In the names of schedulers whose steps are random."""


class Preview(NamedTuple):
    """The preview of one step."""

    step: int
    """Counted from 0."""
    timestep: float
    """As the scheduler calls it."""
    pictures: list[Image.Image]
    """One for each image of the batch."""
    milliseconds: float
    """That the preview took, all of the batch together."""


class HieraTokPreview:
    """A `callback_on_step_end` for diffusers' pipelines; it does not change the pipeline's result.

    Args:
        tokenizer: whose latents the pipeline denoises: with the pipeline's autoencoder as its frozen encoder, or, in a
            `HieraTokPipeline`, the pipeline's own.
        pixels: side of the previews: that of the first scale which has as many, or the finest.
        every: steps between previews; the last step always has one.
        denoised: estimate the image without its noise, which takes the step before: no preview of the first step.
            False: decode the latents as they are.
        show: called with each `Preview`, to put it on a page; None: they are only kept.
        unpack: the pipeline's latents -> (B, d, h, w), for pipelines that pack them, such as Flux's.

    Attributes:
        images: the previews, in order.

    Raises:
        ValueError: settings out of range.
    """

    images: list[Preview]

    def __init__(
        self,
        tokenizer: HieraTok,
        pixels: int = 64,
        every: int = 5,
        denoised: bool = True,
        show: Callable[[Preview], object] | None = None,
        unpack: Callable[[Tensor], Tensor] | None = None,
    ):
        if every < 1 or pixels < 1:
            raise ValueError(f"every and pixels must be at least 1, not {every} and {pixels}")
        self.tokenizer = tokenizer.eval()
        sides = [side * tokenizer.config.patch_size for side in tokenizer.config.scales]
        self.scale = next((k for k, side in enumerate(sides) if side >= pixels), len(sides) - 1)
        self.every = every
        self.denoised = denoised
        self.show = show
        self.unpack = unpack
        self.images = []
        self._before: tuple[int, Tensor] | None = None

    def __call__(self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """One step is done.

        Args:
            pipeline: which generates.
            step: counted from 0.
            timestep: as the scheduler calls it.
            callback_kwargs: with `latents`.

        Returns:
            What diffusers wants back: nothing is changed.

        Raises:
            ValueError: latents that are not the tokenizer's, or a scheduler whose steps are random.
        """
        latents = callback_kwargs["latents"]
        before, self._before = self._before, (step, latents.detach().clone())
        steps = len(pipeline.scheduler.timesteps)
        if (step + 1) % self.every and step + 1 != steps:
            return {}
        if self.denoised and step + 1 < steps:
            if before is None or before[0] != step - 1:
                return {}
            latents = image_estimate(pipeline.scheduler, step, before[1], latents)
        start = time.perf_counter()
        z = latents if self.unpack is None else self.unpack(latents)
        if hasattr(pipeline, "latent_space"):  # a pipeline of ours, whose generators learn normalised latents
            z = pipeline.latent_space().denormalize(z)
        pictures = self.tokenizer.postprocess(self.decode(z))
        preview = Preview(step, float(timestep), pictures, (time.perf_counter() - start) * 1e3)
        self.images.append(preview)
        if self.show is not None:
            self.show(preview)
        return {}

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, d, h, w) -> images of the preview's scale, (B, 3, H_k, W_k), about [-1, 1].

        Raises:
            ValueError: they are not the tokenizer's.
        """
        if z.ndim != 4 or z.shape[1] != self.tokenizer.config.latent_channels:
            raise ValueError(
                f"the pipeline's latents are {tuple(z.shape)} and the preview's tokenizer has"
                f" {self.tokenizer.config.latent_channels} channels: it must be trained on the pipeline's autoencoder"
                " (unpack=... for pipelines that pack their latents)"
            )
        return self.tokenizer.decode(z.to(self.tokenizer.device, torch.float32), self.scale)


def image_estimate(scheduler: Any, step: int, before: Tensor, after: Tensor) -> Tensor:
    """The latents without noise that a step headed for.

    Args:
        scheduler: of diffusers, with its timesteps set.
        step: counted from 0.
        before: latents that entered the step.
        after: latents that left it.

    Raises:
        ValueError: its steps are random.
    """
    if any(word in type(scheduler).__name__ for word in ADDS_NOISE):
        raise ValueError(
            f"{type(scheduler).__name__} adds noise in every step, so the image cannot be told from two of them: give"
            " HieraTokPreview denoised=False"
        )
    (alpha, sigma), (next_alpha, next_sigma) = level(scheduler, step), level(scheduler, step + 1)
    x, y = before.float(), after.float()
    if not alpha:  # pure noise: its direction is itself
        return (y - next_sigma * x / sigma) / next_alpha
    slope, next_slope = sigma / alpha, next_sigma / next_alpha
    return (slope * y / next_alpha - next_slope * x / alpha) / (slope - next_slope)


def level(scheduler: Any, step: int) -> tuple[float, float]:
    """(alpha, sigma) of the latents that enter a step: alpha times the image plus sigma times noise."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        sigma = float(sigmas[step])
        if type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1:  # Euler's and Karras's: noise added to the image
            return 1.0, sigma
        alpha = (1 + sigma**2) ** -0.5
        return alpha, sigma * alpha
    timesteps = [int(t) for t in scheduler.timesteps]
    if step < len(timesteps):
        product = float(scheduler.alphas_cumprod[timesteps[step]])
    else:
        stride = scheduler.config.num_train_timesteps // len(timesteps)
        last = timesteps[-1] - stride
        product = float(scheduler.alphas_cumprod[last] if last >= 0 else scheduler.final_alpha_cumprod)
    return product**0.5, (1 - product) ** 0.5
