"""The glossary of all numbers: name, direction, unit, meaning; for pages, model cards and tables.

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
    """A number's name and meaning."""

    label: str
    better: Better
    unit: str = ""
    meaning: str = ""
    is_count: bool = False
    """A count of images, not a measurement."""

    @property
    def with_unit(self) -> str:
        """Its label and unit, such as PSNR (dB)."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def head(self) -> str:
        """Column header: label, unit, and an arrow towards better values."""
        return self.with_unit + ARROWS[self.better]


# A network's name may follow ("lpips-vgg", "fd-squeezenet", "perceptual[...]"), and in evaluations during training a
# coarse scale's side in pixels ("psnr/32").
EVALUATION = {
    "n": Metric("images", "neither", "", "Number of images measured.", is_count=True),
    "psnr": Metric("PSNR", "higher", "dB", "Peak signal to mean squared error, averaged over images."),
    "baseline_psnr": Metric(
        "PSNR of one colour per token",
        "neither",
        "dB",
        "The image with each token's patch in its mean colour. A tokenizer should be well above it.",
    ),
    "baseline_psnr_identical": Metric(
        "images of one colour per token",
        "neither",
        "",
        "Images that equal this baseline: PSNR is infinite and not counted.",
        is_count=True,
    ),
    "psnr_identical": Metric(
        "identical images",
        "neither",
        "",
        "Images reconstructed without error: PSNR is infinite and not counted.",
        is_count=True,
    ),
    "ssim": Metric("SSIM", "higher", "", "Structural similarity of each image; 1 is identical."),
    "lpips": Metric("LPIPS", "lower", "", "Perceptual distance of each image; 0 is identical."),
    "perceptual": Metric("perceptual", "lower", "", "A perceptual distance that is not LPIPS; 0 is identical."),
    "fid": Metric("FID", "lower", "", "Frechet distance of the two sets' Inception features."),
    "fd": Metric("FD", "lower", "", "Frechet distance of another network's features: not FID."),
    "sfid": Metric("sFID", "lower", "", "Frechet distance of Inception features that keep positions."),
    "sfd": Metric("SFD", "lower", "", "Frechet distance of another network's features that keep positions: not sFID."),
    "kid": Metric("KID", "lower", "", "Kernel distance of the two sets' Inception features."),
    "kd": Metric("KD", "lower", "", "Kernel distance of another network's features: not KID."),
    "is": Metric("IS", "higher", "", "Inception Score: how sure of a class each image is, and how varied they are."),
    "class-score": Metric("class-score", "higher", "", "IS's formula with another network's classes: not IS."),
    "precision": Metric("precision", "higher", "", "Share of the images that lie within the reference set."),
    "recall": Metric("recall", "higher", "", "Share of the reference set that lies within the images."),
}

# A detail may follow after a slash ("noise_psnr/0.1").
ANALYSIS = {
    "density_cv": Metric(
        "density CV",
        "lower",
        "",
        "How unevenly latent vectors fill the t-SNE plane: standard deviation over mean of their densities.",
    ),
    "gini": Metric("Gini coefficient", "lower", "", "Unevenness of the same densities, from 0, all equal, to 1."),
    "normalized_entropy": Metric(
        "normalised entropy", "higher", "", "Evenness of the same densities: 1 when all are equal."
    ),
    "effective_rank": Metric(
        "effective rank",
        "higher",
        "",
        "How many independent directions the channels use: exp(entropy of the eigenvalues).",
    ),
    "participation_ratio": Metric(
        "participation ratio", "higher", "", "Like the effective rank, with more weight on the strongest directions."
    ),
    "active_channels": Metric(
        "active channels", "higher", "", "Channels whose posterior mean varies by more than 0.01 (variance)."
    ),
    "dead_channels": Metric("dead channels", "lower", "", "Channels that carry nothing about the image."),
    "kl": Metric(
        "KL",
        "neither",
        "nats per image",
        "KL divergence of the posterior from N(0, I): small for a smooth space, large for a faithful one.",
    ),
    "reconstruction_rms": Metric(
        "reconstruction error",
        "lower",
        "RMS",
        "|D(z) - x| in pixel units, -1 to 1: a floor of the errors below.",
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
        "|D(T z) - T x|^2 per pixel: a commutation error means something only where this is small too.",
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
        "|D(tau z) - tau x|, tau halves or rotates: of the latent map against the image; pixel units, -1 to 1.",
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
        "Share of the energy, without DC, in the finest details (u + v >= 8 of an 8 x 8 block); white noise has 0.44.",
    ),
    "rgb_high_frequency_share": Metric(
        "images: high-frequency share", "neither", "", "The same share for the images, for comparison."
    ),
    "latent_power_slope": Metric(
        "latents: slope of the spectrum",
        "neither",
        "",
        "Log power over log frequency: 0 is white noise; the steeper it falls, the smoother the latent maps.",
    ),
    "rgb_power_slope": Metric(
        "images: slope of the spectrum", "neither", "", "The same slope for the images; photos have -2 to -3."
    ),
    "noise_psnr": Metric(
        "PSNR under noise",
        "higher",
        "dB",
        "PSNR of D(z + sigma eps), sigma in standard deviations: how much error in z the decoder tolerates.",
    ),
}

COST = {
    "parameters": Metric("parameters", "neither", "M", "Weights of the whole tokenizer."),
    "gflops": Metric("GFLOPs", "neither", "", "Of one forward pass of one image, two per multiply-add."),
    "gflops_without_attention": Metric(
        "GFLOPs without attention",
        "neither",
        "",
        "Without attention's products of queries with keys and of attention weights with values.",
    ),
    "encoder_tokens": Metric("encoder tokens", "neither", "", "Tokens of the finest scale, as encoded."),
    "decoder_tokens": Metric("decoder tokens", "neither", "", "Of all scales together."),
}

# A scale's side in pixels or a network's name may follow ("l1/64", "perceptual[...]").
TRAINING = {
    "loss": Metric("loss", "lower", "", "The minimised sum of all terms with their weights."),
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
    "gradient_norm": Metric("gradient_norm", "neither", "", "Norm of the gradient before clipping."),
    "images_per_second": Metric("images_per_second", "higher", "", "Over all processes."),
    "data_wait": Metric("data_wait", "lower", "", "Share of the time spent waiting for data."),
}


def describe(key: str, glossary: Mapping[str, Metric] = EVALUATION) -> Metric | None:
    """The entry of a name, with its network or scale added to the label; None: it is not in the glossary."""
    if scale := re.fullmatch(r"(.+)/(\d+(?:x\d+)?)", key):
        metric = describe(scale[1], glossary)
        return replace(metric, label=f"{metric.label}, {scale[2]} px") if metric else None
    for stem, metric in glossary.items():
        if key == stem:
            return metric
        if key.startswith((f"{stem}-", f"{stem}[")):
            return replace(metric, label=metric.label + key[len(stem) :])
    return None
