"""Every run of the paper, a function each; a variant changes a few fields of another recipe.

`hieratok recipes` lists them, `hieratok recipes NAME` prints one as YAML, `hieratok train NAME` runs it.
"""

from collections.abc import Callable
from dataclasses import replace

from hieratok.checkpoint import nearest
from hieratok.losses.reconstruction import LossConfig
from hieratok.tokenizer.attention import AttentionMode
from hieratok.tokenizer.downsample import DownsampleMode
from hieratok.tokenizer.model import TokenizerConfig
from hieratok.training.loop import DataConfig, TrainConfig
from hieratok.training.tokenizer import TokenizerRun

RECIPES: dict[str, Callable[[], TokenizerRun]] = {}


def get(name: str) -> TokenizerRun:
    """The run called `name`.

    Raises:
        ValueError: no such recipe; offers the nearest name.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}{nearest(name, list(RECIPES))} (`hieratok recipes` lists them)")
    return replace(RECIPES[name](), name=name)


def summary(name: str) -> str:
    """The first line of a recipe's description."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]


def add(name: str, build: Callable[[], TokenizerRun], doc: str) -> None:
    """Enter a recipe that is built from another one."""

    def recipe() -> TokenizerRun:
        return build()

    recipe.__doc__ = doc
    RECIPES[name] = recipe


def recipe(name: str) -> Callable[[Callable[[], TokenizerRun]], Callable[[], TokenizerRun]]:
    """Enter the decorated function as a recipe."""

    def enter(build: Callable[[], TokenizerRun]) -> Callable[[], TokenizerRun]:
        RECIPES[name] = build
        return build

    return enter


# --- the paper's tokenizers -------------------------------------------------------------------------------------------


@recipe("f16d16-multi")
def f16d16_multi() -> TokenizerRun:
    """HieraTok, f16d16, KL 1e-6: scales 1, 2, 4, 8, 16, convolutional down-sampling, scale-causal attention.

    hieratok train f16d16-multi --data IMAGENET/train
    ImageNet at 256 px, 100 epochs at batch 256, learning rate 1e-4 to 1e-6 [ours], LPIPS with VGG-16 (its weights must
    lie in torchvision's cache). Expected (paper, table 2): rFID 1.07, PSNR 23.8, LPIPS 0.087, SSIM 0.72. Not measured
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
    """The same run with the finest scale alone."""
    return replace(run, model=replace(run.model, scales=run.model.scales[-1:], downsample="interpolate"))


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


@recipe("tiny-multi")
def tiny_multi() -> TokenizerRun:
    """A CPU, minutes: 128 px, f16, scales 1, 2, 4, 8 on the bundled photos, without a perceptual loss.

    hieratok train tiny-multi
    Measured: 25.2 dB PSNR on held-out crops (patch means: 20.7 dB); 47 images/s on one thread of a busy AMD EPYC.
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
