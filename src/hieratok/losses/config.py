"""Weights and settings of the losses. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from hieratok.core.plugins import DISCRIMINATORS, LOSSES

TrunkName = Literal["vgg", "alex", "squeeze", "squeeze-caffe"]
PixelReduction = Literal["scales", "tokens"]
PerceptualReduction = Literal["mean", "sum", "finest"]
DiscriminatorName = Literal["patchgan", "residual", "dino"]
GanLoss = Literal["hinge", "non-saturating"]


@dataclass(frozen=True)
class LossConfig:
    """Weights of stage 1's losses (paper, table 9), and how they are reduced over scales.

    The text of eqs. 8 and 9 does not give the reduction; ours was chosen by measurement (docs/results.md). [ours]

    Raises:
        ValueError: a negative weight, or no such reduction.
    """

    l1_weight: float = 1.0
    """l_1: mean absolute error."""
    mse_weight: float = 0.4
    """l_2: mean squared error."""
    perceptual_weight: float = 1.0
    """l_p: perceptual distance; 0: none, and no network is loaded."""
    kl_weight: float = 1e-6
    """l_kl: KL divergence, summed over latent dimensions, averaged over the batch."""
    pixel_reduction: PixelReduction = "scales"
    """Reduction of L1 and MSE: the mean of the scales' means (scales), or over the pixels of all scales (tokens)."""
    perceptual_reduction: PerceptualReduction = "finest"
    """Reduction of the perceptual distance: mean or sum over scales, or the finest scale alone (finest)."""
    scale_weights: tuple[float, ...] | None = None
    """Weight of each scale in the reductions above, coarse to fine. None: equal weights."""
    trunk: TrunkName = "vgg"
    """The network of the perceptual distance: vgg, alex, squeeze (LPIPS), or squeeze-caffe (LPIPS-like)."""
    trunk_weights: str | None = None
    """File with the trunk's weights. None: torchvision's cache."""
    head_weights: str | None = None
    """File with LPIPS's linear heads. None: those of the installed lpips package."""
    random_trunk: bool = False
    """Use an untrained trunk; for tests only."""
    plugins: tuple[str, ...] = ()
    """Losses of plugins, each NAME=WEIGHT."""

    def __post_init__(self):
        if self.scale_weights is not None:
            object.__setattr__(self, "scale_weights", tuple(self.scale_weights))
            if any(w < 0 for w in self.scale_weights) or not sum(self.scale_weights):
                raise ValueError(f"loss.scale_weights must be non-negative, not all 0: {list(self.scale_weights)}")
        for name, choices in (
            ("pixel_reduction", get_args(PixelReduction)),
            ("perceptual_reduction", get_args(PerceptualReduction)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"loss.{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("l1_weight", "mse_weight", "perceptual_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} must not be negative, it is {getattr(self, name)}")
        object.__setattr__(self, "plugins", tuple(self.plugins))
        for name in self.plugin_weights():
            LOSSES.check(name)

    def plugin_weights(self) -> dict[str, float]:
        """Weights of the plugins' losses, by name.

        Raises:
            ValueError: an entry is not NAME=WEIGHT, or a name is given twice.
        """
        weights: dict[str, float] = {}
        for entry in self.plugins:
            name, _, text = entry.partition("=")
            try:
                weight = float(text)
            except ValueError:
                weight = math.nan
            if not (0 <= weight < math.inf) or name in weights:
                raise ValueError(f"loss.plugins has one NAME=WEIGHT for each loss, such as edges=0.5, not {entry!r}")
            weights[name] = weight
        return weights


@dataclass(frozen=True)
class AdversarialConfig:
    """The GAN loss on the finest scale, its discriminator and the discriminator's optimiser (AdamW, cosine).

    Raises:
        ValueError: settings out of range.
    """

    weight: float = 0.6
    """l_adv (paper, table 9), multiplied by the adaptive weight if that is on; 0: no GAN."""
    discriminator: DiscriminatorName | str = "patchgan"
    """patchgan: convolutions on patches; residual: StyleGAN2's, on the image; dino: StyleGAN-T's, heads on frozen DINO
    features; or a plugin's. [ours]: the paper names none."""
    loss: GanLoss = "non-saturating"
    """GAN loss. non-saturating: StyleGAN's, which the paper names; hinge: StyleGAN-T's, usual with dino."""
    r1_weight: float = 0.0
    """gamma of the R1 gradient penalty on real images; StyleGAN uses 10; 0: none. [ours]: not in the paper."""
    r1_interval: int = 16
    """Steps between R1 penalties, whose weight is multiplied by this number, as in StyleGAN2; 1: every step."""
    adaptive: bool = False
    """VQGAN's adaptive weight: scale the GAN's gradient at the pixel head to the reconstruction's. Not in the paper."""
    diffaugment: bool = False
    """Augment the discriminator's inputs: colour, translation, cutout. [ours]; usual with dino."""
    lecam_weight: float = 0.0
    """Weight of the LeCam regulariser in the discriminator's loss; 1e-3 is usual, 0: none. [ours]"""
    generator_start: int = 5_000
    """Step from which the GAN loss trains the tokenizer; the discriminator trains from step 0. [ours]"""
    ramp_steps: int = 5_000
    """Steps after `generator_start` in which the weight rises linearly to its full value; 0: at once. [ours]"""
    discriminator_learning_rate: float = 1e-4
    """Learning rate of the discriminator after warm-up. [ours]: the paper's value is missing."""
    discriminator_min_learning_rate: float = 1e-6
    """Learning rate at the end of the cosine. [ours]: the paper's value is missing."""
    warmup_ratio: float = 0.01
    """Share of the steps in which the discriminator's learning rate rises linearly (paper, table 8)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas (paper, table 8)."""
    weight_decay: float = 0.05
    """AdamW's weight decay. [ours]: the paper's value is missing; this is the tokenizer's."""
    width: int = 64
    """Channels of the first layer of patchgan and residual; deeper ones have up to 8 times as many. [ours]"""
    num_layers: int = 3
    """Layers of patchgan with stride 2: a logit sees 16, 34, 70 or 142 px with 1, 2, 3 or 4 of them."""
    backbone: str = "vit_small_patch16_224.dino"
    """dino's frozen network, a ViT of timm's by name."""
    backbone_weights: str | None = None
    """File with the backbone's weights. None: from the hub's or torch's cache; nothing is downloaded."""
    random_backbone: bool = False
    """Use an untrained backbone; for tests only."""

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        DISCRIMINATORS.check(self.discriminator)
        if self.loss not in get_args(GanLoss):
            raise ValueError(f"gan.loss must be one of {', '.join(get_args(GanLoss))}, not {self.loss!r}")
        for name in (
            "weight",
            "lecam_weight",
            "r1_weight",
            "generator_start",
            "ramp_steps",
            "discriminator_min_learning_rate",
            "weight_decay",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"gan.{name} must not be negative, it is {getattr(self, name)}")
        for name in ("width", "num_layers", "r1_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"gan.{name} must be at least 1, not {getattr(self, name)}")
        if not self.discriminator_learning_rate > 0:
            raise ValueError(
                f"gan.discriminator_learning_rate must be positive, not {self.discriminator_learning_rate}"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"gan.warmup_ratio must be in [0, 1), not {self.warmup_ratio}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"gan.betas must be two numbers in [0, 1), not {list(self.betas)}")


@dataclass(frozen=True)
class VFConfig:
    """The vision-foundation loss (vf-loss). The paper gives neither weight nor margins: those of recipes are [ours].

    Raises:
        ValueError: settings out of range.
    """

    weight: float = 0.0
    """Weight, multiplied by the adaptive weight if that is on; 0: no vf-loss, and no foundation model is loaded."""
    model: str = "vit_large_patch14_dinov2.lvd142m"
    """A ViT of timm's by name. The default, DINOv2 large, is the one VA-VAE published its results with."""
    model_weights: str | None = None
    """File with the model's weights. None: from the hub's or torch's cache; nothing is downloaded."""
    cos_margin: float = 0.0
    """m_cos: margin of the cosine distance to the model's feature."""
    distance_margin: float = 0.0
    """m_dist: margin of the difference between two positions' cosine and the model's."""
    adaptive: bool = True
    """Scale the loss's gradient at the encoder's last layer to that of the reconstruction."""
    normalize: bool = True
    """Normalise images as in the model's training. False: images in [-1, 1], as in VA-VAE's code."""
    random_model: bool = False
    """Use an untrained model; for tests only."""

    def __post_init__(self):
        if not self.weight >= 0:
            raise ValueError(f"vf.weight must not be negative, it is {self.weight}")
        for name in ("cos_margin", "distance_margin"):
            if not 0 <= getattr(self, name) < 2:
                raise ValueError(f"vf.{name} must be in [0, 2), not {getattr(self, name)}")
