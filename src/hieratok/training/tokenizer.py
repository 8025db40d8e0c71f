"""Training a tokenizer: stage 1, stage 2 with GAN and vf-loss, or the decoder alone (paper, section 4)."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from hieratok.core import checkpoint
from hieratok.core.devices import best_device
from hieratok.core.distributed import merge_processes, process, process_group
from hieratok.core.errors import NotFinite, TrainingError
from hieratok.core.layers import resize_positions
from hieratok.core.lock import lock
from hieratok.core.pictures import pyramid_sheet
from hieratok.core.progress import progress
from hieratok.core.typed import plain
from hieratok.data import latent_writer
from hieratok.data.images import (
    ImageDataset,
    Source,
    evaluation_batches,
    evenly_spread,
    open_source,
    to_float,
    to_uint8,
)
from hieratok.data.latents import ImagesAndLatents, LatentDataset, LatentStatistics
from hieratok.evaluation.features import load_network
from hieratok.evaluation.protocols import load_perceptual
from hieratok.evaluation.reconstruction import ReconstructionMetrics
from hieratok.losses.adversarial import (
    AdversarialConfig,
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    generator_weight,
    make_discriminator,
    r1_penalty,
)
from hieratok.losses.reconstruction import ReconstructionLoss
from hieratok.losses.vf import VF_MAX_WEIGHT, VFLoss
from hieratok.tokenizer.frozen import FrozenEncoder
from hieratok.tokenizer.model import HieraTok, TokenizerConfig, refuse_former_downsampling
from hieratok.tokenizer.posterior import DiagonalGaussian
from hieratok.tokenizer.scales import Scales
from hieratok.tokenizer.vit import Encoder
from hieratok.training import parallel
from hieratok.training.config import EvalConfig, Optimization, TokenizerRun
from hieratok.training.loop import fit
from hieratok.training.run_folder import SHAPELESS, RunFolder
from hieratok.training.step import Backward, Objective

PICTURE_IMAGES = 6
STATISTICS_IMAGES = 10_000
"""Training images, evenly spread, on which the latents' statistics are measured at the end of a run. [ours]"""


def train_tokenizer(run: TokenizerRun, out: str | Path, allow_changes: bool = False) -> HieraTok:
    """Train a tokenizer, or resume the run in `out`; write `out/tokenizer` at the end.

    Args:
        run: the settings.
        out: the run's folder.
        allow_changes: resume a run in `out` that had other settings.

    Returns:
        The averaged (EMA) tokenizer in evaluation mode, with its latent statistics. Under FSDP2 it is divided among the
        processes: load `out/tokenizer` then.

    Raises:
        ValueError, FileNotFoundError: settings, images or weights that do not fit or are missing, or another process
            that trains in `out`.
        TrainingError: the run diverged, or every checkpoint to resume from is damaged.
        Stopped: SIGTERM came; a checkpoint was saved.
    """
    with lock(out, "train"), process_group():
        return _train_tokenizer(run, RunFolder(out, plain(run), allow_changes, plain(type(run)())))


def _train_tokenizer(run: TokenizerRun, folder: RunFolder) -> HieraTok:
    if run.data.path is None:
        raise ValueError("no images: give --data PATH (a folder of images, WebDataset shards, or `bundled`)")
    size, data = run.model.image_size, run.data
    source = open_source(run.data.path)
    dataset: Dataset = ImageDataset(
        source, size, data.crop, data.flip, run.train.seed, data.on_bad_image, data.min_area
    )
    held_out = open_source(data.val_path) if data.val_path else None
    if run.eval.every and held_out is None:
        raise ValueError("eval.every needs images that are not trained on: set --data.val_path")
    shown = picture_images(ImageDataset(held_out or source, size, "center", False, 0, data.on_bad_image))
    for saved in folder.saved():
        refuse_former_downsampling(saved / "tokenizer")
    tokenizer = initial_tokenizer(run, resumes=bool(folder.saved()))
    if isinstance(tokenizer.encoder, FrozenEncoder):
        tokenizer.encoder.load()  # what is missing is found out before hours of training
        tokenizer.pin_encoder()
    if run.cache_latents:
        dataset = ImagesAndLatents(dataset, cached_latents(run, tokenizer, source, folder.path / "latents"))
    objective = TokenizerObjective(run, tokenizer)
    evaluate = Evaluation(run.eval, held_out, size) if run.eval.every and held_out else None

    trained: Any = fit(
        objective,
        dataset,
        run.train,
        run.data.num_workers,
        folder,
        draw=lambda ema: reconstruction_sheet(ema, shown),  # type: ignore[arg-type]
        evaluate=evaluate,
        evaluate_every=run.eval.every,
    )
    try:
        measure_latents(trained, evenly_spread(source, STATISTICS_IMAGES), size, data.on_bad_image)
    except NotFinite as error:
        raise TrainingError(
            f"the run in {folder.path} diverged: the latents of the trained tokenizer are not finite. Train it again"
            f" with a lower learning rate"
        ) from error
    weights = parallel.whole_weights(trained)
    if process()[0] == 0:
        with checkpoint.atomic_folder(folder.path / "tokenizer") as finished:
            trained.save_pretrained(finished, weights)
            if run.copy_encoder:
                trained.encoder.save(finished / checkpoint.ENCODER)
    return trained


def cached_latents(run: TokenizerRun, tokenizer: HieraTok, source: Source, out: Path) -> LatentDataset:
    """The photos' latents by the frozen encoder, from `out`, where they are written first if need be; every process
    must call."""
    assert run.data.path is not None
    sha256 = tokenizer.encoder_sha256
    facts = {"source": run.model.encoder, "sha256": sha256, "encoder_sha256": sha256, "config": plain(run.model)}
    shape = (run.model.latent_channels, *run.model.grid)
    manifest = latent_writer.describe(facts, source, run.data.path, run.model.image_size, shape)
    latent_writer.write(out, tokenizer, source, run.model.image_size, manifest, run.eval.batch_size, best_device())
    return LatentDataset(out, run.data.flip, run.train.seed)


def initial_tokenizer(run: TokenizerRun, resumes: bool) -> HieraTok:
    """A tokenizer with random weights, or those of `run.start_from`; only its shape matters if a checkpoint follows.

    The positions of a tokenizer of another image size, with all scales in proportion, are interpolated.

    Raises:
        ValueError: `start_from` is a tokenizer of another shape.
        FileNotFoundError: `start_from` does not exist.
    """
    torch.manual_seed(run.train.seed)
    tokenizer = HieraTok(run.model)
    if run.start_from is None or resumes:
        return tokenizer
    try:
        before = HieraTok.from_pretrained(run.start_from)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; name the weights to start from with --from RUN") from error
    weights = before.state_dict()
    shape = [f.name for f in fields(TokenizerConfig) if f.name not in SHAPELESS]
    changed = [name for name in shape if getattr(before.config, name) != getattr(run.model, name)]
    if changed and in_proportion(before.config, run.model):
        changed = [name for name in changed if name not in ("image_size", "scales")]
        for name in {"encoder.positions", "decoder.positions"} & weights.keys():
            weights[name] = resize_positions(weights[name], run.model.grid)
    if run.model.encoder and not changed:
        tokenizer.pin_encoder()
        if before.encoder_sha256 != tokenizer.encoder_sha256:
            raise ValueError(f"{run.start_from} was trained with other weights of {run.model.encoder}")
    if changed:
        differences = ", ".join(
            f"model.{name} {getattr(before.config, name)!r} -> {getattr(run.model, name)!r}" for name in changed
        )
        raise ValueError(f"{run.start_from} is a tokenizer of another shape: {differences}")
    tokenizer.load_state_dict(weights)
    return tokenizer


def in_proportion(a: TokenizerConfig, b: TokenizerConfig) -> bool:
    """Whether two tokenizers differ in the image size only, with all token maps in proportion.

    One can then take the other's weights: positions are interpolated, as for any image of another size, and other
    weights belong to a scale by its index. [ours]
    """
    if a.patch_size != b.patch_size or len(a.scales) != len(b.scales):
        return False
    return all(s * b.image_size == t * a.image_size for s, t in zip(a.scales, b.scales))


class Critic(nn.Module):
    """The discriminator, with the running means of its logits that LeCam needs."""

    def __init__(self, config: AdversarialConfig, image_size: int):
        super().__init__()
        self.discriminator = make_discriminator(config, image_size)
        self.lecam = LeCam()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> logits (B, ...)."""
        return self.discriminator(images)


class TokenizerObjective(Objective):
    """Eq. 3: L_rec, L_perc, L_kl at every scale, L_adv on the finest, and the vf-loss on z.

    Args:
        run: the settings.
        tokenizer: to train.
    """

    methods = ("encode", "decode", "decode_pyramid")

    def __init__(self, run: TokenizerRun, tokenizer: HieraTok):
        self.run = run
        self.tokenizer = tokenizer
        self.criterion = ReconstructionLoss(run.loss, Scales.of(run.model.scales, run.model.grid))
        tokenizer.encoder.requires_grad_(not run.freeze_encoder)
        networks: dict[str, nn.Module] = {"tokenizer": tokenizer}
        optimizations: dict[str, Optimization] = {"tokenizer": run.train}
        self.critic = None
        if run.gan.weight:
            networks["discriminator"] = self.critic = Critic(run.gan, run.model.image_size)
            optimizations["discriminator"] = Optimization(
                learning_rate=run.gan.discriminator_learning_rate,
                min_learning_rate=run.gan.discriminator_min_learning_rate,
                warmup_ratio=run.gan.warmup_ratio,
                betas=run.gan.betas,
                weight_decay=run.gan.weight_decay,
                clip_norm=run.train.clip_norm,
            )
        if run.vf.weight:  # its projection is trained like the tokenizer
            networks["vf"] = VFLoss(run.vf, run.model.latent_channels)
            optimizations["vf"] = run.train
        self.logit_means: list[Tensor] = []
        super().__init__(networks, optimizations)

    def compute(
        self, networks: dict[str, nn.Module], batch: dict[str, Tensor], step: int, backward: Backward
    ) -> dict[str, Tensor]:
        """The tokenizer's loss, then the discriminator's on the same reconstructions."""
        images = to_float(batch["image"])
        known = DiagonalGaussian(batch["mean"], batch["logvar"]) if "mean" in batch else None
        pyramid, posterior, z = networks["tokenizer"](images, known, self.run.latent_noise)
        loss, finest, terms = self.criterion.to(images.device)(pyramid, images, posterior)
        if "vf" in networks:
            vf, vf_terms = networks["vf"](z, images)
            assert isinstance(self.tokenizer.encoder, Encoder)
            c, last_layer = self.run.vf, self.tokenizer.encoder.head.weight
            loss = loss + self.weight(c.weight, c.adaptive, finest, vf, last_layer, VF_MAX_WEIGHT) * vf
            terms |= {"vf": vf.detach(), **vf_terms}
        if self.critic and (weight := generator_weight(step, self.run.gan)):
            adversarial = self.adversarial_loss(self.critic, pyramid[-1])
            last_layer = self.tokenizer.decoder.head.weight
            weight = self.weight(weight, self.run.gan.adaptive, finest, adversarial, last_layer)
            loss = loss + weight * adversarial
            terms |= {"adversarial": adversarial.detach(), "adversarial_weight": weight.detach()}
        terms = {"loss": loss.detach(), **terms}
        fake = pyramid[-1].detach()
        backward(loss)
        if self.critic:
            loss, more = self.discriminator_loss(networks["discriminator"], images, fake, step)
            backward(loss)
            terms |= more
        return terms

    def weight(
        self, weight: float, adaptive: bool, finest: Tensor, other: Tensor, last_layer: Tensor, most: float = 1e4
    ) -> Tensor:
        """A weight relative to the finest scale's reconstruction: by its share of the loss, or by its gradient."""
        if adaptive:
            return weight * adaptive_weight(finest, other, last_layer, most)
        return torch.tensor(weight * self.criterion.finest_share, device=other.device)

    def adversarial_loss(self, critic: Critic, fake: Tensor) -> Tensor:
        """L_adv, with a gradient for the tokenizer and none for the discriminator."""
        critic.requires_grad_(False)
        loss = generator_loss(self.run.gan.loss, critic(fake.float()))
        critic.requires_grad_(True)
        return loss

    def discriminator_loss(
        self, critic: nn.Module, images: Tensor, fake: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss; one forward pass for real and fake images, as DDP needs.

        The R1 penalty is added at every `r1_interval`-th step, in the same backward pass. [ours]: StyleGAN2 makes a
        separate optimiser step for it, with a lower learning rate and betas.
        """
        assert self.critic is not None
        gan = self.run.gan
        real_logits, fake_logits = critic(torch.cat((images, fake.float()))).chunk(2)
        loss = discriminator_loss(gan.loss, real_logits, fake_logits)
        means = torch.stack((real_logits.detach().float().mean(), fake_logits.detach().float().mean()))
        terms = {"discriminator/loss": loss.detach(), "logits/real": means[0], "logits/fake": means[1]}
        if gan.lecam_weight:
            lecam = self.critic.lecam(real_logits, fake_logits)
            loss = loss + gan.lecam_weight * lecam
            terms["discriminator/lecam"] = lecam.detach()
            self.logit_means.append(means)
        if gan.r1_weight and step % gan.r1_interval == 0:
            r1 = r1_penalty(self.critic, images)
            loss = loss + gan.r1_weight / 2 * gan.r1_interval * r1
            terms["discriminator/r1"] = r1.detach()
        return loss, terms

    def finish_step(self, bad: Tensor) -> None:
        """Update LeCam's running means, once per step over all micro-batches."""
        if self.critic and self.logit_means:
            means = torch.stack(self.logit_means).mean(dim=0)
            self.logit_means.clear()
            self.critic.lecam.update(means[0], means[1], bad)


class Evaluation:
    """Metrics of reconstructions of held-out images, which `fit` calls every `eval.every` steps.

    Args:
        config: the settings.
        source: the held-out images.
        size: the tokenizer's image size in pixels.

    Raises:
        ValueError, FileNotFoundError: unknown networks, or weights that are missing.
    """

    def __init__(self, config: EvalConfig, source: Source, size: int):
        self.config = config
        self.source = evenly_spread(source, config.num_images)
        self.size = size
        self.network = None if config.features == "none" else load_network(config.features, config.weights, "cpu")
        self.perceptual = load_perceptual(config.lpips, "cpu")

    def __call__(self, tokenizer: nn.Module) -> dict[str, float]:
        """Numbers by name over all processes, of coarse scales with the side in pixels (`psnr/32`); every process must
        call it."""
        assert isinstance(tokenizer, HieraTok)
        device = tokenizer.latent_mean.device
        for network in (self.network, *self.perceptual):
            if network is not None:
                network.to(device)
        patch_size = tokenizer.config.patch_size
        finest = ReconstructionMetrics(self.network, self.perceptual, patch_size)
        scales = ReconstructionMetrics(patch_size=patch_size)  # pixel metrics only: networks would cost K times as much
        for names, _, originals in evaluation_batches(self.source, self.size, self.config.batch_size, *process()):
            pyramid = reconstruct_pyramid(tokenizer, originals)
            finest.update(names, originals, pyramid[-1])
            scales.update(names, originals, pyramid)
        for metrics in (finest, scales):
            merge_processes(metrics)
        coarse = list(scales.compute().scales.items())[:-1]
        own = {f"{key}/{side}": x for side, row in coarse for key, x in row.items() if key != "n"}
        return finest.compute().finest | own


@torch.no_grad()
def measure_latents(
    tokenizer: HieraTok, source: Source, size: int, on_bad_image: Literal["error", "skip"] = "error"
) -> None:
    """Measure every latent channel's mean and deviation, over all processes, and store them in the tokenizer."""
    statistics = LatentStatistics(tokenizer.config.latent_channels)
    dataset = ImageDataset(source, size, "center", flip=False, on_bad_image=on_bad_image)
    rank, world = process()
    indices = range(rank, len(dataset), world)
    for start in progress(range(0, len(indices), 32), title="latent statistics", unit="batches"):
        images = torch.stack([dataset[index, 0]["image"] for index in indices[start : start + 32]])
        posterior = tokenizer.encode(to_float(images.to(tokenizer.latent_mean.device)))
        statistics.update(posterior.mean, posterior.logvar)
    merge_processes(statistics)
    mean, std = statistics.compute()
    tokenizer.latent_mean.copy_(mean)
    tokenizer.latent_std.copy_(std)


def picture_images(dataset: ImageDataset) -> Tensor:
    """A few images spread over a data set: uint8 (B, 3, H, W)."""
    chosen = evenly_spread(dataset.source, PICTURE_IMAGES).indices
    return torch.stack([dataset[i, 0]["image"] for i in chosen])


def reconstruction_sheet(tokenizer: HieraTok, images: Tensor) -> Image.Image:
    """Every scale's reconstruction beside the original; images uint8 (B, 3, H, W)."""
    return pyramid_sheet(images, reconstruct_pyramid(tokenizer, images))


@torch.no_grad()
def reconstruct_pyramid(tokenizer: HieraTok, images: Tensor) -> list[Tensor]:
    """uint8 (B, 3, H, W) -> every scale's reconstruction from the posterior mean, uint8 (B, 3, H_k, W_k)."""
    posterior = tokenizer.encode(to_float(images.to(tokenizer.latent_mean.device)))
    return [to_uint8(x).cpu() for x in tokenizer.decode_pyramid(posterior.mode(), posterior.image_size)]
