"""Feature networks by name, whose features' distributions are compared.

    network = load_network("squeezenet", "squeezenet1_1.pth")
    pool, spatial = network(images)        # uint8 (B, 3, H, W) -> float32 (B, D), and (B, S) for Inception only

A distance means nothing without its network, so each network has its weights' SHA-256 and a description of its
preprocessing, which go into every manifest. Only the Inception network of 2015 with its published weights gives numbers
called FID, sFID, IS and KID; other distances are named after their network (`fd-squeezenet`).

Nothing is downloaded: weights come from a file or from torch's cache.
"""

import contextlib
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import inception as tv

from hieratok.core.checkpoint import file_sha256, read_tensors, tensors_sha256
from hieratok.core.extras import needs_extras
from hieratok.core.files import check_regular, shown
from hieratok.evaluation.pixels import check_images

INCEPTION_SHA256 = "6726825d"  # start of the published file's SHA-256, which torch hub's convention puts in its name
INCEPTION_FILES = (
    f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth",
    f"pt_inception-2015-12-05-{INCEPTION_SHA256}.pth",
)
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILES[0]}"
SPATIAL_CHANNELS = 7  # of the layer behind sFID; 7 x 17 x 17 = 2023 dimensions, about as many as FID's 2048

CAFFE_MEAN_BGR = (104.0, 117.0, 123.0)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINOV2_OFFSET = 0.1  # `interpolate_offset` of the published models without registers


class Features(NamedTuple):
    """A network's features of a batch of images, float32."""

    pool: Tensor
    """(B, D): features for distances."""
    spatial: Tensor | None
    """(B, S): features that keep positions, for sFID; only Inception has them."""


class FeatureNetwork(nn.Module):
    """A frozen network with its preprocessing, the name of its distances and the hash of its weights.

    Args:
        name: used in the distances' names: `fd-<name>`.
        module: from prepared images to features (B, D), or to (pool, spatial).
        prepare: from uint8 images (B, 3, H, W) to what `module` takes.
        preprocessing: what `prepare` does, in words for the manifest.
        sha256: of the weights' file.
        class_weights: (classes, D) float, if softmax(pool @ class_weights.T) are class probabilities; for IS.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        preprocessing: str,
        sha256: str,
        class_weights: Tensor | None = None,
    ):
        super().__init__()
        self.name = name
        self.module = module.eval().requires_grad_(False)
        self.prepare = prepare
        self.preprocessing = preprocessing
        self.sha256 = sha256
        self.class_weights = class_weights
        self.is_fid = name == "inception" and sha256.startswith(INCEPTION_SHA256)
        """Whether the distances may be called FID, sFID, IS and KID."""

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Does nothing: a feature network stays in evaluation mode."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def key(self, metric: str) -> str:
        """The name in JSON of a metric ("fid", "sfid", "kid", "is") with this network."""
        other = {"fid": "fd", "sfid": "sfd", "kid": "kd", "is": "class-score"}
        return metric if self.is_fid else f"{other[metric]}-{self.name}"

    def description(self) -> dict[str, str]:
        """Facts that must be equal for two sets of features to be comparable."""
        return {"network": self.name, "weights sha256": self.sha256, "preprocessing": self.preprocessing}

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W) -> features in float32, without TF32 and autocast. ValueError for other images."""
        check_images(images)
        device = self.device
        with exact_float32(), torch.autocast(device.type, enabled=False):
            out = self.module(self.prepare(images.to(device)))
        pool, spatial = out if isinstance(out, tuple) else (out, None)
        if not isinstance(pool, Tensor) or pool.shape[:1] != images.shape[:1] or pool.ndim != 2:
            raise ValueError(f"feature network {self.name} must give a tensor (batch, dimensions)")
        return Features(pool.float(), spatial)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products in full precision: TF32 and bfloat16 are off, and the user's settings restored after."""
    backends = torch.backends
    settings = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value


# --- Inception, 2015, as TensorFlow ran it -------------------------------------------------------------------------
# torchvision's blocks have the same structure and parameter names, but other pooling: TensorFlow leaves padding out of
# averages, and the last block takes a maximum.

_average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class _InceptionA(tv.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))]


class _InceptionC(tv.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), single, double, self.branch_pool(_average(x))]


class _InceptionE(tv.InceptionE):
    def __init__(self, in_channels: int):
        super().__init__(in_channels)
        self.pool: nn.Module = _average

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        single = torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1)
        double = torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1)
        return [self.branch1x1(x), single, double, self.branch_pool(self.pool(x))]


class Inception(tv.Inception3):
    """The Inception network behind FID, with parameter names as in torch-fidelity's and pytorch-fid's weights."""

    def __init__(self) -> None:
        blocks = [tv.BasicConv2d, _InceptionA, tv.InceptionB, _InceptionC, tv.InceptionD, _InceptionE, tv.InceptionAux]
        super().__init__(num_classes=1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7c.pool = nn.MaxPool2d(3, stride=1, padding=1)

    def fold_batch_norms(self) -> None:
        """Fold each batch norm into the convolution before it: the same function, fewer passes over memory."""
        for block in self.modules():
            if isinstance(block, tv.BasicConv2d):
                block.conv = nn.utils.fusion.fuse_conv_bn_eval(block.conv, block.bn)
                block.bn = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, 3, 299, 299) in [-1, 1) -> pool_3 (B, 2048), and mixed_6/conv (B, 2023), flattened as TensorFlow does."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        assert isinstance(self.Mixed_6d, _InceptionC)
        branches = self.Mixed_6d._forward(x)
        spatial = branches[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        x = self.Mixed_6e(torch.cat(branches, 1))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean((2, 3)), spatial


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """Bilinear resize as in TensorFlow 1: output pixel i samples at i * (input side / side), without half-pixel
    centres and without antialiasing. (B, 3, H, W) -> float32 (B, 3, side, side)."""
    images = images.float()
    for dim in (3, 2):
        size = images.shape[dim]
        position = torch.arange(side, device=images.device, dtype=torch.float32) * (size / side)
        low = position.long()
        shape = [1, 1, 1, 1]
        shape[dim] = side
        weight = (position - low).view(shape)
        left, right = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=size - 1))
        images = left + (right - left) * weight
    return images


def _load_inception(path: Path) -> FeatureNetwork:
    sha256 = file_sha256(path)
    module = Inception()
    _load_state(module, read_tensors(path), path)
    class_weights = module.fc.weight.detach().clone()
    module.eval().fold_batch_norms()
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    name = "inception" if sha256.startswith(INCEPTION_SHA256) else f"inception-{sha256[:8]}"
    return FeatureNetwork(
        name,
        module,
        lambda x: (resize_tf1(x, 299) - 128).div_(128).contiguous(memory_format=torch.channels_last),
        "TF1 bilinear to 299 px without antialias, (x - 128) / 128",
        sha256,
        class_weights,
    )


# --- Classifiers and DINOv2 ----------------------------------------------------------------------------------------


def _resize(x: Tensor, side: int) -> Tensor:
    x = x.float()
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)


def _imagenet(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (_resize(x, 224) / 255 - mean) / std


_IMAGENET_WORDS = "antialiased bilinear to 224 px, ImageNet mean and standard deviation"


def _load_vgg16(path: Path) -> FeatureNetwork:
    from torchvision.models import vgg16

    with torch.device("meta"):  # drawing 138M random numbers would take seconds
        network = vgg16(weights=None)
    _load_state(network, read_tensors(path), path)
    network.classifier = network.classifier[:5]  # up to the ReLU after the second hidden layer: 4096-d
    return FeatureNetwork("vgg16", network, _imagenet, _IMAGENET_WORDS, file_sha256(path))


def _load_squeezenet(path: Path) -> FeatureNetwork:
    """SqueezeNet 1.1: torchvision's or (.npz) its authors' from Caffe, whose input differs."""
    from torchvision.models import squeezenet1_1

    network = squeezenet1_1(weights=None)
    _load_state(network, read_tensors(path), path)
    module = nn.Sequential(network.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # 512-d
    if path.suffix != ".npz":
        return FeatureNetwork("squeezenet", module, _imagenet, _IMAGENET_WORDS, file_sha256(path))

    def prepare(x: Tensor) -> Tensor:
        return _resize(x, 224).flip(1) - torch.tensor(CAFFE_MEAN_BGR, device=x.device).view(3, 1, 1)

    words = "antialiased bilinear to 224 px, BGR, 0-255 minus (104, 117, 123)"
    return FeatureNetwork("squeezenet", module, prepare, words, file_sha256(path))


def _load_dinov2(size: str, path: Path) -> FeatureNetwork:
    """DINOv2's class token, 384-, 768- or 1024-d, from the published weights in timm's or Meta's layout.

    At 224 px, as the authors of FD-DINOv2 compute it (Stein et al. 2023, arXiv 2306.04675; their code is dgm-eval).
    """
    with needs_extras():
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

    network: Any = timm.create_model(f"vit_{size}_patch14_dinov2", pretrained=False, img_size=518, num_classes=0)
    try:
        tensors = checkpoint_filter_fn(read_tensors(path), network)  # type: ignore[arg-type]
    except Exception as error:  # timm expects tensors of certain sizes
        raise ValueError(f"{path} does not hold the weights of DINOv2 {size}: {error}") from error
    _load_state(network, tensors, path)
    _shrink_positions(network, 224)
    words = (
        "as dgm-eval: Pillow's bicubic to 224 px in 8 bits, ImageNet mean and standard deviation; learned positions"
        f" resampled by (16 + {DINOV2_OFFSET}) / 37, bicubic without antialias"
    )
    return FeatureNetwork(f"dinov2-{size}", network, _imagenet_by_pillow, words, file_sha256(path))


def _imagenet_by_pillow(images: Tensor) -> Tensor:
    """Pillow's resize in 8 bits, then as `_imagenet`."""
    pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    resized = [np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)) for picture in pictures]
    return _imagenet(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device))


def _shrink_positions(network: Any, side: int) -> None:
    """Resample the positions of timm's ViT, trained at a larger size, for images of `side` px, as DINOv2's own code.

    That code adds an offset to the number of tokens per side and passes the ratio to the interpolation, which then
    samples at steps of old / (new + offset). timm's own resampling has no offset and is antialiased: features differ by
    2%.
    """
    old, prefix = network.patch_embed.grid_size[0], network.num_prefix_tokens
    new = side // network.patch_embed.patch_size[0]
    positions = network.pos_embed.detach()  # (1, prefix + old^2, C)
    grid = positions[:, prefix:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(new + DINOV2_OFFSET) / old, mode="bicubic")  # (1, C, new, new)
    network.set_input_size(img_size=side)
    network.pos_embed = nn.Parameter(torch.cat((positions[:, :prefix], grid.flatten(2).mT), dim=1))


# --- By name -------------------------------------------------------------------------------------------------------

_LOADERS: dict[str, tuple[Callable[[Path], FeatureNetwork], tuple[str, ...]]] = {
    # name: (loader, names of the file in torch's cache)
    "inception": (_load_inception, INCEPTION_FILES),
    "vgg16": (_load_vgg16, ("vgg16-397923af.pth",)),
    "squeezenet": (_load_squeezenet, ("squeezenet1_1-b8a52dc0.pth",)),
    "dinov2-small": (partial(_load_dinov2, "small"), ("dinov2_vits14_pretrain.pth",)),
    "dinov2-base": (partial(_load_dinov2, "base"), ("dinov2_vitb14_pretrain.pth",)),
    "dinov2-large": (partial(_load_dinov2, "large"), ("dinov2_vitl14_pretrain.pth",)),
}
NETWORK_NAMES = tuple(_LOADERS)


def load_network(
    name: str = "inception", weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """A feature network by name.

    Args:
        name: one of `NETWORK_NAMES`, or `package.module:function` of your own: the function gets `weights` (a Path or
            None) and returns a `FeatureNetwork`, or an nn.Module from uint8 images (B, 3, H, W) to features (B, D); its
            annotation must say so. It is code, so never take such a name from a file (`hieratok.settings` does not).
        weights: the weights' file, .pth (tensors only), .safetensors or .npz. Default: the published file in torch's
            cache, `torch.hub.get_dir()/checkpoints`. Never downloaded.
        device: where to run it.

    Raises:
        ValueError: unknown name, or a file that is damaged or of another network.
        FileNotFoundError: no weights.
    """
    if ":" in name:
        return _load_own(name, None if weights is None else Path(weights)).to(device)
    if name not in _LOADERS:
        near = difflib.get_close_matches(name, NETWORK_NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no feature network is called {name!r}: {hint}there are {', '.join(NETWORK_NAMES)}")
    loader, files = _LOADERS[name]
    path = _cached(name, files) if weights is None else Path(weights)
    if not path.exists():
        raise FileNotFoundError(f"{shown(path)}, the weights of {name}, does not exist")
    check_regular(path)
    check_hash_in_name(path)
    return loader(path).to(device)


def _cached(name: str, files: tuple[str, ...]) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for file in files:
        if (folder / file).is_file():
            return folder / file
    where = f" (from {INCEPTION_URL})" if name == "inception" else ""
    wanted = f", or put {files[0]}{where} into {folder}" if files else ""
    raise FileNotFoundError(f"no weights for the feature network {name}: give the file with --weights FILE{wanted}")


def _load_own(name: str, weights: Path | None) -> FeatureNetwork:
    module_name, _, function_name = name.partition(":")
    try:
        build = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"feature network {name!r} cannot be imported as package.module:function: {error}") from error
    if not _gives_network(build):
        raise ValueError(
            f"feature network {name!r} cannot be used: it must be a function whose annotation says that it returns an"
            " nn.Module, such as `def load(weights: Path | None) -> nn.Module`"
        )
    network = build(weights)
    if isinstance(network, FeatureNetwork):
        return network
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} must return an nn.Module, not {type(network).__name__}")
    sha256 = file_sha256(weights) if weights else tensors_sha256(network)
    return FeatureNetwork(function_name, network, lambda images: images, f"by {name}", sha256)


def _gives_network(build: Any) -> bool:
    """Whether an object is a network's class, or a function annotated to return a network: nothing else is called."""
    try:
        result = build if inspect.isclass(build) else get_type_hints(build).get("return")
    except Exception:  # not callable, or with annotations that cannot be read
        return False
    return inspect.isclass(result) and issubclass(result, nn.Module)


def check_hash_in_name(path: Path) -> None:
    """ValueError if a file's SHA-256 does not begin as in its name, `name-<8 digits>.pth` by torch hub's convention."""
    found = re.fullmatch(r".*-([0-9a-f]{8})", path.stem)
    if found and not (actual := file_sha256(path)).startswith(found[1]):
        raise ValueError(f"{path} is damaged or renamed: its SHA-256 begins with {actual[:8]}, not {found[1]}")


def _load_state(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load every parameter, or raise a ValueError that names the first that does not fit."""
    wanted = {k: v.shape for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    for key in sorted(wanted.keys() | given.keys()):
        if wanted.get(key) != given.get(key):
            have, need = (tuple(shapes[key]) if key in shapes else "nothing" for shapes in (given, wanted))
            raise ValueError(f"{shown(path)} does not fit this network: {shown(key)} is {have}, should be {need}")
        if key in given and not tensors[key].is_floating_point():
            raise ValueError(f"{shown(path)}: {shown(key)} must hold floating-point numbers, not {tensors[key].dtype}")
    module.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False, assign=True)
