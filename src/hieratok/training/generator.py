"""Training a generator of a tokenizer's latents, from latents on disk or from images (paper, section 4)."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from hieratok.core import checkpoint
from hieratok.core.distributed import merge_processes, process, process_group
from hieratok.core.lock import lock
from hieratok.core.pictures import to_pil
from hieratok.core.typed import plain
from hieratok.data.images import ImageDataset, open_source, to_float, to_uint8
from hieratok.data.latents import MANIFEST, LatentDataset, whose
from hieratok.evaluation.distribution import distances
from hieratok.evaluation.features import load_network
from hieratok.evaluation.images import open_images
from hieratok.evaluation.protocols import collect
from hieratok.evaluation.statistics import FeatureSet, SetStatistics
from hieratok.generation import diffusion, flow
from hieratok.generation.dit import DiT, DiTConfig, LatentSpace
from hieratok.generation.sampling import SampleConfig, sample_latents
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.pretrained import DiffusersTokenizer, Tokenizer, load_tokenizer
from hieratok.training import parallel
from hieratok.training.config import GeneratorRun
from hieratok.training.loop import fit
from hieratok.training.run_folder import RunFolder
from hieratok.training.step import Backward, Objective

PICTURE_IMAGES, PICTURE_COLUMNS, PICTURE_STEPS = 16, 8, 50


def train_generator(run: GeneratorRun, out: str | Path, allow_changes: bool = False) -> DiT:
    """Train a generator, or resume the run in `out`; write `out/generator` at the end.

    Args:
        run: the settings.
        out: the run's folder.
        allow_changes: resume a run in `out` that had other settings.

    Returns:
        The averaged (EMA) generator in evaluation mode, with its latents' statistics.

    Raises:
        ValueError, FileNotFoundError: settings, latents, images or weights that do not fit or are missing, or another
            process that trains in `out`.
        TrainingError: the run diverged, or every checkpoint to resume from is damaged.
        Stopped: SIGTERM came; a checkpoint was saved.
    """
    with lock(out, "train"), process_group():
        return _train_generator(run, RunFolder(out, plain(run), allow_changes, plain(type(run)())))


def _train_generator(run: GeneratorRun, folder: RunFolder) -> DiT:
    tokenizer = None
    if run.tokenizer:
        tokenizer = load_tokenizer(run.tokenizer, latent_size=run.model.latent_size).requires_grad_(False)
    dataset, latents = open_latents(run, tokenizer)
    torch.manual_seed(run.train.seed)
    generator = DiT(run.model)
    generator.latents = latents
    evaluate = GeneratorEvaluation(run, tokenizer) if run.eval.every and tokenizer else None

    trained: Any = fit(
        GeneratorObjective(run, generator, tokenizer),
        dataset,
        run.train,
        run.data.num_workers,
        folder,
        draw=(lambda ema: sample_sheet(ema, tokenizer)) if tokenizer else None,  # type: ignore[arg-type]
        evaluate=evaluate,
        evaluate_every=run.eval.every,
    )
    weights = parallel.whole_weights(trained)
    if process()[0] == 0:
        with checkpoint.atomic_folder(folder.path / "generator") as finished:
            trained.save_pretrained(finished, weights)
    return trained


def open_latents(run: GeneratorRun, tokenizer: Tokenizer | None) -> tuple[Dataset, LatentSpace]:
    """The training data, latents or images, and the space of the latents.

    Raises:
        ValueError, FileNotFoundError: no data, or data that do not fit the tokenizer or the model.
    """
    path, data = run.data.path, run.data
    if path is None:
        raise ValueError("no latents: give --data DIR, a folder of `hieratok latents`, or images and --tokenizer RUN")
    if (Path(path) / MANIFEST).is_file():
        if data.crop != "center":
            raise ValueError(f"{path} holds latents of centre crops: data.crop must be center, not {data.crop}")
        dataset = LatentDataset(path, data.flip, run.train.seed)
        manifest = dataset.manifest
        assert manifest.mean is not None
        assert manifest.std is not None
        latents = LatentSpace(manifest.tokenizer["encoder_sha256"], manifest.mean, manifest.std)
        if tokenizer and tokenizer.encoder_sha256 != latents.encoder_sha256:
            assert run.tokenizer is not None
            raise ValueError(f"{path} holds latents of {whose(manifest.tokenizer['source'], run.tokenizer)}")
        check_model(run.model, path, manifest.shape, dataset.labels.tolist())
        return dataset, latents
    source = open_source(path)
    if tokenizer is None:
        raise ValueError(f"{path} holds images, not latents: name the tokenizer that encodes them with --tokenizer RUN")
    if isinstance(tokenizer, DiffusersTokenizer):
        raise ValueError(
            f"generators learn {run.tokenizer} from a folder of its latents:"
            f" hieratok latents {run.tokenizer} --data {path} --out DIR"
        )
    if not (tokenizer.latent_std.isfinite().all() and tokenizer.latent_mean.isfinite().all()):
        raise ValueError(
            f"the latent statistics of {run.tokenizer} were not measured:"
            f" hieratok latents {run.tokenizer} --data {path} --stats-only"
        )
    mean, std = tuple(tokenizer.latent_mean.tolist()), tuple(tokenizer.latent_std.tolist())
    shape = (tokenizer.config.latent_channels, *tokenizer.config.grid)
    check_model(run.model, path, shape, [source.label(i) for i in range(len(source))])
    size = tokenizer.config.image_size
    images = ImageDataset(source, size, data.crop, data.flip, run.train.seed, data.on_bad_image, data.min_area)
    return images, LatentSpace(tokenizer.encoder_sha256, mean, std)


def check_model(model: DiTConfig, path: str, shape: tuple[int, ...], labels: Sequence[int]) -> None:
    """Check that the model fits the latents and their classes.

    Raises:
        ValueError: it does not; the message has the flags to add.
    """
    flags = fitting(model, path, shape, labels)
    if flags:
        d, h, w = shape
        raise ValueError(
            f"{path} gives latents {d} x {h} x {w} of {num_classes(labels)} classes, which do not fit the model:"
            f" add {' '.join(flags)}"
        )


def fitting(model: DiTConfig, path: str, shape: tuple[int, ...], labels: Sequence[int]) -> list[str]:
    """The flags that make a model fit its data; none if it fits.

    Args:
        model: of the recipe.
        path: of the data, for messages.
        shape: (d, h, w) of a latent.
        labels: of the images; images without a class count as one class.

    Raises:
        ValueError: some images have a class and others none.
    """
    if min(labels) < 0 <= max(labels):
        raise ValueError(f"{path}: some images have a class and others none; sub-folders are classes")
    wanted = {"latent_channels": shape[0], "latent_size": shape[1], "num_classes": num_classes(labels)}
    changes = [(f"--model.{name}", str(value)) for name, value in wanted.items() if getattr(model, name) != value]
    return [word for change in changes for word in change]


def num_classes(labels: Sequence[int]) -> int:
    """The number of classes, at least 1, of labels 0, 1, ... or -1 for none."""
    return max(1, max(labels) + 1)


class GeneratorObjective(Objective):
    """The DDPM or flow loss on normalised samples of z, before multi-scale down-sampling.

    Args:
        run: the settings.
        generator: to train, with its latent space.
        tokenizer: encodes the data if they are images.
    """

    def __init__(self, run: GeneratorRun, generator: DiT, tokenizer: Tokenizer | None = None):
        assert generator.latents is not None
        self.run = run
        self.space = generator.latents
        self.tokenizer = tokenizer
        super().__init__({"generator": generator}, {"generator": run.train})

    def compute(
        self, networks: dict[str, nn.Module], batch: dict[str, Tensor], step: int, backward: Backward
    ) -> dict[str, Tensor]:
        """The generator's loss alone."""
        z = self.latents(batch)
        y = batch["label"].clamp(min=0)  # -1, no classes: one class for all
        if self.run.model.objective == "ddpm":
            loss, terms = diffusion.loss(networks["generator"], z, y)
        else:
            times: Any = {"time_sampling": self.run.time_sampling, "shift": self.run.model.shift}
            loss, terms = flow.loss(networks["generator"], z, y, **times)
        backward(loss)
        return {"loss": loss.detach(), **terms}

    @torch.no_grad()
    def latents(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch of latents' moments or of images -> normalised samples of z (B, d, h, w), float32."""
        if "image" in batch:
            assert self.tokenizer is not None
            images = to_float(batch["image"])
            with torch.autocast(images.device.type, enabled=False):  # as in `hieratok latents`
                posterior = self.tokenizer.to(images.device).encode(images)
            mean, logvar = posterior.mean.contiguous(), posterior.logvar  # noise is drawn in memory order
        else:
            mean, logvar = batch["mean"], batch["logvar"]
        return self.space.normalize(DiagonalGaussian(mean, logvar).sample())


class GeneratorEvaluation:
    """The Frechet distance of samples from real images, which `fit` calls every `eval.every` steps.

    Args:
        run: the settings.
        tokenizer: decodes.

    Raises:
        ValueError, FileNotFoundError: unknown networks, or weights or references that are missing or do not fit.
    """

    def __init__(self, run: GeneratorRun, tokenizer: Tokenizer):
        config = run.eval
        assert config.reference is not None
        self.config = config
        self.tokenizer = tokenizer
        self.sampling = quick_sampling(run.model, config.num_images, config.steps, config.batch_size, labels="random")
        self.network = load_network(config.features, config.weights, "cpu")
        self.source, self.statistics = None, None
        if config.reference.endswith(".npz"):
            self.statistics = SetStatistics.load(config.reference, self.network)
        else:
            self.source = open_images(config.reference)

    def __call__(self, generator: nn.Module) -> dict[str, float]:
        """Numbers by name, over all processes; every process must call it."""
        assert isinstance(generator, DiT)
        self.network.to(next(generator.parameters()).device)
        rank, world = process()
        samples = FeatureSet(self.network, keep=0 if self.network.class_weights is None else None)
        # Every process samples equally often, as FSDP2 needs; samples in excess are dropped.
        rounds = math.ceil(self.config.num_images / world)
        mine = [rank + world * i for i in range(rounds)]
        for indices, images in decoded_samples(generator, self.tokenizer, self.sampling, mine):
            kept = [i for i, index in enumerate(indices) if index < self.config.num_images]
            if kept:
                samples.update(images[kept], [str(indices[i]) for i in kept])
        merge_processes(samples)
        return distances(samples.compute(), self.reference(), self.network)

    def reference(self) -> SetStatistics:
        """Statistics of the real images, measured at the first use."""
        if self.statistics is None:
            assert self.source is not None
            size = self.tokenizer.config.image_size
            self.statistics = collect(self.source, self.network, size, self.config.batch_size, "reference", keep=0)
        return self.statistics


def quick_sampling(
    model: DiTConfig, num: int, steps: int, batch_size: int, labels: Literal["balanced", "random"]
) -> SampleConfig:
    """Settings for few steps of a deterministic sampler without guidance, always with the same noise and labels."""
    sampler = "ddim" if model.objective == "ddpm" else "euler"
    return SampleConfig(sampler, steps, num=num, batch_size=batch_size, labels=labels)


def decoded_samples(
    generator: DiT, tokenizer: Tokenizer, config: SampleConfig, indices: Sequence[int] | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of samples: their indices, and the finest images, uint8 (B, 3, H, W) on the CPU."""
    assert generator.latents is not None
    tokenizer = tokenizer.to(next(generator.parameters()).device)
    for batch in sample_latents(generator, config, indices):
        with torch.no_grad():
            images = tokenizer.decode(generator.latents.denormalize(batch.latents))
        yield batch.indices, to_uint8(images).cpu()


def sample_sheet(generator: DiT, tokenizer: Tokenizer) -> Image.Image:
    """A few samples of the first classes, always with the same noise."""
    config = quick_sampling(generator.config, PICTURE_IMAGES, PICTURE_STEPS, PICTURE_IMAGES, labels="balanced")
    _, images = next(decoded_samples(generator, tokenizer, config))
    return to_pil(make_grid(images, nrow=PICTURE_COLUMNS, pad_value=255))
