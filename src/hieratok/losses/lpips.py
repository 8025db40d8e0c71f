"""LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924) over a choice of trunks: L_perc of eq. 3, and a metric.

    d(x, y) = sum_l  mean_{h,w}  w_l . (phi_l(x) - phi_l(y))^2

phi_l(x): the features of layer l of a frozen ImageNet network, the trunk, scaled to unit length over channels at each
position; w_l: the published linear head of that layer. The paper names no trunk; VGG-16 is usual for training.
"""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import models

from hieratok.core.checkpoint import file_sha256, read_tensors
from hieratok.losses.config import TrunkName


@dataclass(frozen=True)
class Trunk:
    """A network whose features are compared: its layers, input and weights."""

    architecture: str
    """Name in `torchvision.models`."""
    layers: tuple[int, ...]
    """Indices into the network's `.features` of the layers whose output is compared."""
    channels: tuple[int, ...]
    """Channels of those layers."""
    min_side: int
    """Smallest side in pixels that leaves a position in the last of those layers."""
    heads: tuple[str, str]
    """The linear heads: file name inside the lpips wheel, start of its SHA-256."""
    weights: tuple[str, str] | None
    """torchvision's weights: file name, start of its SHA-256. None: not torchvision's, so the file must be given."""
    shift: tuple[float, float, float] = (-0.030, -0.088, -0.188)
    scale: tuple[float, float, float] = (0.458, 0.448, 0.450)
    """The input is (images - shift) / scale for RGB images in [-1, 1]; LPIPS's constants, rounded from ImageNet's."""
    bgr: bool = False
    """Whether channels are in the order blue, green, red."""


EPSILON = 1e-10
"""Added to a feature's length, as in LPIPS."""

SQUEEZE_LAYERS = (1, 4, 7, 9, 10, 11, 12)
SQUEEZE_CHANNELS = (64, 128, 256, 384, 384, 512, 512)
SQUEEZE_HEADS = ("squeeze.pth", "4a5350f2")

TRUNKS: dict[TrunkName, Trunk] = {
    "vgg": Trunk(
        "vgg16",
        layers=(3, 8, 15, 22, 29),
        channels=(64, 128, 256, 512, 512),
        min_side=16,
        heads=("vgg.pth", "a78928a0"),
        weights=("vgg16-397923af.pth", "397923af"),
    ),
    "alex": Trunk(
        "alexnet",
        layers=(1, 4, 7, 9, 11),
        channels=(64, 192, 384, 256, 256),
        min_side=31,
        heads=("alex.pth", "df73285e"),
        weights=("alexnet-owt-7be5be79.pth", "7be5be79"),
    ),
    "squeeze": Trunk(
        "squeezenet1_1",
        layers=SQUEEZE_LAYERS,
        channels=SQUEEZE_CHANNELS,
        min_side=17,
        heads=SQUEEZE_HEADS,
        weights=("squeezenet1_1-b8a52dc0.pth", "b8a52dc0"),
    ),
    # SqueezeNet 1.1 as its authors trained it in Caffe: the input is BGR in 0..255 minus (104, 117, 123).
    "squeeze-caffe": Trunk(
        "squeezenet1_1",
        layers=SQUEEZE_LAYERS,
        channels=SQUEEZE_CHANNELS,
        min_side=17,
        heads=SQUEEZE_HEADS,
        weights=None,
        shift=(123 / 127.5 - 1, 117 / 127.5 - 1, 104 / 127.5 - 1),
        scale=(1 / 127.5, 1 / 127.5, 1 / 127.5),
        bgr=True,
    ),
}


class PerceptualLoss(nn.Module):
    """A frozen perceptual distance between images: LPIPS v0.1 if trunk and heads are the published ones.

    It has no dropout (LPIPS drops features only while its heads are being trained), so `train()` changes nothing.

    Args:
        trunk: a name in `TRUNKS`.
        trunk_weights: the trunk's weights, .pth, .safetensors or .npz, named as torchvision names them. Default:
            torchvision's file in the cache `torch.hub.get_dir()/checkpoints`, checked by its hash; never downloaded.
        head_weights: the linear heads. Default: the file in the installed lpips package, checked by its hash.
        random_weights: a fixed random trunk and heads of ones instead, for tests: no file is read.

    Attributes:
        name: `lpips-<trunk>` for the published weights of trunk and heads, else `perceptual[<trunk>]`, and
            `perceptual[random-<trunk>]` for random weights, as only the published networks give LPIPS.
        sha256: of the files read, by "trunk" and "heads", for a result's manifest; empty for random weights.

    Raises:
        FileNotFoundError: a file of weights is missing.
        ValueError: unknown trunk, or a file that does not hold what the trunk needs.
    """

    network: nn.Sequential
    heads: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        trunk: TrunkName = "vgg",
        trunk_weights: str | Path | None = None,
        head_weights: str | Path | None = None,
        random_weights: bool = False,
    ):
        super().__init__()
        if trunk not in TRUNKS:
            raise ValueError(f"no trunk is called {trunk!r}: choose from {', '.join(TRUNKS)}")
        self.spec = TRUNKS[trunk]
        # On the meta device the classifier (120M parameters in VGG) costs nothing.
        with torch.device("meta"):
            network = getattr(models, self.spec.architecture)(weights=None).features[: self.spec.layers[-1] + 1]

        self.sha256: dict[str, str] = {}
        if random_weights:
            if trunk_weights is not None or head_weights is not None:
                raise ValueError("random_weights reads no file: leave out trunk_weights and head_weights")
            self.name = f"perceptual[random-{trunk}]"
            network = _random_trunk(network)
            heads = torch.ones(sum(self.spec.channels))
        else:
            trunk_file = _given_file(trunk_weights, "trunk_weights") or _torchvision_file(trunk)
            heads_file = _given_file(head_weights, "head_weights") or _lpips_file(self.spec)
            self.sha256 = {"trunk": file_sha256(trunk_file), "heads": file_sha256(heads_file)}
            trunk_published = self.spec.weights is not None and self.sha256["trunk"].startswith(self.spec.weights[1])
            heads_published = self.sha256["heads"].startswith(self.spec.heads[1])
            for file, given, published in (
                (trunk_file, trunk_weights, trunk_published),
                (heads_file, head_weights, heads_published),
            ):
                if given is None and not published:
                    raise ValueError(f"{file} is damaged: its SHA-256 is not the published one; fetch it again")
            self.name = f"lpips-{trunk}" if trunk_published and heads_published else f"perceptual[{trunk}]"
            network = _load_trunk(network, trunk_file, self.spec.architecture)
            heads = _load_heads(heads_file, self.spec.channels)

        # Measured on one CPU core: channels last takes 0.64 (squeeze) and 0.88 (vgg) of the time of channels first.
        self.network = network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.register_buffer("heads", heads)
        self.register_buffer("shift", torch.tensor(self.spec.shift).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(self.spec.scale).view(3, 1, 1))

    def features(self, images: Tensor) -> list[Tensor]:
        """Compared features before they are scaled to unit length, one (B, C_l, h_l, w_l) per layer.

        Images, (B, 3, H, W) float in [-1, 1], with a side below the trunk's `min_side` are first enlarged by the
        smallest sufficient whole factor, repeating pixels [ours]: so every trunk takes every scale of the pyramid.
        They are float32, or bfloat16 under autocast.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, H, W) float in [-1, 1], not {tuple(images.shape)} {images.dtype}")
        factor = math.ceil(self.spec.min_side / min(images.shape[-2:]))
        if factor > 1:
            images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        x = (images.float() - self.shift) / self.scale
        if self.spec.bgr:
            x = x.flip(1)
        x = x.contiguous(memory_format=torch.channels_last)

        features = []
        for index, layer in enumerate(self.network):
            x = layer(x)
            if index in self.spec.layers:
                features.append(x)
        return features

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distances, (B,), between images and targets, both (B, 3, H, W) in [-1, 1]; only images get a gradient."""
        if images.shape != targets.shape:
            raise ValueError(f"images {tuple(images.shape)} and targets {tuple(targets.shape)} must have one shape")
        with torch.no_grad():
            target_features = [_unit_length(x.float())[0] for x in self.features(targets)]
        heads = self.heads.split(self.spec.channels)
        layers = zip(self.features(images), target_features, heads, strict=True)
        return torch.stack([cast(Tensor, _LayerDistance.apply(x, y, head)) for x, y, head in layers]).sum(dim=0)


class _LayerDistance(torch.autograd.Function):
    """One layer's term of the distance, float32 (B,).

    Written by hand, as these are the largest maps of a training step: autograd's chain of single operations takes about
    twice as long as the trunk itself, this function about half of that (two CPU cores).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, head: Tensor) -> Tensor:
        """Features x (B, C, h, w), unit-length target features of the same shape, head (C,)."""
        unit, length = _unit_length(x.float())
        difference = unit.sub_(target)
        ctx.save_for_backward(x, length, difference, head)
        # The head is linear, so the mean over positions can come first. No matrix product: autocast would round it.
        return (difference.square().mean(dim=(2, 3)) * head).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """d/dx of (x / |x| - target)^2: the part of the outer gradient orthogonal to x, divided by |x|."""
        x, length, difference, head = ctx.saved_tensors
        positions = x.shape[2] * x.shape[3]
        outer = difference * (2 / positions * gradient[:, None] * head)[:, :, None, None]  # d/d(unit-length features)
        along = (outer * x).sum(dim=1, keepdim=True) / length.clamp_min(1e-30)  # 0 for dead features
        scaled = 1 / (length + EPSILON)
        result = outer.mul_(scaled).addcmul_(x.float(), along * scaled.square(), value=-1)
        return result.to(x.dtype), None, None


def _unit_length(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, C, h, w) of unit length over channels at each position, and their length (B, 1, h, w)."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * (1 / (length + EPSILON)), length


def _random_trunk(network: nn.Sequential) -> nn.Sequential:
    """He-initialised from a fixed seed; the caller's random state does not change."""
    generator = torch.Generator().manual_seed(0)
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(parameter)
    return network


def _given_file(path: str | Path | None, setting: str) -> Path | None:
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"{path}, given as loss.{setting}, does not exist or is not a file")
    return None if path is None else Path(path)


def _torchvision_file(trunk: TrunkName) -> Path:
    spec = TRUNKS[trunk]
    if spec.weights is None:
        raise FileNotFoundError(
            f"the weights of the trunk {trunk} are not torchvision's: give the file with --loss.trunk_weights FILE"
        )
    name = spec.weights[0]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}, the weights of the trunk {trunk}, is not in {path.parent}: put it there (online, "
            f"torchvision.models.{spec.architecture}(weights='DEFAULT') does) or name it with --loss.trunk_weights FILE"
        )
    return path


def _lpips_file(spec: Trunk) -> Path:
    """The heads inside the installed lpips package, which is not imported: that is slow."""
    name = spec.heads[0]
    package = importlib.util.find_spec("lpips")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "weights" / "v0.1" / name
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{name}, the linear heads of LPIPS v0.1, is missing: it comes with pip install 'hieratok[eval]', "
        "or name it with --loss.head_weights FILE"
    )


def _load_trunk(network: nn.Sequential, path: Path, architecture: str) -> nn.Sequential:
    """Fill a trunk on the meta device; the file must have every tensor, and nothing else except a classifier."""
    tensors = {
        name.removeprefix("features."): tensor
        for name, tensor in read_tensors(path).items()
        if not name.startswith("classifier.")
    }
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    faults = {
        "missing": [name for name in wanted if name not in tensors],
        "unknown": [name for name in tensors if name not in wanted],
        "of another shape": [name for name in wanted if name in tensors and tensors[name].shape != wanted[name]],
    }
    if any(faults.values()):
        words = [f"{fault}: {', '.join(names[:3])} ({len(names)} in all)" for fault, names in faults.items() if names]
        raise ValueError(f"{path} does not fit the features of {architecture}: {'; '.join(words)}")
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network


def _load_heads(path: Path, channels: tuple[int, ...]) -> Tensor:
    """The heads of all layers one after another, (sum of channels,); the file holds (1, C_l, 1, 1) convolutions."""
    tensors = read_tensors(path)
    wanted = {f"lin{layer}.model.1.weight": (1, width, 1, 1) for layer, width in enumerate(channels)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise ValueError(f"{path} does not hold LPIPS's heads for layers of {', '.join(map(str, channels))} channels")
    return torch.cat([tensors[name].float().flatten() for name in wanted])
