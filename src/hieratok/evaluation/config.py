"""Options of `hieratok evaluate`, one dataclass per protocol. Imports no torch."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class EvaluationOptions:
    """Options of all protocols."""

    features: str = "inception"
    """Feature network of the distances: inception, vgg16, squeezenet, dinov2-small, dinov2-base, dinov2-large, your own
    as package.module:function, or none for no distances."""
    weights: str | None = None
    """File with the network's weights. Default: the published file in torch's cache; nothing is downloaded."""
    size: int | None = None
    """Crop every image to this size in pixels, as ADM does. Default: no crop; images must have the same size."""
    batch_size: int = 32
    """Batch size in images. It changes the speed, not the result."""
    device: str | None = None
    """Where to run the networks, such as cuda:0 or cpu. Default: the GPU if there is one."""
    json: bool = False
    """Print the result as JSON instead of a table."""


@dataclass(kw_only=True)
class PairedOptions(EvaluationOptions):
    """Options of protocols on pairs of images."""

    lpips: list[str] = field(default_factory=lambda: ["alex", "vgg"])
    """Trunks of LPIPS: alex, vgg, squeeze, each optionally =FILE with its weights; squeeze-caffe=FILE gives a distance
    that is not LPIPS. '[]' for none."""


@dataclass(kw_only=True)
class EvaluateReconstruction(PairedOptions):
    """Evaluate a tokenizer's reconstructions of images: rFID, PSNR, SSIM, LPIPS.

    Example: hieratok evaluate reconstruction runs/photos --data val
    """

    run: str
    """Folder of the trained tokenizer."""
    data: str
    """Images to reconstruct: a folder, a pattern, or WebDataset shards."""
    scales: bool = False
    """Evaluate every scale, not only the finest, each against the original resized to it by area."""
    sample: bool = False
    """Decode a sample of the posterior instead of its mean."""
    out: str | None = None
    """Folder for metrics.json, reconstructions.png and index.html. Default: `evaluation` in the run's folder."""


@dataclass(kw_only=True)
class EvaluateImages(PairedOptions):
    """Compare two sets of images, paired by name: any tokenizer's output with its originals. FID, PSNR, SSIM, LPIPS.

    Example: hieratok evaluate images originals reconstructions --lpips '[vgg]'
    """

    a: str
    """Originals: a folder, a pattern, WebDataset shards, or an .npz with uint8 arr_0 (N, H, W, 3)."""
    b: str
    """Reconstructions, of the same names (.jpg and .png may differ)."""
    suffix: str | None = None
    """Suffix of the reconstructions' names, such as --suffix=-128px for `hieratok reconstruct`; files without it are
    left out, and folders in names count as dashes."""
    out: str | None = None
    """Folder for metrics.json, reconstructions.png and index.html. Default: nothing is written."""


@dataclass(kw_only=True)
class EvaluateSamples(EvaluationOptions):
    """Compare generated images with a reference: FID, sFID, IS, KID, precision, recall.

    Example: hieratok evaluate samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    """

    path: str
    """Generated images: a folder, a pattern, WebDataset shards, or an .npz with uint8 arr_0 (N, H, W, 3)."""
    reference: str
    """Real images, given likewise, or an .npz of statistics from `hieratok evaluate stats` or ADM."""
    out: str | None = None
    """Folder for metrics.json and index.html. Default: nothing is written."""


@dataclass(kw_only=True)
class EvaluateStats(EvaluationOptions):
    """Write the statistics of a set of images, for use as a reference.

    Example: hieratok evaluate stats imagenet/val --size 256 --out val256.npz
    """

    path: str
    """Images: a folder, a pattern, WebDataset shards, or an .npz with uint8 arr_0 (N, H, W, 3)."""
    out: str
    """The .npz to write."""


@dataclass(kw_only=True)
class EvaluateCompare:
    """Compare two results if their manifests agree.

    Example: hieratok evaluate compare single/metrics.json multi/metrics.json
    """

    a: str
    """A metrics.json."""
    b: str
    """Another."""
    json: bool = False
    """Print the result as JSON instead of a table."""
