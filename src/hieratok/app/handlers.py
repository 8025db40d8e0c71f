"""The app's functions, from uploads and settings to HTML, step by step; independent of the server."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import Tensor

from hieratok.analysis.robustness import seeded_noise
from hieratok.app.page import (
    Picture,
    before_after,
    frames,
    latent_picture,
    message,
    row,
    section,
    similarity,
    status,
)
from hieratok.app.uploads import read_upload
from hieratok.core.pictures import ERROR_CEILING, error_map
from hieratok.core.pixels import center_crop, to_float, to_uint8
from hieratok.generation.config import Sampler
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import SampleConfig, sample_latents
from hieratok.reports.templating import Html
from hieratok.tokenizer.model import HieraTok

SAMPLERS: dict[str, Sampler] = {"ddpm": "ddim", "flow": "heun"}  # by the generator's objective
MAX_SIDE = 1024  # pixels of a photo that is encoded whole
MAX_TOKENS = 64  # tokens per side: the cost of attention grows with its fourth power
SAMPLES = 4  # drawn at a time
STEPS, GUIDANCE, SEEDS = (5, 250), (1, 10), (0, 2**31 - 1)  # limits
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5)  # of the noise on z
BLENDS = 9  # steps from one photo to the other, including both

Progress = Callable[[int, int], object]  # (done, total)
Upload = dict[str, Any]  # an uploaded file: its "path" on the server, and its "orig_name" at the sender
P = ParamSpec("P")


def in_one_line(handler: Callable[P, Iterator[str]]) -> Callable[P, Iterator[str]]:
    """Show a handler's ValueError as a message on its page."""

    @functools.wraps(handler)
    def handle(*args: P.args, **kwargs: P.kwargs) -> Iterator[str]:
        try:
            yield from map(str, handler(*args, **kwargs))
        except ValueError as error:
            yield str(message(str(error)))

    return handle


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the models for the page."""

    max_side: int
    """Largest side of an encoded photo, in pixels."""
    classes: int | None
    """The generator's classes; None without a generator."""
    guided: bool
    """Whether the generator supports guidance."""


class Demo:
    """The page's requests. Every method yields HTML that replaces what it yielded before.

    Args:
        tokenizer: in evaluation mode, on any device.
        uploads: the folder of photos; no file outside of it is read.
        generator: of its latents, in evaluation mode, on the same device.
    """

    def __init__(self, tokenizer: HieraTok, uploads: Path, generator: DiT | None = None):
        self.tokenizer = tokenizer
        self.uploads = uploads
        self.generator = generator
        self.max_side = min(MAX_SIDE, MAX_TOKENS * tokenizer.config.patch_size)

    @property
    def facts(self) -> ModelFacts:
        """Facts about the models for the page."""
        config = self.generator.config if self.generator else None
        return ModelFacts(
            self.max_side, config.num_classes if config else None, config is not None and config.label_dropout > 0
        )

    @in_one_line
    @torch.inference_mode()
    def photo(self, upload: Upload | None) -> Iterator[str]:
        """One photo at every scale, each as soon as it is decoded, then comparisons."""
        if upload is None:
            yield status("No photo yet.")
            return
        image = self.read(upload)
        yield status("Encoding …")
        posterior = self.tokenizer.encode(self.floats(image))
        z = posterior.mode()
        f, grids = self.tokenizer.config.patch_size, self.tokenizer.scales_of(z).grids
        pending = [(f"{f * w} × {f * h} px", f * h, f * w) for h, w in grids]
        scales: list[Picture] = []
        for decoded in self.tokenizer.decode_progressive(z, posterior.image_size):
            scale = to_uint8(decoded)[0].cpu()
            scales.append(Picture(scale, size(scale), similarity(scale, image, f)))
            yield status(f"Scale {len(scales)} of {len(grids)}") + pyramid(scales, pending[len(scales) :])

        page = pyramid(scales, []) + comparison(image, scales[-1].image) + inside(image, scales[-1].image, z[0])
        yield status("Adding noise to z …") + page
        yield status(f"{size(image)}; z has {z.shape[3]} × {z.shape[2]} positions of {z.shape[1]} channels.") + (
            page + self.noise(image)
        )

    def noise(self, image: Tensor) -> Html:
        """uint8 (3, H, W) -> a section: its middle, decoded from z with increasing noise."""
        side = self.tokenizer.config.image_size
        crop = center_crop(image, side)
        z = self.tokenizer.encode(self.floats(crop)).mode()
        std, whose = self.tokenizer.latent_std, "over the training photos"
        if not torch.isfinite(std).all():
            std, whose = z.std((0, 2, 3), correction=0), "in this photo, as training has not measured any"
        noise = seeded_noise(z.shape, 0).to(z) * std.view(-1, 1, 1)
        steps = []
        for sigma in SIGMAS:
            decoded = to_uint8(self.tokenizer.decode(z + sigma * noise))[0].cpu()
            steps.append(Picture(decoded, f"σ = {sigma:g}", similarity(decoded, crop)))
        note = (
            f"z + σ ε, decoded at {side} × {side} px: how much error in z the decoder tolerates. σ is in standard"
            f" deviations of each latent channel {whose}."
        )
        return section("Noise on z", note, frames(steps, "Noise σ"))

    @in_one_line
    @torch.inference_mode()
    def two_photos(self, first: Upload | None, second: Upload | None) -> Iterator[str]:
        """Interpolation between two photos along a straight line in the latent space."""
        if first is None or second is None:
            yield status("Two photos are needed.")
            return
        yield status("Encoding …")
        side = self.tokenizer.config.image_size
        a, b = (self.tokenizer.encode(self.floats(center_crop(self.read(u), side))).mode() for u in (first, second))
        steps = []
        for i in range(BLENDS):
            share = i / (BLENDS - 1)
            decoded = to_uint8(self.tokenizer.decode(torch.lerp(a, b, share)))[0].cpu()
            steps.append(Picture(decoded, f"{1 - share:.0%} first, {share:.0%} second", f"t = {share:g}"))
        note = (
            f"(1 - t) z₁ + t z₂, decoded at {side} × {side} px; z₁ and z₂ are the latent maps of the photos' middles."
        )
        yield section("Between the two", note, frames(steps, "From the first to the second"))

    @in_one_line
    @torch.inference_mode()
    def generate(self, label: float, guidance: float, steps: float, seed: float, progress: Progress) -> Iterator[str]:
        """Samples of one class at every scale, coarse to fine."""
        generator = self.generator
        assert generator is not None
        assert generator.latents is not None
        for value, (low, high), name in (
            (guidance, GUIDANCE, "guidance"),
            (steps, STEPS, "steps"),
            (seed, SEEDS, "seed"),
        ):
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low} to {high}")
        if not isinstance(label, int | float) or label != label // 1:
            raise ValueError("the class must be a whole number")
        config = SampleConfig(
            sampler=SAMPLERS[generator.config.objective],
            steps=int(steps),
            cfg=guidance,
            seed=int(seed),
            labels=(int(label),),
            num=SAMPLES,
            batch_size=SAMPLES,
        )
        evaluations = config.steps * (2 if config.sampler == "heun" else 1)
        with counted(generator, lambda done: progress(done, evaluations)):
            (batch,) = sample_latents(generator, config)
        z = generator.latents.denormalize(batch.latents)
        rows: list[Html] = []
        for images in self.tokenizer.decode_progressive(z):
            pictures = [
                Picture(image.cpu(), f"Seed {config.seed}, image {i}") for i, image in enumerate(to_uint8(images))
            ]
            H, W = images.shape[-2:]
            rows.append(row(pictures, title=f"{W} × {H} px"))
            note = f"{config.steps} steps of {config.sampler}, guidance {config.cfg:g}, seed {config.seed}."
            yield section(f"Class {int(label)}", note, *rows)

    def read(self, upload: Upload) -> Tensor:
        """The photo of an upload, uint8 (3, H, W), its longer side at most `max_side`.

        Raises:
            BadImageError: as `read_upload`.
        """
        name = str(upload.get("orig_name") or "the photo")[-80:]
        return read_upload(upload.get("path"), name, self.max_side, self.uploads)

    def floats(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) -> the input of `encode`, (1, 3, H, W)."""
        return to_float(image[None].to(next(self.tokenizer.parameters()).device))


def size(image: Tensor) -> str:
    """(..., H, W) -> its size as text, the width first."""
    return f"{image.shape[-1]} × {image.shape[-2]} px"


def pyramid(scales: list[Picture], pending: list[tuple[str, int, int]]) -> Html:
    """The section of decoded and pending scales."""
    note = (
        "Decoded coarse to fine from one latent map z and enlarged to the same width. Each is compared with the photo"
        " reduced to its size: PSNR in decibels and SSIM up to 1, higher is closer. One colour per token, each patch in"
        " its mean colour, is the baseline to beat."
    )
    return section("Every scale", note, row(scales, pending))


def comparison(image: Tensor, decoded: Tensor) -> Html:
    """The section with the photo over the finest scale."""
    note = "Drag across the picture, or use the arrow keys."
    return section("Before and after", note, before_after(Picture(image, "Photo"), Picture(decoded, "Decoded")))


def inside(image: Tensor, decoded: Tensor, z: Tensor) -> Html:
    """The section with the error map and the latent map."""
    lost = Picture(
        error_map(decoded, image),
        "Error of the finest scale",
        f"Mean over red, green and blue; black is none, light yellow {ERROR_CEILING} of 255 levels or more.",
    )
    kept = Picture(
        latent_picture(z),
        f"The latent map z, {z.shape[2]} × {z.shape[1]} positions",
        f"First three principal components of its {z.shape[0]} channels as red, green and blue.",
    )
    return section(
        "What is lost, and what the decoder gets",
        "The scale of the error map is fixed, so that photos can be compared.",
        row([lost, kept]),
    )


@contextlib.contextmanager
def counted(model: torch.nn.Module, progress: Callable[[int], object]) -> Iterator[None]:
    """Calls `progress` with the number of evaluations of the model."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        progress(done)

    handle = model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
