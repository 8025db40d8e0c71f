"""The quickstart: train a small tokenizer on the bundled photos, reconstruct held-out crops, train a small generator
on its latents, and sample it at every scale."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hieratok.core.checkpoint import write_json
from hieratok.core.devices import hardware
from hieratok.core.pictures import fit
from hieratok.core.typed import plain
from hieratok.data.images import Source, evaluation_batches, open_source, to_uint8
from hieratok.evaluation.pixels import PIXEL_PROTOCOL
from hieratok.evaluation.reconstruction import BASELINE_PROTOCOL, Numbers, ReconstructionMetrics
from hieratok.evaluation.results import format_numbers
from hieratok.generation.dit import DiT
from hieratok.generation.sampling import SampleConfig, sample_latents
from hieratok.studies import recipes
from hieratok.tasks.reconstruct import reconstruct_any
from hieratok.tokenizer.model import HieraTok
from hieratok.training.generator import GeneratorRun, train_generator
from hieratok.training.run_folder import LOG, read_log
from hieratok.training.runs import Pace, speed
from hieratok.training.tokenizer import TokenizerRun, reconstruct_pyramid, train_tokenizer

PHOTOS = 3  # number of photos shown whole
PHOTO_SIDE = 512  # their longer side in pixels, after reduction
WHOLE = {"bundled:val": "bundled:whole"}  # held-out crops: the source of the whole photos
SAMPLING = SampleConfig("euler", steps=50, num=6, batch_size=6, labels="balanced")


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    run: TokenizerRun | GeneratorRun
    pace: Pace
    parameters: int

    @classmethod
    def of(
        cls, run: TokenizerRun | GeneratorRun, model: torch.nn.Module, log: Sequence[Mapping[str, float]]
    ) -> "Trained":
        """From the model and the run's log."""
        return cls(run, speed(log), sum(p.numel() for p in model.parameters()))


@dataclass(frozen=True)
class QuickstartResult:
    """The numbers of a quickstart."""

    numbers: Numbers
    """Numbers of the held-out crops."""
    tokenizer: Trained
    generator: Trained | None
    """None until the generator is trained."""
    hardware: str

    def to_json(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        table: dict[str, Any] = {
            **self.numbers.to_json(),
            **self.tokenizer.pace._asdict(),
            "parameters": self.tokenizer.parameters,
            "hardware": self.hardware,
            "torch": torch.__version__,
            "protocol": PIXEL_PROTOCOL | BASELINE_PROTOCOL | {"latents": "posterior mean", "crop": "ADM centre crop"},
            "settings": plain(self.tokenizer.run),
        }
        if (generator := self.generator) is not None:
            table["generator"] = {
                **generator.pace._asdict(),
                "parameters": generator.parameters,
                "settings": plain(generator.run),
            }
        return table


@dataclass(frozen=True)
class Reconstructed:
    """An image at every scale."""

    name: str
    original: Tensor
    """uint8 (3, H, W)."""
    pyramid: list[Tensor]
    """uint8 (3, H_k, W_k), coarse to fine; the last has the original's size."""
    numbers: list[dict[str, float]]
    """Each scale's `psnr` and `baseline_psnr` (of one colour per token), in dB."""


@dataclass(frozen=True)
class FirstLook:
    """The quickstart's numbers and pictures."""

    result: QuickstartResult
    run: TokenizerRun
    """The tokenizer's."""
    log: list[dict[str, float]]
    """Records of its training."""
    crops: list[Reconstructed]
    photos: list[Reconstructed]
    samples: list[Tensor]
    """Samples at every scale, coarse to fine: uint8 (B, 3, H_k, W_k); empty until the generator is trained."""


# Writes a page into the folder of a quickstart. Passed by the caller, so that tasks do not depend on reports.
WritePage = Callable[[Path, FirstLook], None]


def quickstart(
    out: Path = Path("runs/quickstart"),
    run: TokenizerRun | None = None,
    generator_steps: int = 600,
    write_page: WritePage | None = None,
) -> QuickstartResult:
    """Train both models, reconstruct photos, sample at every scale, and write `out/metrics.json`: when the tokenizer is
    trained, and again with the generator's samples.

    Finished runs in `out` are not trained again, unfinished ones are resumed.

    Args:
        out: the tokenizer's run; the generator's is `out/dit`.
        run: the tokenizer to train, by default the recipe `tiny-multi`. Its `data.val_path` gives the held-out images.
        generator_steps: training steps of the generator.
        write_page: adds `index.html` to `out` each time.

    Raises:
        ValueError, FileNotFoundError: settings or images that do not fit or are missing.
        TrainingError: training cannot continue.
    """
    run = run or replace(recipes.tiny_multi(), name="tiny-multi")
    if run.data.val_path is None:
        raise ValueError("quickstart needs images that are never trained on: set data.val_path")
    held_out = open_source(run.data.val_path)
    print(f"Training {run.name} for {run.train.steps:,} steps of {run.train.batch_size} images on {hardware()}")
    tokenizer = train_tokenizer(run, out)
    crops, numbers = reconstruct_crops(tokenizer, held_out)
    photos = reconstruct_photos(tokenizer, open_source(WHOLE.get(run.data.val_path, run.data.val_path)))
    log = read_log(out / LOG)
    result = QuickstartResult(numbers, Trained.of(run, tokenizer, log), None, hardware())
    page = out / ("index.html" if write_page else "metrics.json")

    def write(found: FirstLook) -> None:
        write_json(out / "metrics.json", found.result.to_json())
        if write_page:
            write_page(out, found)

    first = FirstLook(result, run, log, crops, photos, samples=[])
    write(first)
    print(f"The held-out crops at every scale:\n{format_numbers(numbers)}")
    print(f"Reconstructions and curves: {page} (samples follow)")

    generator_run = generator_of(run, out, generator_steps)
    print(
        f"Training a generator of its latents for {generator_steps:,} steps of {generator_run.train.batch_size} images"
    )
    generator = train_generator(generator_run, out / "dit")
    result = replace(result, generator=Trained.of(generator_run, generator, read_log(out / "dit" / LOG)))
    write(replace(first, result=result, samples=sample_pyramid(generator, tokenizer)))
    print(f"Pictures, samples, curves and what to do next: {page}")
    return result


def reconstruct_crops(tokenizer: HieraTok, source: Source) -> tuple[list[Reconstructed], Numbers]:
    """All images of a source, cropped as by `hieratok evaluate reconstruction`, and its numbers."""
    config = tokenizer.config
    ((names, _, originals),) = evaluation_batches(source, config.image_size, batch_size=len(source))
    pyramid = reconstruct_pyramid(tokenizer, originals)
    metrics = ReconstructionMetrics(patch_size=config.patch_size)
    metrics.update(names, originals, pyramid)
    crops = [
        Reconstructed(name, originals[i], [x[i] for x in pyramid], list(metrics.of_image(name).values()))
        for i, name in enumerate(names)
    ]
    return crops, metrics.compute()


def reconstruct_photos(tokenizer: HieraTok, source: Source) -> list[Reconstructed]:
    """A source's first photos, uncut, of at most 512 px."""
    photos = []
    for i in range(min(PHOTOS, len(source))):
        name, image = source.name(i), source.image(i)
        photo = fit(image, min(image.shape[-2], PHOTO_SIDE), min(image.shape[-1], PHOTO_SIDE))
        pyramid = reconstruct_any(tokenizer, photo)
        metrics = ReconstructionMetrics(patch_size=tokenizer.config.patch_size)
        metrics.update([name], photo[None], [x[None] for x in pyramid])
        photos.append(Reconstructed(name, photo, pyramid, list(metrics.of_image(name).values())))
    return photos


def generator_of(run: TokenizerRun, out: Path, steps: int) -> GeneratorRun:
    """A small DiT on the latents of the images that the tokenizer learned from, all of one class."""
    tiny = recipes.get("dit-tiny")
    assert isinstance(tiny, GeneratorRun)
    channels, side = run.model.latent_channels, run.model.scales[-1]
    return replace(
        tiny,
        name="dit",
        tokenizer=str(out),
        model=replace(tiny.model, latent_channels=channels, latent_size=side, num_classes=1),
        data=run.data,
        train=replace(
            tiny.train,
            steps=steps,
            batch_size=32,
            learning_rate=1e-3,
            min_learning_rate=1e-3,
            ema_decay=0.99,
            save_every=100,
            picture_every=0,
        ),
    )


@torch.inference_mode()
def sample_pyramid(generator: DiT, tokenizer: HieraTok) -> list[Tensor]:
    """A few samples at every scale, coarse to fine: uint8 (B, 3, H_k, W_k). Always the same."""
    assert generator.latents is not None
    (batch,) = sample_latents(generator, SAMPLING)
    return [to_uint8(x).cpu() for x in tokenizer.decode_pyramid(generator.latents.denormalize(batch.latents))]
