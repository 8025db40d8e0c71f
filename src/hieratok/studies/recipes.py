"""The runs of the paper and smaller ones, one function each; a variant changes a few fields of another recipe.

`hieratok recipes` lists them, `hieratok recipes NAME` prints one as YAML, `hieratok train NAME` runs it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from hieratok.core.messages import nearest
from hieratok.core.plugins import load_plugins
from hieratok.generation.config import DiTConfig
from hieratok.losses.config import AdversarialConfig, LossConfig, VFConfig
from hieratok.tokenizer.config import AttentionMode, DownsampleMode, TokenizerConfig
from hieratok.training.config import DataConfig, GeneratorRun, TokenizerRun, TrainConfig

Run = TokenizerRun | GeneratorRun
Build = TypeVar("Build", bound=Callable[[], Run])
RECIPES: dict[str, Callable[[], Run]] = {}


def get(name: str) -> Run:
    """The run called `name`.

    Raises:
        ValueError: no such recipe; offers the nearest name.
    """
    if name not in RECIPES:
        load_plugins()
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}{nearest(name, list(RECIPES))} (`hieratok recipes` lists them)")
    return replace(RECIPES[name](), name=name)


def summary(name: str) -> str:
    """The first line of a recipe's description."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]


def add(name: str, build: Callable[[], Run], doc: str) -> None:
    """Register a recipe that is built from another one."""

    def recipe() -> Run:
        return build()

    recipe.__doc__ = doc
    RECIPES[name] = recipe


def recipe(name: str) -> Callable[[Build], Build]:
    """Register the decorated function as a recipe."""

    def enter(build: Build) -> Build:
        RECIPES[name] = build
        return build

    return enter


# --- the paper's tokenizers -------------------------------------------------------------------------------------------


@recipe("f16d16-multi")
def f16d16_multi() -> TokenizerRun:
    """HieraTok, f16d16, KL 1e-6: scales 1, 2, 4, 8, 16, convolutional down-sampling, scale-causal attention.

    hieratok train f16d16-multi --data IMAGENET/train
    ImageNet at 256 px, 100 epochs at batch 256, learning rate 1e-4 to 1e-6 [ours], LPIPS with VGG-16 (its weights must
    be in torchvision's cache). Expected (paper, table 2): rFID 1.07, PSNR 23.8, LPIPS 0.087, SSIM 0.72. Not measured
    here; the paper does not state hardware or time.
    """
    return TokenizerRun()


@recipe("f16d16-single")
def f16d16_single() -> TokenizerRun:
    """Single-scale baseline, f16d16, KL 1e-6: the same model with S = [16], a plain ViT tokenizer.

    Expected (paper, table 2): rFID 1.47, PSNR 24.4, LPIPS 0.108, SSIM 0.74. Not measured here.
    """
    return single(f16d16_multi())


def single(run: TokenizerRun) -> TokenizerRun:
    """The same run with only the finest scale; a second stage starts from the single-scale first stage."""
    start_from = run.start_from and run.start_from.replace("multi", "single")
    model = replace(run.model, scales=run.model.scales[-1:], downsample="interpolate")
    return replace(run, model=model, start_from=start_from)


def with_kl(run: TokenizerRun, weight: float) -> TokenizerRun:
    """The same run with another KL weight (table 2)."""
    return replace(run, loss=replace(run.loss, kl_weight=weight))


def with_latent_channels(run: TokenizerRun, channels: int) -> TokenizerRun:
    """The same run with another d (table 2)."""
    return replace(run, model=replace(run.model, latent_channels=channels))


def with_scales(run: TokenizerRun, scales: tuple[int, ...]) -> TokenizerRun:
    """The same run with another scale list (table 4)."""
    return replace(run, model=replace(run.model, scales=scales))


def with_mixing(run: TokenizerRun, downsample: DownsampleMode, attention: AttentionMode) -> TokenizerRun:
    """The same run with another down-sampling and attention (table 3)."""
    return replace(run, model=replace(run.model, downsample=downsample, attention=attention))


def _add_tables() -> None:
    base: dict[str, Callable[[], TokenizerRun]] = {"multi": f16d16_multi, "single": f16d16_single}
    for kind, build in base.items():  # table 2
        add(f"f16d16-{kind}-kl1e-5", lambda b=build: with_kl(b(), 1e-5), f"Table 2: f16d16-{kind} with KL 1e-5.")
        add(f"f16d32-{kind}", lambda b=build: with_latent_channels(b(), 32), f"f16d16-{kind} with 32 latent channels.")
        add(
            f"f16d32-{kind}-kl1e-5",
            lambda b=build: with_kl(with_latent_channels(b(), 32), 1e-5),
            f"Table 2: f16d16-{kind} with 32 latent channels and KL 1e-5.",
        )
    modes: tuple[AttentionMode, ...] = ("causal", "independent", "full")
    for downsample in ("conv", "interpolate"):  # table 3
        for attention in modes:
            add(
                f"f16d16-{downsample}-{attention}",
                lambda d=downsample, a=attention: with_mixing(f16d16_multi(), d, a),
                f"Table 3: f16d16-multi with {downsample} down-sampling and {attention} attention.",
            )
    for scales in ((1, 2, 4, 16), (1, 2, 4, 8, 12, 16)):  # table 4
        add(
            "f16d16-scales-" + "-".join(map(str, scales)),
            lambda s=scales: with_scales(f16d16_multi(), s),
            f"Table 4: f16d16-multi with scales {list(scales)}.",
        )


_add_tables()


@recipe("f16d16-multi-stage2")
def f16d16_multi_stage2() -> TokenizerRun:
    """Stage 2 of the paper's scaled-up line: f16d16-multi continued with GAN (0.6) and vf-loss, 40 epochs.

    hieratok train f16d16-multi-stage2 --from runs/f16d16-multi --data IMAGENET/train
    Tables 8 and 9; the discriminator (StyleGAN's residual one), its learning rate, and the vf-loss's weight and margins
    (VA-VAE's) are [ours]. DINOv2 large must be in the hub's cache. Expected (paper, table 1): rFID 0.45. Not measured
    here.
    """
    return stage2(f16d16_multi(), "runs/f16d16-multi", steps=200_182)


def stage2(run: TokenizerRun, start_from: str, steps: int) -> TokenizerRun:
    """Stage 2 of a run: from its weights, with GAN and vf-loss."""
    return replace(
        run,
        start_from=start_from,
        gan=AdversarialConfig(discriminator="residual"),
        vf=VFConfig(weight=0.1, cos_margin=0.5, distance_margin=0.25),
        train=replace(run.train, steps=steps),
    )


def gan_alone(run: TokenizerRun) -> TokenizerRun:
    """The same run without the vf-loss, which needs a foundation model's weights."""
    return replace(run, vf=VFConfig())


def decoder_alone(run: TokenizerRun) -> TokenizerRun:
    """The same run with encoder and latents frozen: generators trained on them stay valid."""
    return replace(run, freeze_encoder=True, vf=VFConfig())


@recipe("f16d16-single-stage2")
def f16d16_single_stage2() -> TokenizerRun:
    """f16d16-multi-stage2 for the single-scale baseline. Not measured here."""
    return single(f16d16_multi_stage2())


@recipe("f16d16-multi-decoder")
def f16d16_multi_decoder() -> TokenizerRun:
    """Stage 2 of the decoder alone: GAN, encoder and latents frozen. Not in the paper, not measured here. [ours]"""
    return decoder_alone(f16d16_multi_stage2())


@recipe("f16d16-multi-512")
def f16d16_multi_512() -> TokenizerRun:
    """512 px from 256 px weights: f16d16-multi continued with every token map twice as wide, scales 2 to 32. [ours]

    hieratok train f16d16-multi-512 --from runs/f16d16-multi --data PHOTOS --train.micro_batch_size 8
    No weight is new: positions are interpolated. 1,364 decoder tokens instead of 341. 4 epochs of ImageNet at batch
    256, a quarter of the learning rate; most of ImageNet's images are smaller than 512 px, so larger photos are better.
    Not in the paper, not measured here (tiny-multi-256 was).
    """
    return at_double_size(f16d16_multi(), "runs/f16d16-multi", steps=20_018)


def at_double_size(run: TokenizerRun, start_from: str, steps: int) -> TokenizerRun:
    """Continue a run with images and token maps twice as wide, at a quarter of the learning rate. [ours]"""
    model = replace(run.model, image_size=2 * run.model.image_size, scales=tuple(2 * s for s in run.model.scales))
    train = replace(run.train, steps=steps, learning_rate=run.train.learning_rate / 4)
    return replace(run, start_from=start_from, model=model, train=train)


@recipe("f16d16-single-512")
def f16d16_single_512() -> TokenizerRun:
    """512 px from 256 px weights: f16d16-multi-512's single-scale baseline. Not measured here."""
    return single(f16d16_multi_512())


# --- smaller runs, for studies on one GPU and first looks on a CPU ----------------------------------------------------


@recipe("small-multi")
def small_multi() -> TokenizerRun:
    """One GPU, minutes: 128 px, f8, so the paper's 16 x 16 latent grid and 341 decoder tokens, with a smaller ViT.

    hieratok train small-multi --data PHOTOS --loss.trunk vgg
    Not measured here.
    """
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=128,
            patch_size=8,
            encoder_width=384,
            encoder_depth=6,
            encoder_heads=6,
            decoder_width=512,
            decoder_depth=8,
            decoder_heads=8,
        ),
        train=TrainConfig(
            steps=5_000,
            batch_size=128,
            learning_rate=3e-4,
            min_learning_rate=1e-5,
            ema_decay=0.999,
            save_every=1_000,
            picture_every=1_000,
        ),
    )


@recipe("small-single")
def small_single() -> TokenizerRun:
    """One GPU, minutes: small-multi's single-scale baseline."""
    return single(small_multi())


@recipe("small-multi-stage2")
def small_multi_stage2() -> TokenizerRun:
    """One GPU, minutes: stage 2 of small-multi with the GAN, without the vf-loss.

    hieratok train small-multi-stage2 --from runs/small-multi --data PHOTOS
    Not measured here.
    """
    run = gan_alone(stage2(small_multi(), "runs/small-multi", steps=2_500))
    gan = AdversarialConfig(
        discriminator="patchgan",
        adaptive=True,
        generator_start=250,
        ramp_steps=250,
        discriminator_learning_rate=2e-4,
        discriminator_min_learning_rate=1e-5,
    )
    return replace(run, gan=gan, train=replace(run.train, learning_rate=1e-4))


@recipe("small-single-stage2")
def small_single_stage2() -> TokenizerRun:
    """One GPU, minutes: small-multi-stage2's single-scale baseline."""
    return single(small_multi_stage2())


@recipe("small-multi-decoder")
def small_multi_decoder() -> TokenizerRun:
    """One GPU, minutes: small-multi-stage2 with encoder and latents frozen."""
    return decoder_alone(small_multi_stage2())


@recipe("imagenette-multi")
def imagenette_multi() -> TokenizerRun:
    """A CPU, hours: 128 px, f8, d 16, the paper's grid and scale list, 4.0M parameters.

    hieratok train imagenette-multi --data 'PHOTOS/*.tar' --loss.trunk_weights SQUEEZENET
    For about 10,000 photos, such as Imagenette's training shards; 25 epochs. The perceptual loss is on SqueezeNet with
    its authors' weights, a small stand-in for VGG-16. One thread of an AMD EPYC: about 16 images/s, so 4.5 hours.
    """
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=128,
            patch_size=8,
            encoder_width=160,
            encoder_depth=2,
            encoder_heads=2,
            decoder_width=160,
            decoder_depth=6,
            decoder_heads=2,
            drop_path=0.0,
            init_std=0.06,
        ),
        data=DataConfig(num_workers=1),
        loss=LossConfig(trunk="squeeze-caffe"),
        train=TrainConfig(
            steps=16_100,
            batch_size=16,
            learning_rate=1e-3,
            min_learning_rate=1e-5,
            ema_decay=0.999,
            save_every=250,
            keep_checkpoints=2,
            picture_every=1_000,
        ),
    )


@recipe("imagenette-single")
def imagenette_single() -> TokenizerRun:
    """A CPU, hours: imagenette-multi's single-scale baseline, 2.7M parameters."""
    return single(imagenette_multi())


@recipe("tiny-multi")
def tiny_multi() -> TokenizerRun:
    """A CPU, minutes: 128 px, f16, scales 1, 2, 4, 8 on the bundled photos, without a perceptual loss.

    hieratok train tiny-multi
    Measured on one thread of a busy AMD EPYC: 47 images/s; on held-out crops PSNR 30.1 dB, where one colour per token
    gives 23.5 dB.
    """
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=128,
            patch_size=16,
            latent_channels=32,
            scales=(1, 2, 4, 8),
            encoder_width=128,
            encoder_depth=1,
            encoder_heads=2,
            decoder_width=128,
            decoder_depth=2,
            decoder_heads=2,
            drop_path=0.0,
            init_std=0.06,
        ),
        data=DataConfig(path="bundled:train", val_path="bundled:val", min_area=0.05, num_workers=1),
        loss=LossConfig(perceptual_weight=0.0),
        train=TrainConfig(
            steps=3_500,
            batch_size=8,
            learning_rate=2e-3,
            min_learning_rate=1e-5,
            ema_decay=0.99,
            precision="fp32",
            log_every=25,
            save_every=250,
            picture_every=500,
        ),
    )


@recipe("tiny-single")
def tiny_single() -> TokenizerRun:
    """A CPU, minutes: tiny-multi's single-scale baseline."""
    return single(tiny_multi())


@recipe("tiny-multi-stage2")
def tiny_multi_stage2() -> TokenizerRun:
    """A CPU, minutes: stage 2 of tiny-multi, a small PatchGAN with the adaptive weight.

    hieratok train tiny-multi-stage2 --from runs/tiny-multi
    [ours] The adaptive weight keeps the GAN's gradient at the size of the reconstruction's. Not measured.
    """
    run = gan_alone(stage2(tiny_multi(), "runs/tiny-multi", steps=1_000))
    gan = AdversarialConfig(
        discriminator="patchgan",
        width=32,
        adaptive=True,
        generator_start=100,
        ramp_steps=200,
        discriminator_learning_rate=5e-4,
        discriminator_min_learning_rate=1e-5,
    )
    return replace(run, gan=gan, train=replace(run.train, learning_rate=2e-4))


@recipe("tiny-single-stage2")
def tiny_single_stage2() -> TokenizerRun:
    """A CPU, minutes: tiny-multi-stage2's single-scale baseline."""
    return single(tiny_multi_stage2())


@recipe("tiny-multi-decoder")
def tiny_multi_decoder() -> TokenizerRun:
    """A CPU, minutes: tiny-multi-stage2 with encoder and latents frozen."""
    return decoder_alone(tiny_multi_stage2())


@recipe("tiny-multi-256")
def tiny_multi_256() -> TokenizerRun:
    """A CPU, minutes: 256 px from tiny-multi's 128 px weights, scales 2, 4, 8, 16, as f16d16-multi-512.

    hieratok train tiny-multi-256 --from runs/tiny-multi
    Measured from the quickstart's tiny-multi on the 20 held-out crops at 256 px; PSNR at 32, 64, 128, 256 px:
    25.07, 29.38, 30.91, 33.02 dB before and 27.21, 29.72, 31.19, 33.12 dB after these 200 steps (about 100 s on one
    thread of an AMD EPYC).
    """
    return at_double_size(tiny_multi(), "runs/tiny-multi", steps=200)


@recipe("tiny-single-256")
def tiny_single_256() -> TokenizerRun:
    """A CPU, minutes: tiny-multi-256's single-scale baseline."""
    return single(tiny_multi_256())


# --- decoders for latents that already exist [ours] -------------------------------------------------------------------


@recipe("preview-sd")
def preview_sd() -> TokenizerRun:
    """One GPU, hours: a multi-scale decoder for Stable Diffusion's latents, f8, d 4: exact previews, coarse to fine.

    hieratok train preview-sd --encoder diffusers:SD/vae --data PHOTOS --cache_latents
    256 px, scales 1 to 32; any autoencoder of diffusers with --encoder, which sets f, d and the scales. The default is
    looked for in the hub's cache. Cached latents take 0.26 MB a photo, and the encoder runs once. Not in the paper, not
    measured here (benchmarks/encoders.py has small ones).
    """
    return TokenizerRun(
        model=TokenizerConfig(
            encoder="diffusers:stabilityai/sd-vae-ft-mse",
            patch_size=8,
            latent_channels=4,
            scales=(1, 2, 4, 8, 16, 32),
            decoder_width=512,
            decoder_depth=8,
            decoder_heads=8,
            drop_path=0.0,
        ),
        data=DataConfig(crop="center"),
        loss=LossConfig(kl_weight=0.0),
        train=TrainConfig(steps=100_000, batch_size=128, learning_rate=3e-4, min_learning_rate=1e-5, ema_decay=0.999),
    )


@recipe("rae-dinov2")
def rae_dinov2() -> TokenizerRun:
    """RAE's representation autoencoder with our decoder: DINOv2-B's features, 16 x 16 x 768, frozen.

    hieratok train rae-dinov2 --data IMAGENET/train
    RAE (Zheng et al. 2025): the encoder sees 224 px, the decoder draws 256 px; noise of up to 0.8 on the features; 16
    epochs at batch 512. DINOv2's weights with registers must lie in the hub's cache.
    Its GAN begins at epoch 8, with a discriminator on DINO-S/8: add --gan.weight 0.75 --gan.discriminator dino. Not
    measured here.
    """
    return TokenizerRun(
        latent_noise=0.8,
        model=TokenizerConfig(encoder="timm:vit_base_patch14_reg4_dinov2.lvd142m", latent_channels=768),
        loss=LossConfig(kl_weight=0.0),
        train=TrainConfig(steps=40_036, batch_size=512, learning_rate=2e-4, min_learning_rate=2e-5),
    )


@recipe("rae-tiny")
def rae_tiny() -> TokenizerRun:
    """A CPU, an hour: a decoder for a small ViT's features, 8 x 8 x 192, at 128 px.

    hieratok train rae-tiny --encoder timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k --data PHOTOS --cache_latents
    Weights in the hub's cache, or any file of that network's with --model.encoder_weights. Without a perceptual loss,
    which needs weights too. Not measured here.
    """
    return TokenizerRun(
        latent_noise=0.8,
        model=TokenizerConfig(
            encoder="timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            image_size=128,
            latent_channels=192,
            scales=(1, 2, 4, 8),
            decoder_width=192,
            decoder_depth=4,
            decoder_heads=3,
            drop_path=0.0,
            init_std=0.06,
        ),
        data=DataConfig(crop="center", num_workers=1),
        loss=LossConfig(perceptual_weight=0.0, kl_weight=0.0),
        train=replace(imagenette_multi().train, steps=10_000, save_every=500, keep_checkpoints=3),
    )


# --- generators: the paper's, and smaller ones ------------------------------------------------------------------------


@recipe("dit-xl")
def dit_xl() -> GeneratorRun:
    """DiT-XL/1, 675M, DDPM with learned variance, on f16d16 latents of ImageNet: the paper's generator.

    hieratok latents runs/f16d16-multi --data IMAGENET/train --out latents/f16d16-multi
    hieratok train dit-xl --tokenizer runs/f16d16-multi --data latents/f16d16-multi
    400k steps at batch 256, constant learning rate 1e-4, betas 0.9 and 0.999, no weight decay; about 40 hours on one
    H20 node (paper). Expected (paper, table 6): gFID 13.3 and IS 68.5 without guidance; of f16d16-single 16.4 and
    57.4. Not measured here.
    """
    return GeneratorRun(train=replace(GeneratorRun().train, save_every=10_000, picture_every=10_000))


@recipe("dit-l")
def dit_l() -> GeneratorRun:
    """DiT-L/1, 458M: dit-xl with 24 layers of width 1024.

    Expected (paper, table 6): gFID 16.5 and IS 58.9; of f16d16-single 19.3 and 50.7. Not measured here.
    """
    return replace(dit_xl(), model=DiTConfig.of_size("l"))


@recipe("dit-b")
def dit_b() -> GeneratorRun:
    """DiT-B/1, 130M: dit-xl with 12 layers of width 768.

    Expected (paper, table 6): gFID 30.8 and IS 35.2; of f16d16-single 33.6 and 31.8. Not measured here.
    """
    return replace(dit_xl(), model=DiTConfig.of_size("b"))


def with_flow(run: GeneratorRun) -> GeneratorRun:
    """The same run with flow matching and logit-normal times, as most generators since DiT. [ours]"""
    return replace(run, model=replace(run.model, objective="flow", learn_sigma=False), time_sampling="logit-normal")


for _size, _build in (("xl", dit_xl), ("l", dit_l), ("b", dit_b)):
    add(f"dit-{_size}-flow", lambda b=_build: with_flow(b()), f"dit-{_size} by flow matching. Not in the paper.")


@recipe("dit-rae")
def dit_rae() -> GeneratorRun:
    """DiT-XL with RAE's wide head, 838M, by flow matching on rae-dinov2's 768 x 16 x 16 latents of ImageNet.

    hieratok latents runs/rae-dinov2 --data IMAGENET/train --out latents/rae-dinov2
    hieratok train dit-rae --tokenizer runs/rae-dinov2 --data latents/rae-dinov2
    RAE's DiT-DH-XL: two blocks of width 2048 on a trunk of width 1152, rotary positions, SwiGLU, RMSNorm, times shifted
    by the latents' size, batch 1024, 80 epochs (its 800 reach gFID 1.51). Not measured here.
    """
    run = with_flow(dit_xl())
    model = replace(
        run.model,
        latent_channels=768,
        norm="rms",
        mlp="swiglu",
        positions="rotary",
        wide_width=2048,
        wide_depth=2,
        wide_heads=16,
        time_shift="dimension",
    )
    train = replace(
        run.train, steps=100_091, batch_size=1024, learning_rate=2e-4, min_learning_rate=2e-5, ema_decay=0.9995
    )
    return replace(run, model=model, train=train)


@recipe("dit-s")
def dit_s() -> GeneratorRun:
    """One GPU, hours: DiT-S/1, 33M, by flow matching on small-multi's 16 x 16 x 16 latents of ImageNet.

    hieratok train dit-s --tokenizer runs/small-multi --data latents/small-multi
    Not measured here.
    """
    run = with_flow(replace(dit_xl(), model=DiTConfig.of_size("s")))
    return replace(run, train=replace(run.train, steps=100_000, save_every=5_000, picture_every=5_000))


@recipe("dit-tiny")
def dit_tiny() -> GeneratorRun:
    """A CPU, hours: a DiT of 2M by flow matching on tiny-multi's 32 x 8 x 8 latents of ten classes.

    hieratok train dit-tiny --tokenizer runs/tiny-multi --data latents/tiny-multi
    Measured: 43 images/s on one thread of a busy AMD EPYC, so two hours. Its samples were not evaluated.
    """
    model = DiTConfig.of_size(
        "tiny", latent_channels=32, latent_size=8, num_classes=10, objective="flow", learn_sigma=False
    )
    return GeneratorRun(
        model=model,
        data=DataConfig(crop="center", num_workers=1),
        time_sampling="logit-normal",
        train=replace(
            GeneratorRun().train,
            steps=5_000,
            batch_size=64,
            learning_rate=5e-4,
            min_learning_rate=5e-4,
            ema_decay=0.999,
            precision="fp32",
            log_every=50,
            save_every=500,
            picture_every=1_000,
        ),
    )
