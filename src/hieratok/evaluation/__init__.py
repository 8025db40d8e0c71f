"""Numbers to trust: pixel metrics, distances between sets of images, and the protocols that stamp them.

Nothing here knows a model: everything takes images, as tensors, iterators or files.
"""

from hieratok.evaluation.distribution import frechet_distance, inception_score, kernel_distance, precision_recall
from hieratok.evaluation.evaluate import (
    EvaluateCompare,
    EvaluateImages,
    EvaluateReconstruction,
    EvaluateSamples,
    EvaluateStats,
    compare,
    evaluate_images,
    evaluate_reconstruction,
    evaluate_samples,
    write_statistics,
)
from hieratok.evaluation.features import FeatureNetwork, load_network
from hieratok.evaluation.pixels import PixelMetrics, psnr, ssim
from hieratok.evaluation.processes import merge_processes, process_group
from hieratok.evaluation.reconstruction import ReconstructionMetrics
from hieratok.evaluation.statistics import FeatureSet, Moments, SetStatistics, Statistics

__all__ = [
    "EvaluateCompare",
    "EvaluateImages",
    "EvaluateReconstruction",
    "EvaluateSamples",
    "EvaluateStats",
    "FeatureNetwork",
    "FeatureSet",
    "Moments",
    "PixelMetrics",
    "ReconstructionMetrics",
    "SetStatistics",
    "Statistics",
    "compare",
    "evaluate_images",
    "evaluate_reconstruction",
    "evaluate_samples",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_network",
    "merge_processes",
    "precision_recall",
    "process_group",
    "psnr",
    "ssim",
    "write_statistics",
]
