"""Real photos for training and evaluation; imports nothing else of this package."""

from hieratok.data.images import (
    BadImageError,
    BundledPhotos,
    ImageDataset,
    ImageFiles,
    Source,
    StepBatches,
    TarShards,
    center_crop,
    evaluation_batches,
    open_source,
    random_resized_crop,
    to_float,
    to_uint8,
    training_loader,
)
from hieratok.data.latents import LatentDataset, LatentStatistics

__all__ = [
    "BadImageError",
    "BundledPhotos",
    "ImageDataset",
    "ImageFiles",
    "LatentDataset",
    "LatentStatistics",
    "Source",
    "StepBatches",
    "TarShards",
    "center_crop",
    "evaluation_batches",
    "open_source",
    "random_resized_crop",
    "to_float",
    "to_uint8",
    "training_loader",
]
