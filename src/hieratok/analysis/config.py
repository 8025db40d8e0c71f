"""Options of `hieratok analyze`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class Analyze:
    """Measure a tokenizer's latent space: density, commutation, equivariance, spectra, channels, robustness to noise.

    Example: hieratok analyze runs/photos --data photos/val; hieratok analyze --latents latents.npy;
    hieratok analyze --embedding tsne.npy
    """

    run: str | None = None
    """Run or folder of a tokenizer, hub id, or folder of diffusers' AutoencoderKL or AutoencoderDC."""
    data: str | None = None
    """Images, best never trained on: a folder, a pattern, WebDataset shards, or `bundled:val`."""
    latents: str | None = None
    """Instead of a run: a .npy of latents, (N, d) or (N, d, h, w), for the density only."""
    embedding: str | None = None
    """Instead of a run: a .npy of points in the plane, (N, 2), for the density without t-SNE."""
    protocol: Literal["ours", "vavae"] = "ours"
    """ours: posterior mean, no mirror images, statistics of the training images if the tokenizer has them. vavae:
    posterior sample, image or mirror image, statistics of the analysed images."""
    num: int = 10_000
    """Largest number of images, and so of the density's points; chosen at random."""
    decoded: int = 256
    """Largest number of these images for metrics that need decoding, and for spectra."""
    draws: int = 10
    """Sets of points that the density is averaged over, each with a set of noise of the same size; 10,000 points take a
    minute or two per set. 0: no density."""
    size: int | None = None
    """Image size in pixels, to which images are cropped. Default: the tokenizer's own."""
    batch_size: int = 16
    """Batch size in images. It changes the speed, not the result."""
    seed: int = 0
    """Seed of the choice of images, positions and noise."""
    device: str | None = None
    """Where to run the tokenizer, such as cuda:0 or cpu. Default: the GPU if there is one."""
    out: str | None = None
    """Folder for metrics.json and index.html. Default: `analysis` in the run's folder, else nothing is written."""

    def __post_init__(self):
        if sum(x is not None for x in (self.run, self.latents, self.embedding)) != 1:
            raise ValueError("analyze takes one of RUN, --latents FILE.npy and --embedding FILE.npy")
        if self.run is not None and self.data is None:
            raise ValueError("which images? hieratok analyze RUN --data PATH")
        for name, least in (("num", 2), ("decoded", 2), ("draws", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
