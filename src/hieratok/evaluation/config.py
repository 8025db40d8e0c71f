"""Options of `hieratok evaluate`, a dataclass a protocol. Imports no torch."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class EvaluationOptions:
    """What the commands have in common."""

    features: str = "inception"
    """Feature network of the distances: inception, vgg16, squeezenet, dinov2-small, dinov2-base,
    dinov2-large, package.module:function of your own, or none for no distances."""
    weights: str | None = None
    """The network's weights; by default the published file in torch's cache. Nothing is downloaded."""
    size: int | None = None
    """Cut every image to this side, in pixels, as ADM does. Default: images stay as they are and must have one size."""
    batch_size: int = 32
    """Images at a time. It changes the speed, not the result."""
    device: str | None = None
    """Where to run the networks, such as cuda:0 or cpu. Default: the GPU if there is one."""
    json: bool = False
    """Print the result as JSON instead of a table."""


@dataclass(kw_only=True)
class PairedOptions(EvaluationOptions):
    """What commands on pairs of images have in common."""

    lpips: list[str] = field(default_factory=lambda: ["alex", "vgg"])
    """Trunks of LPIPS: alex, vgg, squeeze, each optionally =FILE with its weights; squeeze-caffe=FILE gives a distance
    that is not LPIPS and is not called so. '[]' for none."""


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
    """Evaluate every scale, each against the original resized to it by area, and not only the finest."""
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
    """What the reconstructions' names have more, such as --suffix=-128px for those of `hieratok reconstruct`; other
    files there are left out, and folders in names count as dashes."""
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
    """Real images, in any of those forms, or an .npz of statistics: of `hieratok evaluate stats`, or ADM's."""
    out: str | None = None
    """Folder for metrics.json and index.html. Default: nothing is written."""


@dataclass(kw_only=True)
class EvaluateStats(EvaluationOptions):
    """Write the statistics of a set of images, to be used as a reference again and again.

    Example: hieratok evaluate stats imagenet/val --size 256 --out val256.npz
    """

    path: str
    """Images: a folder, a pattern, WebDataset shards, or an .npz with uint8 arr_0 (N, H, W, 3)."""
    out: str
    """The .npz to write."""


@dataclass(kw_only=True)
class EvaluateCompare:
    """Set two results beside each other, if their manifests agree.

    Example: hieratok evaluate compare single/metrics.json multi/metrics.json
    """

    a: str
    """A metrics.json."""
    b: str
    """Another."""
    json: bool = False
    """Print the result as JSON instead of a table."""
