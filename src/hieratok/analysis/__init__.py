"""The latent space of any tokenizer in numbers: density, symmetries, frequencies, channels, robustness.

Functions take tensors and callables (`Codec`), so any autoencoder can be analysed; `hieratok.analyze` runs them all on
a trained tokenizer and images, and `hieratok.glossary.ANALYSIS` says in plain words what each number is.
"""

from hieratok.analysis.channels import (
    channel_kl,
    channel_moments,
    correlation,
    effective_rank,
    participation_ratio,
    standardize,
)
from hieratok.analysis.codec import Codec, Latents, codec_of, encode_all
from hieratok.analysis.commutation import commutation, commutation_error, equivariance, pyramid_commutation, target_mse
from hieratok.analysis.density import (
    DensityMetrics,
    DensityReport,
    draw_points,
    embed,
    evenness,
    gaussian_points,
    kernel_density,
    measure_density,
)
from hieratok.analysis.intervals import summarize
from hieratok.analysis.robustness import noise_psnr
from hieratok.analysis.spectrum import block_dct, dct_profile, high_frequency_share, power_slope, radial_power

__all__ = [
    "Codec",
    "DensityMetrics",
    "DensityReport",
    "Latents",
    "block_dct",
    "channel_kl",
    "channel_moments",
    "codec_of",
    "commutation",
    "commutation_error",
    "correlation",
    "dct_profile",
    "draw_points",
    "effective_rank",
    "embed",
    "encode_all",
    "equivariance",
    "evenness",
    "gaussian_points",
    "high_frequency_share",
    "kernel_density",
    "measure_density",
    "noise_psnr",
    "participation_ratio",
    "power_slope",
    "pyramid_commutation",
    "radial_power",
    "standardize",
    "summarize",
    "target_mse",
]
