"""The GAN loss, L_adv of eq. 3: discriminators by name, losses and regularisers.

The paper gives its weight, optimiser and warm-up (tables 8 and 9) and describes it as "like the discriminator loss in
StyleGAN" (section 3.1), so the non-saturating loss is the default here. The discriminator, sizes and schedules are
[ours] or from the papers cited. No discriminator has batch statistics: a logit depends on its own image alone, so the
number of processes and micro-batches does not change a run.
"""

import itertools
import math
from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from hieratok.core.distributed import process, total
from hieratok.core.layers import LayerNorm2d, init_weights
from hieratok.core.plugins import DISCRIMINATORS
from hieratok.losses.config import AdversarialConfig, GanLoss
from hieratok.tokenizer.foundation import FoundationModel

LEAK = 0.2  # slope of every LeakyReLU below zero, as in pix2pix, StyleGAN2 and StyleGAN-T
DIFFAUGMENT_CUTOUT = 0.5  # of the side, in DiffAugment's paper and code
STYLEGAN_T_CUTOUT = 0.2  # of the side, in StyleGAN-T's code


def make_discriminator(config: AdversarialConfig, image_size: int) -> nn.Module:
    """The discriminator that a config names.

    Args:
        config: `discriminator` and its sizes; with `diffaugment`, the module augments in training mode.
        image_size: side of the training images in pixels.

    Returns:
        A module from images (B, 3, H, W) in [-1, 1] to logits, high for real: (B, 1, h, w) one per patch (patchgan),
        (B, 1) (residual) or (B, 5, N), one per token and depth (dino).

    Raises:
        ValueError: images too small for it, or no such backbone.
        FileNotFoundError: no weights for the backbone.
    """
    cutout_share = DIFFAUGMENT_CUTOUT
    network: nn.Module
    match config.discriminator:
        case "patchgan":
            network = PatchGAN(image_size, config.width, config.num_layers)
        case "residual":
            network = ResidualDiscriminator(image_size, config.width)
        case "dino":
            network = DinoDiscriminator(config.backbone, config.backbone_weights, config.random_backbone)
            cutout_share = STYLEGAN_T_CUTOUT
        case name:
            network = DISCRIMINATORS[name](config, image_size)
    return nn.Sequential(DiffAugment(cutout_share), network) if config.diffaugment else network


# --- discriminators ---------------------------------------------------------------------------------------------------


class PatchGAN(nn.Module):
    """Classifies overlapping patches, of 70 px with 3 layers (pix2pix, arXiv 1611.07004).

    Norms are over the channels of one position [ours]. Batch norm, the usual choice, would make a logit depend on other
    images, and norms over positions would make it depend on more than its patch.

    Raises:
        ValueError: images smaller than 4 x 2^num_layers px, 32 with 3 layers.
    """

    def __init__(self, image_size: int, width: int = 64, num_layers: int = 3):
        super().__init__()
        self.min_side = 4 * 2**num_layers
        if image_size < self.min_side:
            raise ValueError(
                f"patchgan with gan.num_layers {num_layers} needs images of {self.min_side} px or more,"
                f" not {image_size}"
            )
        widths = [min(2**i, 8) * width for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(LEAK)]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if i + 1 < num_layers else 1
            layers += [
                nn.Conv2d(before, after, kernel_size=4, stride=stride, padding=1, bias=False),
                LayerNorm2d(after),
                nn.LeakyReLU(LEAK),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, kernel_size=4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(lambda module: init_weights(module, std=0.02))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> logits (B, 1, H / 2^layers - 2, W / 2^layers - 2)."""
        check_images(images, self.min_side)
        return self.layers(images)


class ResidualDiscriminator(nn.Module):
    """Classifies the whole image: StyleGAN2's residual discriminator (arXiv 1912.04958), down to 4 x 4.

    Two parts of the original are left out [ours]. Equalised learning rates scale every layer's step, which fits its
    learning rate of 2e-3 and not ours: plain He initialisation instead. The channel with the batch's standard deviation
    prevents mode collapse, which a tokenizer does not have, as it is given the image to reconstruct.

    Raises:
        ValueError: images smaller than 8 px.
    """

    def __init__(self, image_size: int, width: int = 64):
        super().__init__()
        if image_size < 8:
            raise ValueError(f"the residual discriminator needs images of 8 px or more, not {image_size}")
        num_blocks = int(math.log2(image_size / 4))
        self.min_side = 4 * 2**num_blocks
        widths = [min(2**i, 8) * width for i in range(num_blocks + 1)]
        self.embed = nn.Conv2d(3, width, kernel_size=1)
        self.blocks = nn.Sequential(*(ResidualBlock(*pair) for pair in itertools.pairwise(widths)))
        self.mix = nn.Conv2d(widths[-1], widths[-1], kernel_size=3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(4)  # changes nothing if the side is a power of two
        self.hidden = nn.Linear(16 * widths[-1], widths[-1])
        self.head = nn.Linear(widths[-1], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, a=LEAK)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> logits (B, 1)."""
        check_images(images, self.min_side)
        x = F.leaky_relu(self.embed(images), LEAK)
        x = self.blocks(x)  # (B, C, 4, 4), or up to 7 x 7
        x = self.pool(F.leaky_relu(self.mix(x), LEAK)).flatten(1)  # (B, 16 C)
        return self.head(F.leaky_relu(self.hidden(x), LEAK))


class ResidualBlock(nn.Module):
    """Two convolutions, the second at half the resolution, and a linear skip connection."""

    def __init__(self, width: int, width_after: int):
        super().__init__()
        self.keep = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.down = nn.Conv2d(width, width_after, kernel_size=3, stride=2)
        self.skip = nn.Conv2d(width, width_after, kernel_size=1, stride=2, bias=False)
        self.blur = Blur()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h / 2, w / 2), rounded down."""
        y = F.leaky_relu(self.keep(x), LEAK)
        y = F.leaky_relu(self.down(self.blur(y, 2)), LEAK)
        return (y + self.skip(self.blur(x, 1))) / math.sqrt(2)  # keeps the variance


class Blur(nn.Module):
    """A low-pass filter (1, 3, 3, 1) in both directions, used before a stride of 2 (arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def forward(self, x: Tensor, padding: int) -> Tensor:
        """(B, C, h, w) -> (B, C, h + 2 padding - 3, w + 2 padding - 3)."""
        C = x.shape[1]
        return F.conv2d(x, self.kernel.expand(C, 1, 4, 4), padding=padding, groups=C)


class DinoDiscriminator(nn.Module):
    """Classifies a frozen DINO's tokens at five depths: StyleGAN-T's discriminator without text (arXiv 2301.09515).

    As published: a head on the input of the first block and on the output of the last block of each quarter, without
    the final norm; the class token is added to every patch's token; images are resized by area, and if they are larger
    than the backbone's, half of the batches in training mode are cropped at random instead; a head's convolutions have
    circular padding.

    [ours] The original heads have batch norms over 8 images and all tokens, which make a logit depend on other images.
    Here norms are over the channels of one token, as in `PatchGAN`; norms over an image's tokens would remove the class
    token, which is the same for all of them.

    The backbone is not in `parameters()` or `state_dict()`.

    Raises:
        ValueError: no such backbone, one without a class token, or weights that do not fit.
        FileNotFoundError: no weights.
    """

    def __init__(self, backbone: str, backbone_weights: str | None = None, random_backbone: bool = False):
        super().__init__()
        self.backbone = FoundationModel("gan.backbone", backbone, backbone_weights, random_backbone)
        if not self.backbone.has_class_token:
            raise ValueError(f"gan.backbone {backbone!r} has no class token: choose one that has, such as DINO's")
        self.depths = [self.backbone.depth * i // 4 - 1 for i in range(5)]  # -1, 2, 5, 8, 11 of DINO-S's 12 blocks
        self.heads = nn.ModuleList(DinoHead(self.backbone.width) for _ in self.depths)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> logits (B, 5, N), a row per depth."""
        check_images(images, 1)
        side = self.backbone.image_size
        if self.training and min(images.shape[-2:]) > side and torch.rand(()) < 0.5:
            images = random_crop(images, side)
        images = F.interpolate(images, (side, side), mode="area")
        logits = []
        for head, tokens in zip(self.heads, self.backbone.tokens(images, self.depths), strict=True):
            patches = tokens[:, self.backbone.num_prefix_tokens :] + tokens[:, :1]  # (B, N, C)
            logits.append(head(patches.mT))
        return torch.stack(logits, dim=1)


def random_crop(images: Tensor, side: int) -> Tensor:
    """The same random square of all images, (B, C, H, W) -> (B, C, side, side); draws from torch's generator."""
    top, left = (int(torch.randint(length - side + 1, ())) for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


class DinoHead(nn.Module):
    """1-D convolutions along the sequence of tokens, every weight under spectral norm."""

    def __init__(self, width: int):
        super().__init__()
        self.embed = spectral_norm(nn.Conv1d(width, width, kernel_size=1))
        self.embed_norm = nn.LayerNorm(width)
        self.mix = spectral_norm(nn.Conv1d(width, width, kernel_size=9, padding=4, padding_mode="circular"))
        self.mix_norm = nn.LayerNorm(width)
        self.head = spectral_norm(nn.Conv1d(width, 1, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) -> (B, N)."""
        x = F.leaky_relu(self.embed_norm(self.embed(x).mT).mT, LEAK)
        x = (x + F.leaky_relu(self.mix_norm(self.mix(x).mT).mT, LEAK)) / math.sqrt(2)
        return self.head(x).squeeze(1)


class SpectralNorm(nn.Module):
    """W / sigma(W): gives a weight, as a matrix (out, rest), the largest singular value 1 (arXiv 1802.05957).

    sigma comes from a power iteration with one step whenever W has changed. `torch.nn.utils` makes a step in every
    forward pass, so its result depends on the number of micro-batches, and under autocast it runs in bf16.
    """

    u: Tensor
    seen: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))  # (out,)
        self.register_buffer("seen", torch.full_like(self.u[0], torch.nan))
        for _ in range(15):
            self.u.copy_(self.step(matrix))

    def forward(self, weight: Tensor) -> Tensor:
        """(out, ...) -> the same shape."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            if self.training:
                self.follow(matrix.detach())
            # cloned: the next forward pass may come before this one's backward pass
            sigma = torch.linalg.vector_norm(matrix.mT @ self.u.clone())
            return weight / sigma

    def follow(self, matrix: Tensor) -> None:
        """One step of power iteration if the weight has changed since the last call, recognised by its sum."""
        total = matrix.sum()
        self.u.copy_(torch.where(total == self.seen, self.u, self.step(matrix)))
        self.seen.copy_(total)

    def step(self, matrix: Tensor) -> Tensor:
        """u, nearer to the left singular vector of the largest singular value."""
        return F.normalize(matrix @ F.normalize(matrix.mT @ self.u, dim=0), dim=0)


def spectral_norm(layer: nn.Conv1d) -> nn.Conv1d:
    """The layer, with its weight under `SpectralNorm`."""
    parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return layer


def check_images(images: Tensor, min_side: int) -> None:
    """ValueError unless images are (B, 3, H, W) float with sides of at least `min_side`."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"a discriminator takes (B, 3, H, W) float in [-1, 1], not {tuple(images.shape)} {images.dtype}"
        )
    if min(images.shape[-2:]) < min_side:
        raise ValueError(f"this discriminator needs images of {min_side} px or more, not {tuple(images.shape[-2:])}")


# --- losses -----------------------------------------------------------------------------------------------------------


def discriminator_loss(kind: GanLoss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss: a scalar, at least float32.

    hinge: mean relu(1 - D(x)) + mean relu(1 + D(G)) (arXiv 1705.02894, without the factor 1/2 of some code);
    non-saturating: mean softplus(-D(x)) + mean softplus(D(G)) (arXiv 1406.2661).
    """
    real, fake = at_least_float32(real_logits), at_least_float32(fake_logits)
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "non-saturating":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    raise ValueError(f"no GAN loss is called {kind!r}: choose from {', '.join(get_args(GanLoss))}")


def generator_loss(kind: GanLoss, fake_logits: Tensor) -> Tensor:
    """L_adv, the generator's loss: a scalar, at least float32.

    hinge: -mean D(G); non-saturating: mean softplus(-D(G)).
    """
    fake = at_least_float32(fake_logits)
    if kind == "hinge":
        return -fake.mean()
    if kind == "non-saturating":
        return F.softplus(-fake).mean()
    raise ValueError(f"no GAN loss is called {kind!r}: choose from {', '.join(get_args(GanLoss))}")


def r1_penalty(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """R1 = mean over images of |grad_x D(x)|^2, the gradient penalty on real images (arXiv 1801.04406).

    The discriminator's loss gets gamma / 2 of it, times k if it is added at every k-th step only ("lazy
    regularisation", arXiv 1912.04958; gamma 10 and k 16 there). [ours] D(x) is the mean of an image's logits, so that
    gamma does not depend on their number.

    Computed in float32 under autocast too. Call it with the discriminator itself, not its DDP wrapper, and use the same
    backward pass as for the loss of the wrapper's output: DDP then averages the sum of their gradients.

    Args:
        discriminator: from images to logits (B, ...), each of its own image alone.
        images: real ones, (B, 3, H, W) in [-1, 1].

    Returns:
        A scalar with a graph to the discriminator's parameters.
    """
    with (
        torch.autocast(images.device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):  # the other kernels have no second derivative
        x = at_least_float32(images).detach().requires_grad_()
        logits = discriminator(x).flatten(1).mean(1)  # (B,)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)  # (B, 3, H, W)
        return gradient.square().flatten(1).sum(1).mean()


def at_least_float32(x: Tensor) -> Tensor:
    """Losses of bf16 logits would be rounded to 8 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LeCam(nn.Module):
    """LeCam regulariser (arXiv 2104.03310): keeps logits of real and fake images near each other's running means.

    mean relu(D(x) - m_fake)^2 + mean relu(m_real - D(G))^2, with m the moving averages of the mean logits. They start
    at the first step's means; before that the loss is 0. Saved and resumed with `state_dict()`.

    Args:
        decay: of the averages, per step.
    """

    real_mean: Tensor
    fake_mean: Tensor
    num_updates: Tensor

    def __init__(self, decay: float = 0.999):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"LeCam's decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The unweighted loss of a micro-batch, a scalar."""
        real, fake = at_least_float32(real_logits), at_least_float32(fake_logits)
        loss = F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()
        return loss * (self.num_updates > 0)

    @torch.no_grad()
    def update(self, real_mean: Tensor, fake_mean: Tensor, skip: Tensor | None = None) -> None:
        """Update the averages, once per step.

        Args:
            real_mean, fake_mean: mean logits over this process's micro-batches, scalars; averaged over processes here.
            skip: a scalar, 1 if the step was skipped (its logits may not be finite): the averages then stay.

        Raises:
            ValueError: no scalars.
        """
        if real_mean.ndim or fake_mean.ndim:
            raise ValueError("LeCam's update takes two scalars, the step's mean logits")
        means = torch.stack([real_mean, fake_mean]).to(self.real_mean)
        means = total(means) / process()[1]
        decay = torch.where(self.num_updates == 0, 0.0, self.decay)
        stay = torch.zeros_like(decay, dtype=torch.bool) if skip is None else skip.bool()
        for average, mean in zip((self.real_mean, self.fake_mean), means):
            average.copy_(torch.where(stay, average, decay * average + (1 - decay) * mean))
        self.num_updates += ~stay


def generator_weight(step: int, config: AdversarialConfig) -> float:
    """Weight of the generator's loss at a step, counted from 0: 0 before `generator_start`, then a linear ramp."""
    steps_in = step - config.generator_start + 1
    if steps_in <= 0:
        return 0.0
    return config.weight * min(1.0, steps_in / max(1, config.ramp_steps))


def adaptive_weight(
    reconstruction_loss: Tensor, other_loss: Tensor, last_layer: Tensor, max_weight: float = 1e4
) -> Tensor:
    """VQGAN's adaptive weight (arXiv 2012.09841): |grad reconstruction| / (|grad other| + 1e-4), at most `max_weight`.

    Norms and quotient are float32 under autocast too. Each process uses its own micro-batch's gradients.

    Args:
        reconstruction_loss: a scalar; its graph is kept.
        other_loss: a scalar: L_adv, or the vf-loss (with `vf.VF_MAX_WEIGHT`).
        last_layer: the parameter whose gradients are compared: the pixel head's weight for L_adv, the encoder's for the
            vf-loss.
        max_weight: 1e4 in VQGAN.

    Returns:
        A scalar without a graph.

    Raises:
        ValueError: no scalars, or a loss that does not depend on the parameter.
    """
    norms = []
    for name, loss in (("reconstruction_loss", reconstruction_loss), ("other_loss", other_loss)):
        if loss.ndim:
            raise ValueError(f"adaptive_weight: {name} must be a scalar, not of shape {tuple(loss.shape)}")
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(f"adaptive_weight: {name} does not depend on last_layer")
        norms.append(torch.linalg.vector_norm(gradient.float()))
    with torch.autocast(last_layer.device.type, enabled=False):
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=max_weight).detach()


# --- augmentation -----------------------------------------------------------------------------------------------------


class DiffAugment(nn.Module):
    """Colour, translation and cutout, new for each image and call (DiffAugment, arXiv 2006.10738).

    Differentiable. Draws from torch's global generator; in evaluation mode it returns the images as they are.

    Args:
        cutout_share: side of the cut-out rectangle, as a share of the image's.
    """

    def __init__(self, cutout_share: float = DIFFAUGMENT_CUTOUT):
        super().__init__()
        self.cutout_share = cutout_share

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the same shape; values may leave the range."""
        check_images(images, 1)
        if not self.training:
            return images
        return cutout(translate(jitter_colour(at_least_float32(images))), self.cutout_share)


def jitter_colour(images: Tensor) -> Tensor:
    """Brightness moved by up to 0.5, saturation scaled by 0 to 2, contrast by 0.5 to 1.5."""
    brightness, saturation, contrast = torch.rand(3, images.shape[0], 1, 1, 1, device=images.device).to(images.dtype)
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def translate(images: Tensor) -> Tensor:
    """Shifted by up to an eighth of the side in both directions; new pixels are 0, grey."""
    for dim in (2, 3):
        B, side = images.shape[0], images.shape[dim]
        reach = int(side / 8 + 0.5)
        padding = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
        shift = torch.randint(2 * reach + 1, (B, 1), device=images.device)
        index = torch.arange(side, device=images.device) + shift  # (B, side), indices into the padded side
        index = index.view(B, 1, side, 1) if dim == 2 else index.view(B, 1, 1, side)
        images = F.pad(images, padding).gather(dim, index.expand(images.shape))
    return images


def cutout(images: Tensor, share: float) -> Tensor:
    """A rectangle of `share` of the sides set to 0, around any point of the image."""
    B, _, H, W = images.shape
    inside = []
    for side in (H, W):
        hole = int(side * share + 0.5)
        centre = torch.randint(side + 1 - hole % 2, (B, 1), device=images.device)  # between pixels if `hole` is even
        position = torch.arange(side, device=images.device)
        start = centre - hole // 2
        inside.append((position >= start) & (position < start + hole))  # (B, side)
    rectangle = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)  # (B, H, W)
    return images * ~rectangle.unsqueeze(1)
