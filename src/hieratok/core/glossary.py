"""The one glossary of numbers: name, direction, unit, meaning; for pages, model cards and tables.

Names are those of metrics.json and of the logs. Four lists, as a name may stand for something else in another file:
`EVALUATION` (`hieratok evaluate`, and evaluations during training), `ANALYSIS` (`hieratok analyze`), `COST` (`hieratok
cost`), `TRAINING` (log.jsonl).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Better = Literal["lower", "higher", "neither"]

ARROWS: dict[Better, str] = {"higher": " ↑", "lower": " ↓", "neither": ""}
ARROWS_MEAN = "↑: higher is better, ↓: lower is better."


@dataclass(frozen=True)
class Metric:
    """What a number is called, and what it says."""

    label: str
    better: Better
    unit: str = ""
    meaning: str = ""
    is_count: bool = False
    """It counts images, and does not measure them."""

    @property
    def with_unit(self) -> str:
        """Its label and unit, such as PSNR (dB)."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def head(self) -> str:
        """Of a column: label, unit, and an arrow towards what is better."""
        return self.with_unit + ARROWS[self.better]


# A network's name may follow ("lpips-vgg", "fd-squeezenet", "perceptual[...]"), and in evaluations during training a
# coarse scale's side in pixels ("psnr/32").
EVALUATION = {
    "n": Metric("images", "neither", "", "How many were measured.", is_count=True),
    "psnr": Metric("PSNR", "higher", "dB", "Peak signal over mean squared error, a mean over images."),
    "baseline_psnr": Metric(
        "PSNR of one colour per token",
        "neither",
        "dB",
        "Of the image with each token's patch in its mean colour: what a tokenizer should be well above.",
    ),
    "baseline_psnr_identical": Metric(
        "images of one colour per token",
        "neither",
        "",
        "They equal that baseline: its PSNR is infinite and not counted.",
        is_count=True,
    ),
    "psnr_identical": Metric(
        "identical images",
        "neither",
        "",
        "Reconstructed without any error: their PSNR is infinite and not counted.",
        is_count=True,
    ),
    "ssim": Metric("SSIM", "higher", "", "Structural similarity of each image; 1 is identical."),
    "lpips": Metric("LPIPS", "lower", "", "Perceptual distance of each image; 0 is identical."),
    "perceptual": Metric("perceptual", "lower", "", "A perceptual distance that is not LPIPS; 0 is identical."),
    "fid": Metric("FID", "lower", "", "Frechet distance of the two sets' Inception features."),
    "fd": Metric("FD", "lower", "", "Frechet distance of another network's features: not FID."),
    "sfid": Metric("sFID", "lower", "", "The same of features that keep places."),
    "sfd": Metric("SFD", "lower", "", "The same of another network's features that keep places: not sFID."),
    "kid": Metric("KID", "lower", "", "Kernel distance of the two sets' Inception features."),
    "kd": Metric("KD", "lower", "", "Kernel distance of another network's features: not KID."),
    "is": Metric("IS", "higher", "", "Inception Score: how sure of a class each image is, and how varied they are."),
    "class-score": Metric("class-score", "higher", "", "The same with another network's classes: not IS."),
    "precision": Metric("precision", "higher", "", "Share of the images that lie among the reference's."),
    "recall": Metric("recall", "higher", "", "Share of the reference that lies among the images."),
}

# With a detail behind a slash where there are several ("noise_psnr/0.1").
ANALYSIS = {
    "density_cv": Metric(
        "density CV",
        "lower",
        "",
        "How unevenly latent vectors fill the t-SNE plane: standard deviation over mean of their densities.",
    ),
    "gini": Metric("Gini coefficient", "lower", "", "The same unevenness on a scale from 0, all equal, to 1."),
    "normalized_entropy": Metric(
        "normalised entropy", "higher", "", "The same as evenness: 1 when every point has the same density."
    ),
    "effective_rank": Metric(
        "effective rank",
        "higher",
        "",
        "How many independent directions the channels use: exp(entropy of the eigenvalues).",
    ),
    "participation_ratio": Metric(
        "participation ratio", "higher", "", "The same with squares, so that the strongest directions count for more."
    ),
    "active_channels": Metric(
        "active channels", "higher", "", "Channels whose posterior mean varies by more than 0.01 (variance)."
    ),
    "dead_channels": Metric("dead channels", "lower", "", "The other channels: they say nothing about the image."),
    "kl": Metric(
        "KL",
        "neither",
        "nats per image",
        "Information that the posterior may carry beyond N(0, I): little means a smooth space, much a faithful one.",
    ),
    "reconstruction_rms": Metric(
        "reconstruction error",
        "lower",
        "RMS",
        "|D(z) - x| in pixel units, -1 to 1: what the errors below start from.",
    ),
    "commutation_error": Metric(
        "commutation error",
        "lower",
        "",
        "|D(T z) - T D(z)|^2 / |T D(z)|^2: decoding the shrunk latent map, against shrinking the decoded image.",
    ),
    "commutation_target_mse": Metric(
        "pooled latents against the image",
        "lower",
        "MSE",
        "|D(T z) - T x|^2 per pixel: a commutation error is only worth something where this is small as well.",
    ),
    "pyramid_error": Metric(
        "pyramid error",
        "lower",
        "",
        "The commutation error of a multi-scale decoder's own scales: each against the finest one, shrunk.",
    ),
    "pyramid_target_mse": Metric(
        "own scale against the image",
        "lower",
        "MSE",
        "|scale k - T x|^2 per pixel: what training at every scale minimises.",
    ),
    "equivariance_decoder": Metric(
        "equivariance of the decoder",
        "lower",
        "RMS",
        "|D(tau z) - tau x|: turning or halving the latent map against doing so with the image; pixel units, -1 to 1.",
    ),
    "equivariance_encoder": Metric(
        "equivariance of the encoder",
        "lower",
        "RMS",
        "|E(tau x) - tau E(x)| in standard deviations of the latents; unrelated latents have about 1.4.",
    ),
    "latent_high_frequency_share": Metric(
        "latents: high-frequency share",
        "lower",
        "",
        "Share of the energy beside DC in the finest details (u + v >= 8 of an 8 x 8 block); white noise has 0.44.",
    ),
    "rgb_high_frequency_share": Metric(
        "images: high-frequency share", "neither", "", "The same of the images themselves, to compare with."
    ),
    "latent_power_slope": Metric(
        "latents: slope of the spectrum",
        "neither",
        "",
        "Log power over log frequency: 0 is white noise; the steeper it falls, the smoother the latent maps.",
    ),
    "rgb_power_slope": Metric(
        "images: slope of the spectrum", "neither", "", "The same of the images; photos have -2 to -3."
    ),
    "noise_psnr": Metric(
        "PSNR under noise",
        "higher",
        "dB",
        "PSNR of D(z + sigma eps), sigma in standard deviations: how wrong a generator's latents may be.",
    ),
}

COST = {
    "parameters": Metric("parameters", "neither", "M", "Weights of the whole tokenizer."),
    "gflops": Metric("GFLOPs", "neither", "", "Of one forward pass of one image, two per multiply-add."),
    "gflops_without_attention": Metric(
        "GFLOPs without attention",
        "neither",
        "",
        "Matrix products and convolutions with weights alone: no queries times keys, no weights times values.",
    ),
    "encoder_tokens": Metric("encoder tokens", "neither", "", "Of the finest scale, which is what is encoded."),
    "decoder_tokens": Metric("decoder tokens", "neither", "", "Of all scales together."),
}

# A scale's side in pixels or a network's name may follow ("l1/64", "perceptual[...]").
TRAINING = {
    "loss": Metric("loss", "lower", "", "What is minimised: all terms with their weights."),
    "l1": Metric("l1", "lower", "", "Mean absolute error; pixels in [-1, 1]."),
    "mse": Metric("mse", "lower", "", "Mean squared error, of pixels in [-1, 1] or of what a generator predicts."),
    "kl": Metric("kl", "neither", "nats per image", "KL divergence of the posterior."),
    "perceptual": Metric("perceptual", "lower", "", "Perceptual distance."),
    "vb": Metric("vb", "lower", "", "Variational bound: what trains a DDPM's variance."),
    "vf": Metric("vf", "lower", "", "Vision-foundation loss."),
    "adversarial": Metric("adversarial", "neither", "", "GAN loss of the tokenizer."),
    "adversarial_weight": Metric("adversarial_weight", "neither", "", "What the GAN loss is multiplied by."),
    "discriminator": Metric("discriminator", "neither", "", "Loss of the discriminator."),
    "logits": Metric("logits", "neither", "", "Mean output of the discriminator."),
    "gradient_norm": Metric("gradient_norm", "neither", "", "Length of the gradient before clipping."),
    "images_per_second": Metric("images_per_second", "higher", "", "Over all processes."),
    "data_wait": Metric("data_wait", "lower", "", "Share of the time spent waiting for data."),
}


def describe(key: str, glossary: Mapping[str, Metric] = EVALUATION) -> Metric | None:
    """What a name stands for, with the network or the scale behind it in its label; None: it is not in the glossary."""
    if scale := re.fullmatch(r"(.+)/(\d+(?:x\d+)?)", key):
        metric = describe(scale[1], glossary)
        return replace(metric, label=f"{metric.label}, {scale[2]} px") if metric else None
    for stem, metric in glossary.items():
        if key == stem:
            return metric
        if key.startswith((f"{stem}-", f"{stem}[")):
            return replace(metric, label=metric.label + key[len(stem) :])
    return None
