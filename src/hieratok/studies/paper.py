"""The paper's tables and figures as rows: what each row trains or measures, with the paper's numbers.

`hieratok study table3` runs one (`hieratok.studies.run`). Every row is built from one base run, a size's f16d16
multi-scale tokenizer, by the same functions that build the recipes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from hieratok.core import glossary
from hieratok.core.messages import nearest
from hieratok.core.plugins import load_plugins
from hieratok.generation.config import Sampler
from hieratok.studies import recipes
from hieratok.studies.config import SizeName
from hieratok.studies.recipes import single, with_kl, with_latent_channels, with_mixing, with_scales
from hieratok.training.config import GeneratorRun, TokenizerRun

Build = Callable[[TokenizerRun], TokenizerRun]
Need = Literal[
    "reconstruction", "generation", "guided", "curves", "density", "commutation", "spectrum", "samples", "cost"
]
GeneratorName = Literal["scaled up", "xl", "l", "b"]


@dataclass(frozen=True)
class Metric:
    """A column of the paper's tables, and the measured number for it."""

    need: Need
    """The measurement that has the number."""
    key: str
    """The number's name there; with a final "-", a prefix of the name: the paper does not say which LPIPS it uses."""
    stand_in: str = ""
    """Prefix of other networks' distances, which are not in this column, but whose direction can be compared."""

    @property
    def meaning(self) -> glossary.Metric:
        """The glossary's entry: direction and unit."""
        lists = {"density": glossary.ANALYSIS, "cost": glossary.COST}
        found = glossary.describe(self.key, lists.get(self.need, glossary.EVALUATION))
        assert found is not None
        return found

    @property
    def better(self) -> glossary.Better:
        """The direction of improvement."""
        return self.meaning.better


METRICS = {
    "rFID": Metric("reconstruction", "fid", "fd-"),
    "PSNR": Metric("reconstruction", "psnr"),
    "LPIPS": Metric("reconstruction", "lpips-", "perceptual["),
    "SSIM": Metric("reconstruction", "ssim"),
    "gFID": Metric("generation", "fid", "fd-"),
    "IS": Metric("generation", "is", "class-score-"),
    "gFID at the last step": Metric("curves", "fid", "fd-"),
    "gFID with CFG": Metric("guided", "fid", "fd-"),
    "density CV": Metric("density", "density_cv"),
    "Gini": Metric("density", "gini"),
    "entropy": Metric("density", "normalized_entropy"),
    "parameters": Metric("cost", "parameters"),
    "GFLOPs": Metric("cost", "gflops"),
    "encoder tokens": Metric("cost", "encoder_tokens"),
    "decoder tokens": Metric("cost", "decoder_tokens"),
}


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    label: tuple[str, ...]
    """Labels in the study's columns."""
    build: Build | None
    """The base run -> this row's tokenizer. None: another system, whose published numbers are only shown."""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's numbers, by the names of `METRICS`."""
    against: int | None = None
    """Index of the reference row for effects; None for such a row itself."""
    generator: GeneratorName = "xl"
    """The paper's DiT on these latents; scaled up: XL with 5M steps instead of 400k."""
    stage2: bool = False
    """Continue with the second stage of the scaled-up line."""
    doubtful: tuple[str, ...] = ()
    """The paper's probable misprints, by the names of `METRICS`: effects on them do not count."""

    @property
    def name(self) -> str:
        """The label as text."""
        return ", ".join(self.label)


@dataclass(frozen=True)
class Study:
    """One table or figure."""

    title: str
    columns: tuple[str, ...]
    """Headers of the rows' labels."""
    metrics: tuple[str, ...]
    """Names of `METRICS`, in the paper's order."""
    rows: tuple[Row, ...]
    needs: tuple[Need, ...]
    note: str = ""
    """A note for the page."""
    every_scale: bool = False
    """Reconstructions are measured at every scale, and not at the finest alone."""


# --- Rows' variants ---------------------------------------------------------------------------------------------------


def multi(run: TokenizerRun) -> TokenizerRun:
    """The base itself."""
    return run


def scales(*sides: int) -> Build:
    """The paper's scale list, for a 16 x 16 grid; in proportion on a smaller one, without scales below one token.

    On 8 x 8: 1, 2, 4, 8, 16 -> 1, 2, 4, 8; 1, 2, 4, 16 -> 1, 2, 8; 1, 2, 4, 8, 12, 16 -> 1, 2, 4, 6, 8.
    """

    def build(run: TokenizerRun) -> TokenizerRun:
        grid = run.model.scales[-1]
        return with_scales(run, tuple(s * grid // sides[-1] for s in sides if s * grid >= sides[-1]))

    return build


def kl(build: Build, channels: int, weight: float) -> Build:
    """d and KL weight of table 2."""
    return lambda run: with_kl(with_latent_channels(build(run), channels), weight)


def mixing(downsample: Literal["conv", "interpolate"], attention: Literal["causal", "independent", "full"]) -> Build:
    """Down-sampling and attention of table 3."""
    return lambda run: with_mixing(run, downsample, attention)


def numbers(names: tuple[str, ...], *values: float) -> dict[str, float]:
    """The paper's numbers by name."""
    return dict(zip(names, values, strict=True))


# --- The paper's tables and figures -----------------------------------------------------------------------------------

GUIDANCE = 1.5
"""Weight of "gFID with CFG". [ours]"""

SYSTEMS = ("rFID", "gFID", "gFID with CFG")
QUALITY = ("rFID", "PSNR", "LPIPS", "SSIM", "gFID", "IS")
DENSITY = ("density CV", "Gini", "entropy", "gFID")
GENERATION = ("gFID", "IS")
COST = ("parameters", "GFLOPs", "encoder tokens", "decoder tokens")


def _system(name: str, tokenizer: str, rfid: float, gfid: float | None, guided: float | None) -> Row:
    paper = {"rFID": rfid, "gFID": gfid, "gFID with CFG": guided}
    return Row((name, tokenizer), None, {k: v for k, v in paper.items() if v is not None})


TABLE1 = Study(
    "Table 1: systems on ImageNet at 256 px",
    ("system", "tokenizer"),
    SYSTEMS,
    (
        _system("LDM + MAR", "conv", 0.53, 2.35, 1.55),
        _system("SD-VAE + REPA", "conv", 0.61, 5.90, 1.42),
        _system("SD-VAE + MDT", "conv", 0.61, 6.23, 1.79),
        _system("SD-VAE + MDTv2", "conv", 0.61, None, 1.58),
        _system("SD-VAE + DiT", "conv", 0.61, 9.62, 2.27),
        _system("SD-VAE + SiT", "conv", 0.61, 8.61, 2.06),
        _system("SD-VAE + MaskDiT", "conv", 0.61, 5.69, 2.28),
        _system("VAR-VAE + VAR-d30", "conv", 1.00, None, 1.92),
        _system("VA-VAE + LightningDiT", "conv", 0.28, 2.17, 1.35),
        _system("MaskGIT", "ViT", 2.28, 6.18, None),
        _system("VQGAN + LlamaGen", "ViT", 0.59, 9.38, 2.18),
        _system("FlexTok", "ViT", 1.45, None, 1.86),
        _system("ViTok", "ViT", 0.46, None, 2.45),
        _system("TiTok-S", "ViT", 1.71, None, 1.97),
        _system("MAETok + LightningDiT", "ViT", 0.48, None, 1.73),
        _system("GigaTok", "ViT", 0.79, None, 1.98),
        Row(("HieraTok + DiT", "ViT"), multi, numbers(SYSTEMS, 0.45, 3.53, 1.82), None, "scaled up", True),
    ),
    ("reconstruction", "generation", "guided"),
    "Only the last row is trained here; the others are the paper's numbers for other systems. The paper does not give"
    f" its guidance weight: here {GUIDANCE}, as DiT's.",
)

TABLE2 = Study(
    "Table 2: single-scale and multi-scale tokenizers",
    ("spec", "KL weight", "tokenizer"),
    QUALITY,
    (
        Row(("f16d16", "1e-6", "single"), kl(single, 16, 1e-6), numbers(QUALITY, 1.47, 24.4, 0.108, 0.74, 16.4, 57.4)),
        Row(("f16d16", "1e-6", "multi"), kl(multi, 16, 1e-6), numbers(QUALITY, 1.07, 23.8, 0.087, 0.72, 13.3, 68.5), 0),
        Row(("f16d16", "1e-5", "single"), kl(single, 16, 1e-5), numbers(QUALITY, 1.76, 23.9, 0.122, 0.72, 20.2, 51.0)),
        Row(("f16d16", "1e-5", "multi"), kl(multi, 16, 1e-5), numbers(QUALITY, 1.61, 22.8, 0.115, 0.67, 17.9, 55.5), 2),
        Row(("f16d32", "1e-5", "single"), kl(single, 32, 1e-5), numbers(QUALITY, 1.60, 24.3, 0.119, 0.73, 24.3, 43.6)),
        Row(("f16d32", "1e-5", "multi"), kl(multi, 32, 1e-5), numbers(QUALITY, 1.54, 23.0, 0.113, 0.68, 19.4, 52.5), 4),
    ),
    ("reconstruction", "generation"),
)

TABLE3 = Study(
    "Table 3: down-sampling and attention",
    ("down-sampling", "attention"),
    QUALITY,
    (
        Row(("conv", "causal"), mixing("conv", "causal"), numbers(QUALITY, 1.07, 23.8, 0.087, 0.72, 13.3, 68.5)),
        Row(
            ("conv", "independent"),
            mixing("conv", "independent"),
            numbers(QUALITY, 1.13, 23.7, 0.093, 0.71, 14.0, 65.3),
            0,
        ),
        Row(("conv", "full"), mixing("conv", "full"), numbers(QUALITY, 1.24, 23.6, 0.099, 0.71, 16.6, 56.4), 0),
        Row(
            ("interpolate", "causal"),
            mixing("interpolate", "causal"),
            numbers(QUALITY, 1.18, 23.7, 0.095, 0.71, 17.8, 52.1),
            0,
        ),
        Row(
            ("interpolate", "independent"),
            mixing("interpolate", "independent"),
            numbers(QUALITY, 1.16, 23.7, 0.091, 0.71, 17.2, 54.4),
            0,
        ),
        Row(
            ("interpolate", "full"),
            mixing("interpolate", "full"),
            numbers(QUALITY, 1.13, 23.0, 0.113, 0.68, 16.9, 55.7),
            0,
            doubtful=("PSNR", "LPIPS", "SSIM"),
        ),
    ),
    ("reconstruction", "generation"),
    "In the row interpolate, full the paper prints PSNR 23.0, LPIPS 0.113 and SSIM 0.68, which are table 2's of f16d32"
    " multi to the digit and far from its neighbours: probably a misprint. Effects on these three are shown and not"
    " counted.",
)

TABLE4 = Study(
    "Table 4: scale lists",
    ("the paper's scales",),
    QUALITY,
    (
        Row(("16",), single, numbers(QUALITY, 1.47, 24.4, 0.108, 0.74, 16.4, 57.4)),
        Row(("1, 2, 4, 16",), scales(1, 2, 4, 16), numbers(QUALITY, 1.25, 23.6, 0.092, 0.71, 15.9, 60.2), 0),
        Row(("1, 2, 4, 8, 16",), scales(1, 2, 4, 8, 16), numbers(QUALITY, 1.07, 23.8, 0.087, 0.72, 13.3, 68.5), 0),
        Row(
            ("1, 2, 4, 8, 12, 16",),
            scales(1, 2, 4, 8, 12, 16),
            numbers(QUALITY, 1.04, 23.9, 0.087, 0.72, 13.8, 66.8),
            0,
        ),
    ),
    ("reconstruction", "generation"),
)

TABLE5 = Study(
    "Table 5: how evenly latents fill their space",
    ("spec", "tokenizer"),
    DENSITY,
    (
        # Its gFIDs are table 2's: d = 16 with KL 1e-6, d = 32 with 1e-5.
        Row(("f16d16", "single"), kl(single, 16, 1e-6), numbers(DENSITY, 0.522, 0.299, 0.984, 16.4)),
        Row(("f16d16", "multi"), kl(multi, 16, 1e-6), numbers(DENSITY, 0.381, 0.216, 0.991, 13.3), 0),
        Row(("f16d32", "single"), kl(single, 32, 1e-5), numbers(DENSITY, 0.656, 0.371, 0.976, 24.3)),
        Row(("f16d32", "multi"), kl(multi, 32, 1e-5), numbers(DENSITY, 0.435, 0.249, 0.988, 19.4), 2),
    ),
    ("density", "generation"),
    "Measured by VA-VAE's published procedure, as in the paper (`hieratok analyze --protocol vavae`): a sample"
    " of the posterior of each image or its mirror image at one random position, standardised by the statistics of"
    " these images, t-SNE, kernel density. [ours]: averaged over several draws of such points.",
)

TABLE6 = Study(
    "Table 6: generators of three sizes",
    ("generator", "tokenizer"),
    GENERATION,
    (
        Row(("DiT-XL", "single"), single, numbers(GENERATION, 16.4, 57.4)),
        Row(("DiT-XL", "multi"), multi, numbers(GENERATION, 13.3, 68.5), 0),
        Row(("DiT-L", "single"), single, numbers(GENERATION, 19.3, 50.7), generator="l"),
        Row(("DiT-L", "multi"), multi, numbers(GENERATION, 16.5, 58.9), 2, generator="l"),
        Row(("DiT-B", "single"), single, numbers(GENERATION, 33.6, 31.8), generator="b"),
        Row(("DiT-B", "multi"), multi, numbers(GENERATION, 30.8, 35.2), 4, generator="b"),
    ),
    ("generation",),
)

TABLE7 = Study(
    "Table 7: what a tokenizer costs",
    ("tokenizer",),
    COST,
    (
        Row(("single",), single, numbers(COST, 346.25, 182.36, 256, 256)),
        Row(("multi",), multi, numbers(COST, 401.18, 230.45, 256, 341), 0),
    ),
    ("cost",),
    "GFLOPs are of one forward pass of one image, two per multiply-add. The paper does not say how it counts.",
)

FIGURE4 = Study(
    "Figure 4: how fast a generator learns",
    ("tokenizer",),
    ("gFID at the last step",),
    (
        Row(("single",), single, {"gFID at the last step": 16.4}),
        Row(("multi",), multi, {"gFID at the last step": 13.3}, 0),
    ),
    ("curves",),
    "The paper: with the multi-scale tokenizer the generator reaches the same gFID 1.38 times sooner.",
)
PAPER_SPEED_UP = 1.38

FIGURE5 = replace(
    TABLE5,
    title="Figure 5: latents in the t-SNE plane",
    metrics=DENSITY[:3],
    rows=tuple(replace(row, paper={k: v for k, v in row.paper.items() if k != "gFID"}) for row in TABLE5.rows),
    needs=("density",),
)

APPENDIX_B = Study(
    "Appendix B: does decoding commute with shrinking?",
    ("tokenizer",),
    (),
    (Row(("single",), single), Row(("multi",), multi, {}, 0)),
    ("commutation",),
    "The paper argues that D(T z) is close to T D(z) for a well-trained tokenizer and gives no number. An error is"
    " meaningful only where the mean squared error against the image itself is small too.",
)

APPENDIX_D = Study(
    "Appendix D: samples at every scale",
    ("tokenizer",),
    (),
    (Row(("multi",), multi),),
    ("samples",),
    "The paper shows pictures and gives no number.",
)

ENCODERS = Study(
    "Encoders: one decoder on latents of several kinds",
    ("encoder",),
    (),
    (Row(("the paper's ViT, trained with the decoder",), multi),),
    ("reconstruction", "density", "spectrum", "curves"),
    "Not in the paper. A frozen encoder has its own row with --encoders; its latents decide f, d and the scales, all"
    " else is the base's.",
    every_scale=True,
)


def with_encoders(study: Study, encoders: Sequence[str]) -> Study:
    """The study with a row for each frozen encoder, beside the paper's.

    Raises:
        ValueError: a study that compares none, or an encoder twice.
    """
    if study.title != ENCODERS.title:
        if encoders:
            raise ValueError("--encoders is for the study encoders")
        return study
    if not encoders:
        raise ValueError("encoders compares frozen ones with the paper's: name some with --encoders '[timm:NAME=FILE]'")
    if len(set(encoders)) < len(encoders):
        raise ValueError("--encoders names one twice")
    rows = (Row((encoder.partition("=")[0],), on_encoder(encoder), against=0) for encoder in encoders)
    return replace(study, rows=(*study.rows, *rows))


def on_encoder(encoder: str) -> Build:
    """The base on a frozen encoder, `timm:NAME=FILE` with its weights."""
    name, _, weights = encoder.partition("=")

    def build(run: TokenizerRun) -> TokenizerRun:
        from hieratok.tokenizer.frozen import with_encoder  # it needs torch

        model = with_encoder(run.model, name, encoder_weights=weights or None)
        return replace(run, model=model, loss=replace(run.loss, kl_weight=0.0))

    return build


STUDIES: dict[str, Study] = {
    "table1": TABLE1,
    "table2": TABLE2,
    "table3": TABLE3,
    "table4": TABLE4,
    "table5": TABLE5,
    "table6": TABLE6,
    "table7": TABLE7,
    "figure4": FIGURE4,
    "figure5": FIGURE5,
    "appendix-b": APPENDIX_B,
    "appendix-d": APPENDIX_D,
    "encoders": ENCODERS,
}


def add_row(study: str, row: Row) -> None:
    """Add a row to a study, for a plugin: at its end, so that other rows keep their numbers.

    Raises:
        ValueError: no such study, a label that does not fit its columns or is there already, or no row to compare with.
    """
    if study not in STUDIES:
        raise ValueError(f"no study {study!r}{nearest(study, list(STUDIES))} (there are {', '.join(STUDIES)})")
    before = STUDIES[study]
    if len(row.label) != len(before.columns):
        raise ValueError(f"a row of {study} has {len(before.columns)} labels ({', '.join(before.columns)})")
    if row.against is not None and not 0 <= row.against < len(before.rows):
        raise ValueError(f"{study} has rows 0 to {len(before.rows) - 1} to compare with, not {row.against}")
    if any(other.label == row.label for other in before.rows):
        raise ValueError(f"{study} has a row {row.name!r} already")
    STUDIES[study] = replace(before, rows=(*before.rows, row))


def get(name: str) -> Study:
    """The study called `name`.

    Raises:
        ValueError: no such study; offers the nearest name.
    """
    load_plugins()
    if name not in STUDIES:
        raise ValueError(f"no study {name!r}{nearest(name, list(STUDIES))} (there are {', '.join(STUDIES)})")
    return STUDIES[name]


# --- Sizes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The size of a study's runs."""

    base: Callable[[], TokenizerRun]
    """The f16d16 multi-scale tokenizer of this size."""
    stage2: Callable[[], TokenizerRun]
    """Its second stage (table 1)."""
    generators: dict[GeneratorName, Callable[[], GeneratorRun]]
    """Stand-ins for the paper's generators; latents and classes are set later."""
    sampler: Sampler
    """Of gFID."""
    sampler_steps: int
    """Of it."""
    samples: int
    """Number of samples for gFID."""
    curve_samples: int
    """Number of samples for each point of figure 4's curves."""
    draws: int
    """Sets of points that densities are averaged over."""
    note: str
    """Differences from the paper."""
    gfid_reference: str | None = None
    """Description of the reference for samples, if --reference is required. None: the held-out images."""


def tiny_base() -> TokenizerRun:
    """tiny-multi with the paper's 16 latent channels and few steps: a row takes about half a minute on two cores."""
    run = with_latent_channels(recipes.tiny_multi(), 16)
    return replace(run, train=replace(run.train, steps=400, save_every=100, picture_every=0))


def tiny_generator(depth: int) -> GeneratorRun:
    """dit-tiny with fewer blocks and few steps."""
    run = recipes.dit_tiny()
    train = replace(run.train, steps=100, batch_size=32, log_every=10, save_every=50, picture_every=0)
    return replace(run, model=replace(run.model, depth=depth), train=train)


def small_generator(depth: int) -> GeneratorRun:
    """dit-s with fewer blocks and steps: minutes on one GPU."""
    run = recipes.dit_s()
    return replace(run, model=replace(run.model, depth=depth), train=replace(run.train, steps=20_000, batch_size=128))


def scaled_up_generator() -> GeneratorRun:
    """dit-xl, trained as long as the paper's table 1."""
    run = recipes.dit_xl()
    return replace(run, train=replace(run.train, steps=5_000_000))


SIZES: dict[SizeName, Size] = {
    "tiny": Size(
        tiny_base,
        recipes.tiny_multi_stage2,
        {
            "scaled up": lambda: tiny_generator(6),
            "xl": lambda: tiny_generator(6),
            "l": lambda: tiny_generator(4),
            "b": lambda: tiny_generator(2),
        },
        "euler",
        10,
        samples=64,
        curve_samples=32,
        draws=2,
        note="Size tiny: 128 px and f16, so an 8 x 8 grid instead of 16 x 16 (scale lists halved, what falls below one"
        " token left out), a transformer of 1.5M parameters, no perceptual loss, seconds of training on ten photos"
        " unless other images are given;"
        " DiT-XL, L and B stand for 6, 4 and 2 blocks of width 128, by flow matching."
        " It only shows that everything runs; its numbers say nothing about the paper's.",
    ),
    "small": Size(
        recipes.small_multi,
        recipes.small_multi_stage2,
        {
            "scaled up": lambda: small_generator(12),
            "xl": lambda: small_generator(12),
            "l": lambda: small_generator(8),
            "b": lambda: small_generator(4),
        },
        "euler",
        50,
        samples=5_000,
        curve_samples=2_000,
        draws=10,
        note="Size small: 128 px and f8, so the paper's 16 x 16 grid and 341 tokens, with a smaller transformer and"
        " shorter training. f16 in the labels stands for f8; DiT-XL, L and B stand for 12, 8 and 4 blocks"
        " of width 384, by flow matching.",
    ),
    "paper": Size(
        recipes.f16d16_multi,
        recipes.f16d16_multi_stage2,
        {"scaled up": scaled_up_generator, "xl": recipes.dit_xl, "l": recipes.dit_l, "b": recipes.dit_b},
        "ddpm",
        250,
        samples=50_000,
        curve_samples=5_000,
        draws=10,
        note="Size paper: the paper's settings. The text lacks learning rates, so those are this project's."
        " gFID's reference: ADM's statistics of ImageNet's training set, as is usual; the paper does not say.",
        gfid_reference="ADM's statistics of ImageNet's training set, VIRTUAL_imagenet256_labeled.npz from"
        " https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/",
    ),
}
