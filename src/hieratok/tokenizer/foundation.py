"""Frozen vision foundation models of timm, for losses, and as encoders whose features are the latents."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hieratok.core.checkpoint import read_tensors
from hieratok.core.extras import needs_extras
from hieratok.core.messages import nearest


class FoundationModel(nn.Module):
    """A frozen ViT of timm's, from images to features on its patch grid; gradients flow through to the images.

    The network is not registered as a submodule: it is not in `parameters()` or `state_dict()`, and so in no optimiser,
    checkpoint or data-parallel wrapper. It follows `to()` and stays in evaluation mode.

    Args:
        setting: the setting with the name, for messages; that of the weights is `<setting>_weights`.
        name: in timm, such as "vit_small_patch16_224.dino".
        weights: .safetensors or .pth in timm's or the authors' layout. Default: the published ones in the hub's or
            torch's cache; never downloaded.
        random_weights: a fixed random network instead, for tests: no file is read.
        normalize: bring images to the mean and deviation the model was trained on; else they enter in [-1, 1].

    Attributes:
        depth, width, patch_size: blocks, channels, pixels per token side.
        num_prefix_tokens, has_class_token: how many tokens stand before the patches', and whether the first of them is
            a class token; the others are registers.
        image_size: side in pixels of the images the model was trained on.

    Raises:
        ValueError: no such ViT, or weights that do not fit.
        FileNotFoundError: no weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        setting: str,
        name: str,
        weights: str | Path | None = None,
        random_weights: bool = False,
        normalize: bool = True,
    ):
        super().__init__()
        if random_weights and weights is not None:
            raise ValueError(f"a random {setting} reads no file: leave out {setting}_weights")
        network = _load_vit(setting, name, weights, random_weights)
        self.depth = len(network.blocks)
        self.width = network.embed_dim
        self.patch_size = network.patch_embed.feat_ratio()
        self.num_prefix_tokens = network.num_prefix_tokens
        self.has_class_token = getattr(network, "cls_token", None) is not None
        pretraining = network.pretrained_cfg
        self.image_size = pretraining["input_size"][-1]
        mean, std = (pretraining["mean"], pretraining["std"]) if normalize else ((0.5,) * 3, (0.5,) * 3)
        # on images in [0, 1], so that a half and a half stand for [-1, 1]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self._unregistered = (network.eval().requires_grad_(False),)

    @property
    def network(self) -> nn.Module:
        """timm's own."""
        return self._unregistered[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FoundationModel":
        """Called by `to()`, `cuda()` and `double()`."""
        self._unregistered[0]._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor, size: tuple[int, int], blocks: Sequence[int], norm: bool = True) -> list[Tensor]:
        """Features after some of the blocks.

        Args:
            images: (B, 3, H, W) in [-1, 1], resized to `size` (bicubic, antialiased).
            size: in pixels, multiples of the patch size; positions are interpolated.
            blocks: which, counted from 0, ascending.
            norm: each under the network's final norm.

        Returns:
            A map (B, C, height / patch size, width / patch size) per block.

        Raises:
            ValueError: images of another shape.
        """
        network: Any = self._unregistered[0]
        images = self._prepare(images, size)
        return network.forward_intermediates(images, indices=list(blocks), norm=norm, intermediates_only=True)

    def tokens(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """All tokens after some of the blocks, as the blocks leave them, without the final norm.

        Args:
            images: (B, 3, H, W) in [-1, 1], resized to `image_size` (bicubic, antialiased) if they have another size.
            blocks: which, counted from 0; -1: the input of the first block, embedded patches with their positions.

        Returns:
            (B, num_prefix_tokens + N, C) per block; the patches' tokens row by row.

        Raises:
            ValueError: images of another shape.
        """
        network: Any = self._unregistered[0]
        found: dict[int, Tensor] = {}
        hooks = [network.blocks[0].register_forward_pre_hook(lambda _, inputs: found.update({-1: inputs[0]}))]
        for i, block in enumerate(network.blocks):
            hooks.append(block.register_forward_hook(lambda _, __, output, i=i: found.update({i: output})))
        try:
            network.forward_features(self._prepare(images, (self.image_size, self.image_size)))
        finally:
            for hook in hooks:
                hook.remove()
        return [found[i] for i in blocks]

    def _prepare(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Images in [-1, 1] -> the network's input, at `size`."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, H, W) float in [-1, 1], not {tuple(images.shape)} {images.dtype}")
        images = images.to(self.mean.dtype)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        return ((images + 1) / 2 - self.mean) / self.std


def _load_vit(setting: str, name: str, weights: str | Path | None, random_weights: bool) -> Any:
    """timm's ViT for any image size, with the weights of a file, or random ones from a fixed seed."""
    with needs_extras():
        import timm
        from timm.models import Eva, VisionTransformer

    if not timm.is_model(name):
        raise ValueError(f"{setting}: timm has no model {name!r}{nearest(name.partition('.')[0], timm.list_models())}")
    options: dict[str, Any] = {}
    if not random_weights:
        path = _cached_weights(setting, name) if weights is None else Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"{path}, given as {setting}_weights, does not exist or is not a file")
        # as tensors, not as timm's `file`, which some versions of timm would unpickle
        options = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": read_tensors(path)}}
    with torch.random.fork_rng(devices=[]):  # the caller's random state does not change
        torch.default_generator.manual_seed(0)
        try:
            network: Any = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError as error:  # it does not take `dynamic_img_size`
            raise ValueError(f"{setting} {name!r} is not a plain vision transformer") from error
        except (RuntimeError, KeyError, AssertionError) as error:
            words = " ".join(str(error).split())[:200]
            raise ValueError(f"{weights or name} cannot be used as {setting} {name!r}: {words}") from error
    network.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    if not isinstance(network, VisionTransformer | Eva):
        raise ValueError(f"{setting} {name!r} is not a plain vision transformer")
    return network


def _cached_weights(setting: str, name: str) -> Path:
    """The published weights, in the hub's cache or torch's."""
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    try:
        published = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"{setting}: {error}") from error
    advice = ""
    if published is not None and published.hf_hub_id:
        cached = try_to_load_from_cache(published.hf_hub_id, "model.safetensors")
        if isinstance(cached, str):
            return Path(cached)
        advice = f", or run `hf download {published.hf_hub_id} model.safetensors` where there is a network"
    if published is not None and isinstance(published.url, str) and published.url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / published.url.rpartition("/")[2]
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"the weights of {name} are not on this machine: give the file with --{setting}_weights FILE{advice}"
    )
