"""What each number in an analysis' `metrics.json` is, in plain words: the names' documentation, for table and page."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Meaning:
    """One number."""

    label: str
    better: Better
    text: str


MEANINGS: dict[str, Meaning] = {
    "density_cv": Meaning(
        "density CV",
        "lower",
        "How unevenly latent vectors fill the t-SNE plane: standard deviation over mean of their densities.",
    ),
    "gini": Meaning("Gini coefficient", "lower", "The same unevenness on a scale from 0, all equal, to 1."),
    "normalized_entropy": Meaning(
        "normalised entropy", "higher", "The same as evenness: 1 when every point has the same density."
    ),
    "effective_rank": Meaning(
        "effective rank", "higher", "How many independent directions the channels use: exp(entropy of the eigenvalues)."
    ),
    "participation_ratio": Meaning(
        "participation ratio", "higher", "The same with squares, so that the strongest directions count for more."
    ),
    "active_channels": Meaning(
        "active channels", "higher", "Channels whose posterior mean varies by more than 0.01 (variance)."
    ),
    "dead_channels": Meaning("dead channels", "lower", "The other channels: they say nothing about the image."),
    "kl": Meaning(
        "KL (nats per image)",
        "neither",
        "Information that the posterior may carry beyond N(0, I): little means a smooth space, much a faithful one.",
    ),
    "reconstruction_rms": Meaning(
        "reconstruction error (RMS)", "lower", "|D(z) - x| in pixel units, -1 to 1: what the errors below start from."
    ),
    "commutation_error": Meaning(
        "commutation error",
        "lower",
        "|D(T z) - T D(z)|^2 / |T D(z)|^2: decoding the shrunk latent map, against shrinking the decoded image.",
    ),
    "commutation_target_mse": Meaning(
        "pooled latents against the image (MSE)",
        "lower",
        "|D(T z) - T x|^2 per pixel: a commutation error is only worth something where this is small as well.",
    ),
    "pyramid_error": Meaning(
        "pyramid error",
        "lower",
        "The commutation error of a multi-scale decoder's own scales: each against the finest one, shrunk.",
    ),
    "pyramid_target_mse": Meaning(
        "own scale against the image (MSE)",
        "lower",
        "|scale k - T x|^2 per pixel: what training at every scale minimises.",
    ),
    "equivariance_decoder": Meaning(
        "equivariance of the decoder (RMS)",
        "lower",
        "|D(tau z) - tau x|: turning or halving the latent map against doing so with the image; pixel units, -1 to 1.",
    ),
    "equivariance_encoder": Meaning(
        "equivariance of the encoder (RMS)",
        "lower",
        "|E(tau x) - tau E(x)| in standard deviations of the latents; unrelated latents have about 1.4.",
    ),
    "latent_high_frequency_share": Meaning(
        "latents: high-frequency share",
        "lower",
        "Share of the energy beside DC in the finest details (u + v >= 8 of an 8 x 8 block); white noise has 0.44.",
    ),
    "rgb_high_frequency_share": Meaning(
        "images: high-frequency share", "neither", "The same of the images themselves, to compare with."
    ),
    "latent_power_slope": Meaning(
        "latents: slope of the spectrum",
        "neither",
        "Log power over log frequency: 0 is white noise; the steeper it falls, the smoother the latent maps.",
    ),
    "rgb_power_slope": Meaning(
        "images: slope of the spectrum", "neither", "The same of the images; photos have -2 to -3."
    ),
    "noise_psnr": Meaning(
        "PSNR under noise (dB)",
        "higher",
        "PSNR of D(z + sigma eps), sigma in standard deviations: how wrong a generator's latents may be.",
    ),
}


@dataclass(frozen=True)
class Line:
    """One number of a result, as text."""

    meaning: Meaning
    detail: str
    """Which scale, transform or sigma; empty where there is but one."""
    value: str
    spread: str
    """± deviation over draws, or the interval over images; may be empty."""
    floor: str
    """What Gaussian noise gives; may be empty."""


def lines(result: dict[str, Any], stems: Iterable[str] = MEANINGS) -> list[Line]:
    """The numbers of a `metrics.json` called `stem` or `stem/detail`, in the order of `stems`."""
    found = []
    for stem in stems:
        for key, value in result.items():
            name, slash, detail = key.partition("/")
            if name != stem:
                continue
            low, high = (result.get(f"{stem}_{end}{slash}{detail}") for end in ("low", "high"))
            std = result.get(f"{stem}_std")
            spread = f"± {digits(std)}" if std is not None else ""
            spread = f"{digits(low)} to {digits(high)}" if low is not None and high is not None else spread
            floor = result.get(f"floor_{stem}")
            floor_text = digits(floor) if floor is not None else ""
            found.append(Line(MEANINGS[stem], detail.replace("_", " "), digits(value), spread, floor_text))
    return found


def digits(value: float) -> str:
    """Four significant digits; whole numbers as they are."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def screen_table(result: dict[str, Any]) -> str:
    """A result as a table for the terminal."""
    rows = [("", "value", "± or 95% interval", "Gaussian floor", "better")]
    rows += [
        (f"{line.meaning.label} {line.detail}".strip(), line.value, line.spread, line.floor, line.meaning.better)
        for line in lines(result)
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    )
