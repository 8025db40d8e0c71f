"""Options of `hieratok latents`. Imports no torch."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class WriteLatents:
    """Write the latents of images and of their mirror images, for training generators.

    Example: hieratok latents runs/photos --data PHOTOS --out latents/photos
    """

    run: str
    """Tokenizer: a run's folder, a tokenizer's folder, a hub id, or a folder of diffusers' AutoencoderKL or
    AutoencoderDC."""
    data: str
    """Images, as `hieratok train` takes them; each is cut to the tokenizer's size as ADM does."""
    out: str | None = None
    """Folder to write to; the same command again resumes."""
    stats_only: bool = False
    """Write no latents; measure each channel's mean and deviation over all images and store them in RUN."""
    size: int | None = None
    """Image size in pixels, for an autoencoder of diffusers. Default: the tokenizer's own."""
    batch_size: int = 32
    """Batch size in images, each with its mirror image."""
    device: str | None = None
    """Where to compute, such as cuda:0 or cpu. Default: the GPU if there is one."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.stats_only and self.out:
            raise ValueError("--stats-only writes into RUN alone: leave out --out")
        if not self.stats_only and not self.out:
            raise ValueError("say where to write with --out DIR, or --stats-only to store statistics in RUN")
