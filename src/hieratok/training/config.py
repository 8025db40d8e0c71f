"""The settings of a training run as dataclasses: recipes return them, YAML files and run folders hold them.

Imports no torch, so that help and recipes are fast.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from hieratok.core.precision import Precision
from hieratok.generation.config import STEPS, DiTConfig, TimeSampling
from hieratok.losses.config import AdversarialConfig, LossConfig, VFConfig
from hieratok.tokenizer.config import TokenizerConfig

Strategy = Literal["ddp", "fsdp2"]
TrackerName = Literal["tensorboard", "wandb"]


def check_name(name: str) -> None:
    """Refuse a name that cannot be a run's, which is written to runs/NAME.

    Raises:
        ValueError: it leads elsewhere.
    """
    parts = name.replace("\\", "/").split("/")
    if not all(part.strip() and part not in (".", "..") and "\0" not in part for part in parts) or ":" in parts[0]:
        raise ValueError(f"name {name!r} does not lead to a folder in runs/: choose another, or set --out")


@dataclass(frozen=True)
class DataConfig:
    """Training images and their crops.

    Raises:
        ValueError: settings out of range.
    """

    path: str | None = None
    """Folder of images (class = sub-folder), WebDataset shards (folder, file or 'glob-*.tar'), a zip, a folder of
    Hugging Face's datasets, Parquet; s3://, gs://, hf:// or https:// of such files; or `bundled`."""
    val_path: str | None = None
    """Held-out images, for pictures and evaluation during training. None: pictures of `path`, centre-cropped."""
    crop: Literal["random-resized", "center"] = "random-resized"
    """Training crop; evaluation always takes the ADM centre crop. [ours]: the paper names no crop; DiT's is center."""
    min_area: float = 0.5
    """Smallest share of an image's area in a random-resized crop. [ours]"""
    flip: bool = True
    """Mirror half of the images. [ours]: the paper does not say; DiT does."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at an unreadable image and name it (error), or skip and count it (skip)."""
    num_workers: int = 8
    """Processes that decode images, for each training process; 0: the training process decodes."""

    def __post_init__(self):
        for name in ("path", "val_path"):
            value = getattr(self, name)
            if value and value.endswith("/"):  # `photos/` is `photos`, also when a resumed run's settings are compared
                object.__setattr__(self, name, value.rstrip("/") or "/")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"data.min_area must be in (0, 1], not {self.min_area}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must not be negative, it is {self.num_workers}")


@dataclass(frozen=True)
class Optimization:
    """One network's optimiser, AdamW, and its schedule. Defaults: the paper's stage 1 (table 8), except [ours].

    Raises:
        ValueError: settings out of range.
    """

    learning_rate: float = 1e-4
    """Learning rate after warm-up. [ours]: the paper's value is missing."""
    min_learning_rate: float = 1e-6
    """Learning rate at the end of the cosine. [ours]: the paper's value is missing."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.05
    """AdamW's weight decay, not for norms, biases, positions and scale embeddings. [ours]: the paper does not say."""
    clip_norm: float = 1.0
    """Gradients are clipped to this norm. [ours]: the paper mentions no clipping, and DiT has none."""

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        group = "train" if isinstance(self, TrainConfig) else "optimization"
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"{group}.warmup_ratio must be in [0, 1), not {self.warmup_ratio}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{group}.{name} must be positive, not {getattr(self, name)}")
        if not (0 <= self.min_learning_rate <= self.learning_rate and self.weight_decay >= 0):
            raise ValueError(
                f"{group}.min_learning_rate must lie between 0 and {group}.learning_rate, and {group}.weight_decay"
                f" must not be negative"
            )


@dataclass(frozen=True)
class TrainConfig(Optimization):
    """Optimisation, logging and checkpoints.

    Raises:
        ValueError: settings out of range.
    """

    steps: int = 500_456
    """Optimiser steps; the paper's 100 epochs of 1,281,167 images at batch 256."""
    batch_size: int = 256
    """Images per step over all processes (paper, appendices E and F)."""
    micro_batch_size: int | None = None
    """Images per forward pass; gradients are accumulated over the batch. None: a process's whole share."""
    ema_decay: float = 0.9999
    """Decay per step of the averaged (EMA) weights, which become the model; lower in the first steps. [ours]"""
    precision: Precision = "bf16"
    """bf16: autocast; norms, softmax and losses stay in float32. fp16: the same for GPUs without bf16, with gradient
    scaling. [ours]: the paper does not say."""
    compile: bool = False
    """Use torch.compile: a slower start, then faster."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: a third more time, much less memory."""
    parallel: Strategy = "ddp"
    """With several processes: ddp keeps the whole model in each, fsdp2 divides it among them."""
    seed: int = 0
    """Seed of weights, data order, augmentation and noise."""
    max_bad_steps: int = 20
    """Steps with a loss or gradient that is not finite are skipped; after this many in a row, the run returns to its
    last checkpoint and takes the data in another order."""
    max_rollbacks: int = 3
    """Largest number of returns to the last good checkpoint; then the run ends with an error."""
    log_every: int = 50
    """Steps between lines in log.jsonl and in the tracker."""
    tracker: TrackerName = "tensorboard"
    """Tracker of numbers and pictures: TensorBoard's files in the run's folder, or Weights & Biases (wandb), which
    sends them to your account, or with WANDB_MODE=offline keeps them in the run's folder."""
    save_every: int = 5_000
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """Number of checkpoints to keep, the latest ones."""
    picture_every: int = 5_000
    """Steps between pictures; 0: none."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "batch_size", "log_every", "save_every", "keep_checkpoints", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of train.micro_batch_size"
                f" {self.micro_batch_size}"
            )
        if self.precision == "fp16" and self.parallel == "fsdp2":
            raise ValueError("train.precision fp16 does not go with train.parallel fsdp2: use bf16, or ddp")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must be in [0, 1), not {self.ema_decay}")
        if self.picture_every < 0 or self.max_rollbacks < 0 or self.seed < 0:
            raise ValueError("train.picture_every, train.max_rollbacks and train.seed must not be negative")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the averaged model on `data.val_path` during training; it does not change the run.

    Raises:
        ValueError: settings out of range.
    """

    every: int = 0
    """Steps between evaluations, with one at the end; 0: none. Results go to evaluations.jsonl and the tracker."""
    num_images: int = 1_000
    """Number of held-out images, evenly spread."""
    features: str = "none"
    """Feature network of the Frechet distance, as for `hieratok evaluate`; none: no distance."""
    weights: str | None = None
    """File with the feature network's weights. None: torch's cache."""
    lpips: tuple[str, ...] = ()
    """Trunks of LPIPS, each optionally =FILE, as for `hieratok evaluate`."""
    batch_size: int = 32
    """Batch size in images."""

    def __post_init__(self):
        object.__setattr__(self, "lpips", tuple(self.lpips))
        if self.every < 0 or self.num_images < 2 or self.batch_size < 1:
            raise ValueError(
                f"eval.every must not be negative, eval.num_images at least 2 and eval.batch_size at least 1, not"
                f" {self.every}, {self.num_images} and {self.batch_size}"
            )


@dataclass(frozen=True)
class TokenizerRun:
    """All settings of a tokenizer's training run.

    Raises:
        ValueError: settings that do not fit together.
    """

    kind: Literal["tokenizer"] = "tokenizer"
    """The model to train."""
    name: str = "tokenizer"
    """Name of the run, which is written to runs/NAME unless --out is given."""
    start_from: str | None = None
    """Initial weights: a run, a tokenizer's folder or a hub id (short: `--from`). None: random weights. With another
    image size, positions are interpolated; patch size and scales must keep their proportions."""
    freeze_encoder: bool = False
    """Train only the part after z, so that latents, and generators trained on them, stay valid."""
    latent_noise: float = 0.0
    """Largest deviation of the noise that is added to z in training, drawn evenly from 0 for each image, so that the
    decoder stands a generator's errors. RAE's code has 0.8, with features of unit variance. 0: none."""
    cache_latents: bool = False
    """With a frozen `model.encoder`: encode all photos once, into the run's folder `latents`, and train on them; needs
    data.crop center."""
    copy_encoder: bool = False
    """With a frozen `model.encoder`: put a copy of its weights into the finished tokenizer's folder."""
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Stage 1's losses."""
    gan: AdversarialConfig = field(default_factory=lambda: AdversarialConfig(weight=0.0))
    """Stage 2's GAN loss."""
    vf: VFConfig = field(default_factory=VFConfig)
    """The vision-foundation loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation during training."""

    def __post_init__(self):
        check_name(self.name)
        if self.freeze_encoder and self.start_from is None:
            raise ValueError("freeze_encoder needs a trained encoder: name it with --from RUN")
        if self.freeze_encoder and self.vf.weight:
            raise ValueError("vf.weight trains the encoder, which freeze_encoder forbids: use only one of them")
        if not 0 <= self.latent_noise < math.inf:
            raise ValueError(f"latent_noise must not be negative, it is {self.latent_noise}")
        self._check_encoder()
        for name, config in (("gan", self.gan), ("vf", self.vf)):
            if config.weight and config.adaptive and self.train.parallel == "fsdp2":
                raise ValueError(f"{name}.adaptive needs whole gradients of the last layer: not with fsdp2")

    def _check_encoder(self) -> None:
        frozen = self.model.encoder is not None
        for name in ("cache_latents", "copy_encoder"):
            if getattr(self, name) and not frozen:
                raise ValueError(f"{name} is for a frozen model.encoder, and the paper's is trained")
        if frozen and self.loss.kl_weight:
            raise ValueError("loss.kl_weight must be 0 beside a frozen model.encoder, which learns nothing from it")
        if frozen and self.vf.weight:
            raise ValueError("vf.weight must be 0 beside a frozen model.encoder, which learns nothing from it")
        if frozen and self.freeze_encoder:
            raise ValueError("leave out freeze_encoder: model.encoder is frozen anyway")
        if self.cache_latents and (self.data.crop, self.data.on_bad_image) != ("center", "error"):
            raise ValueError("cache_latents needs data.crop center and data.on_bad_image error: one latent a photo")


@dataclass(frozen=True)
class GeneratorEval:
    """Evaluation of the averaged model's samples during training; it does not change the run.

    The noise and labels are the same every time, without guidance; the sampler is ddim or euler.

    Raises:
        ValueError: settings out of range.
    """

    every: int = 0
    """Steps between evaluations, with one at the end; 0: none. Results go to evaluations.jsonl and the tracker."""
    num_images: int = 5_000
    """Samples."""
    reference: str | None = None
    """Real images, or an .npz of their statistics, as for `hieratok evaluate samples`."""
    features: str = "inception"
    """Feature network of the Frechet distance, as for `hieratok evaluate`."""
    weights: str | None = None
    """File with the feature network's weights. None: torch's cache."""
    steps: int = 50
    """Steps of the sampler: few, as curves are compared only with each other."""
    batch_size: int = 64
    """Batch size in images."""

    def __post_init__(self):
        if self.every < 0 or self.num_images < 2 or self.batch_size < 1 or not 1 <= self.steps <= STEPS:
            raise ValueError(
                f"eval.every must not be negative, eval.num_images at least 2, eval.batch_size at least 1 and"
                f" eval.steps from 1 to {STEPS}, not {self.every}, {self.num_images}, {self.batch_size} and"
                f" {self.steps}"
            )


@dataclass(frozen=True)
class GeneratorRun:
    """All settings of a generator's training run. Defaults: the paper's DiT-XL on f16d16.

    Raises:
        ValueError: settings that do not fit together.
    """

    kind: Literal["generator"] = "generator"
    """The model to train."""
    name: str = "generator"
    """Name of the run, which is written to runs/NAME unless --out is given."""
    tokenizer: str | None = None
    """The tokenizer of the latents: a run, a tokenizer's folder or a hub id, or a folder of diffusers' AutoencoderKL or
    AutoencoderDC, then with latents as --data. None: no pictures and evaluation; --data must be a folder of latents."""
    model: DiTConfig = field(default_factory=DiTConfig)
    """The generator."""
    data: DataConfig = field(default_factory=lambda: DataConfig(crop="center"))
    """Training data: `path` is a folder of `hieratok latents`, or images, which are encoded again at every step."""
    time_sampling: TimeSampling = "uniform"
    """Distribution of training times for objective flow: uniform, or more in the middle (logit-normal)."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=400_000,
            learning_rate=1e-4,
            min_learning_rate=1e-4,  # constant, as in DiT
            warmup_ratio=0.0,
            betas=(0.9, 0.999),
            weight_decay=0.0,
        )
    )
    """Optimisation. Steps, batch and optimiser: the paper's (appendix F); EMA: DiT's; bf16
    and gradient clipping are [ours]."""
    eval: GeneratorEval = field(default_factory=GeneratorEval)
    """Evaluation during training."""

    def __post_init__(self):
        check_name(self.name)
        if self.time_sampling != "uniform" and self.model.objective != "flow":
            raise ValueError(f"time_sampling {self.time_sampling} is for model.objective flow")
        if self.eval.every and self.tokenizer is None:
            raise ValueError("eval.every evaluates decoded samples: name their tokenizer, --tokenizer RUN")
        if self.eval.every and self.eval.reference is None:
            raise ValueError("eval.every compares samples with real images: set --eval.reference PATH")
