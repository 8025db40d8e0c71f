"""The generator's shape, how it is sampled, and the options of `hieratok sample`. Imports no torch."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from hieratok.core.precision import Precision

TimeSampling = Literal["uniform", "logit-normal"]
STEPS = 1000
SHIFT_BASE = 4096
"""Values of a latent whose times RAE does not shift: 4 channels of 32 x 32, Stable Diffusion's."""
Sampler = Literal["ddpm", "ddim", "euler", "heun", "sde"]
Objective = Literal["ddpm", "flow"]
SAMPLERS: dict[Objective, tuple[Sampler, ...]] = {"ddpm": ("ddpm", "ddim"), "flow": ("heun", "euler", "sde")}
"""Samplers by the generator's objective; the first is the default."""
NormName = Literal["layer", "rms"]
MlpName = Literal["gelu", "swiglu"]
Positions = Literal["sincos", "rotary"]
# Far beyond any real model: a file with more is wrong, and building the model would never end.
MOST = {
    "latent_channels": 65_536,
    "latent_size": 4_096,
    "patch_size": 4_096,
    "width": 65_536,
    "depth": 1_000,
    "heads": 65_536,
    "num_classes": 100_000_000,
}
# Parameters with 16 latent channels, patch 1, 16 x 16 latents and 1000 classes: 2M, 33M, 130M, 458M, 675M.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(width=128, depth=6, heads=4),  # a CPU [ours]
    "s": dict(width=384, depth=12, heads=6),  # one GPU
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
    "xl": dict(width=1152, depth=28, heads=16),
}


@dataclass(frozen=True)
class DiTConfig:
    """The generator's shape and objective. Defaults: the paper's DiT-XL on f16d16 at 256 px.

    Raises:
        ValueError: settings that do not fit together; the message names them.
    """

    objective: Objective = "ddpm"
    """Prediction: the noise of a DDPM (ddpm), or the velocity of a linear flow (flow)."""
    latent_channels: int = 16
    """d: channels of a latent."""
    latent_size: int = 16
    """Side of the (square) latent grid."""
    patch_size: int = 1
    """Latent positions per token side. [ours]: the paper does not say; 1 gives the 256 tokens of DiT-XL/2."""
    width: int = 1152
    """Channels of the tokens."""
    depth: int = 28
    """Transformer blocks."""
    heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of every MLP over its width; swiglu takes two thirds of it, for the same number of parameters."""
    num_classes: int = 1000
    """Number of classes: labels are 0 .. num_classes - 1; the label num_classes means "no class"."""
    label_dropout: float = 0.1
    """Share of training labels replaced by "no class", which guidance needs; 0: no such label."""
    learn_sigma: bool = True
    """Predict the variance of each denoising step too; for objective ddpm only."""
    norm: NormName = "layer"
    """Normalisation before attention and MLP: LayerNorm as in DiT (layer), or RMSNorm (rms)."""
    mlp: MlpName = "gelu"
    """MLP: as in DiT (gelu), or gated (swiglu)."""
    positions: Positions = "sincos"
    """Positions: fixed sines and cosines added to tokens, as in DiT (sincos), or rotated queries and keys (rotary)."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    wide_width: int | None = None
    """Channels of a shallow head on the trunk, at least a latent's: RAE's remedy for latents of many channels, which a
    narrow trunk cannot tell from noise (arXiv 2510.11690). RAE has 2048 on XL. None: no such head."""
    wide_depth: int | None = None
    """Its transformer blocks. RAE has 2."""
    wide_heads: int | None = None
    """Its attention heads. RAE has 16."""
    time_shift: float | Literal["dimension"] | None = None
    """s in t' = s t / (1 + (s - 1) t), t = 0 noise, of the times that objective flow trains at, and, unless said
    otherwise, of the steps that it is sampled with. dimension: sqrt(4096 / (d h w)), RAE's shift for latents of many
    values (Esser et al. 2024 derive it from the image's size); RAE counts t from the data and has its inverse. None:
    1."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and 1 <= value <= MOST[field.name]):
                raise ValueError(
                    f"model.{field.name} must be a whole number from 1 to {MOST[field.name]:,}, not {value!r}"
                )
        choices = {"objective": Objective, "norm": NormName, "mlp": MlpName, "positions": Positions}
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise ValueError(
                    f"model.{name} must be one of {', '.join(get_args(literal))}, not {getattr(self, name)!r}"
                )
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"model.latent_size {self.latent_size} is not divisible by model.patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"model.width {self.width} must be a multiple of 4 for sincos positions")
        if self.positions == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                f"model.width / model.heads = {self.width // self.heads} must be a multiple of 4 for rotary positions"
            )
        if not 0 < self.mlp_ratio <= 100:
            raise ValueError(f"model.mlp_ratio must be positive and at most 100, not {self.mlp_ratio}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"model.label_dropout must be in [0, 1), not {self.label_dropout}")
        self._check_wide_head()
        if self.time_shift is not None and self.objective != "flow":
            raise ValueError("model.time_shift is for model.objective flow")
        if self.time_shift not in (None, "dimension") and not 0 < float(self.time_shift) < math.inf:
            raise ValueError(f"model.time_shift must be positive, not {self.time_shift}")
        if self.learn_sigma and self.objective == "flow":
            raise ValueError(
                "model.learn_sigma must be false for model.objective flow: a flow has no variance to learn"
            )

    def _check_wide_head(self) -> None:
        if self.wide_width is None and self.wide_depth is None and self.wide_heads is None:
            return
        if self.wide_width is None or self.wide_depth is None or self.wide_heads is None:
            raise ValueError("model.wide_width, model.wide_depth and model.wide_heads belong together")
        if self.wide_width < self.latent_channels * self.patch_size**2:
            raise ValueError(
                f"model.wide_width {self.wide_width} must be at least the {self.latent_channels * self.patch_size**2}"
                " channels of a token's latents: that is what a wide head is for"
            )
        try:
            _ = self.wide
        except ValueError as error:
            raise ValueError(f"of the wide head: {error}") from error

    @property
    def wide(self) -> "DiTConfig":
        """The shape of the wide head: this one but for its width, depth and heads."""
        assert self.wide_width is not None
        sizes: dict[str, Any] = {"width": self.wide_width, "depth": self.wide_depth, "heads": self.wide_heads}
        return replace(self, **sizes, wide_width=None, wide_depth=None, wide_heads=None)

    @property
    def shift(self) -> float:
        """What `time_shift` comes to."""
        if self.time_shift == "dimension":
            return math.sqrt(SHIFT_BASE / math.prod(self.latent_shape))
        return 1.0 if self.time_shift is None else float(self.time_shift)

    @classmethod
    def of_size(cls, size: str, **settings: Any) -> "DiTConfig":
        """A row of `SIZES` (tiny, s, b, l, xl), and any other settings by name.

        Raises:
            ValueError: no such size, or settings that do not fit together.
        """
        if size not in SIZES:
            raise ValueError(f"no DiT of size {size!r}: the sizes are {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **settings})

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(d, h, w) of one latent."""
        return (self.latent_channels, self.latent_size, self.latent_size)

    @property
    def out_channels(self) -> int:
        """Channels of a prediction: d, or 2 d with learned variance."""
        return 2 * self.latent_channels if self.learn_sigma else self.latent_channels


@dataclass(frozen=True)
class SampleConfig:
    """Sampling of latents. Defaults: DiT's protocol for gFID, 250 steps, without guidance as in the paper.

    Raises:
        ValueError: settings out of range, or not for this sampler.
    """

    sampler: Sampler | None = None
    """ddpm or ddim for a generator trained with objective ddpm; euler, heun (ODE) or sde for flow. [ours] Default: ddpm
    or heun, by the generator's objective."""
    steps: int = 250
    """Steps from noise to latent, at most 1000 with ddpm and ddim; heun evaluates the generator twice per step. [ours]:
    the paper does not say."""
    cfg: float = 1.0
    """Guidance weight w: unconditional + w (conditional - unconditional). 1: none. The paper's pictures use 4.2."""
    cfg_interval: tuple[float, float] | None = None
    """Guide between these times only: 0 (data) .. 999 for ddpm and ddim, 0 (noise) .. 1 for flow. None: always."""
    legacy_cfg: bool = False
    """Guide the first three channels only, as DiT, SiT and LightningDiT do, for comparison with their numbers."""
    time_shift: float | None = None
    """s in t' = s t / (1 + (s - 1) t), t = 0 noise; for flow. Below 1 more steps are spent near the noise. None: as the
    generator was trained."""
    eta: float = 0.0
    """Randomness of ddim, from 0 to 1."""
    seed: int = 0
    """Seed. Image i's noise and random label depend on it and i alone."""
    labels: Literal["balanced", "random"] | tuple[int, ...] = "random"
    """Classes: random as in DiT, balanced (each in turn; lowers gFID by about 0.1), or a list, used in turn."""
    num: int = 16
    """Images."""
    batch_size: int = 64
    """Batch size in images."""

    def __post_init__(self):
        for name in ("cfg_interval", "labels"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.sampler not in (None, *get_args(Sampler)):
            raise ValueError(f"sampler must be one of {', '.join(get_args(Sampler))}, not {self.sampler!r}")
        for name in ("steps", "num", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.objective == "ddpm" and self.steps > STEPS:
            raise ValueError(f"steps must be at most {STEPS} for sampler {self.sampler}, not {self.steps}")
        if not (math.isfinite(self.cfg) and self.cfg >= 0):
            raise ValueError(f"cfg must be a number of at least 0, not {self.cfg}")
        if self.cfg_interval is not None and (
            len(self.cfg_interval) != 2 or not self.cfg_interval[0] <= self.cfg_interval[1]
        ):
            raise ValueError(f"cfg_interval must be two times, the lower first, not {list(self.cfg_interval)}")
        if self.time_shift is not None and self.time_shift <= 0:
            raise ValueError(f"time_shift must be positive, not {self.time_shift}")
        if self.time_shift not in (None, 1) and self.objective not in (None, "flow"):
            raise ValueError(f"time_shift is for the samplers {', '.join(SAMPLERS['flow'])}, not {self.sampler}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], not {self.eta}")
        if self.eta and self.sampler not in (None, "ddim"):
            raise ValueError(f"eta is for the sampler ddim, not {self.sampler}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, it is {self.seed}")
        if isinstance(self.labels, str) and self.labels not in ("balanced", "random"):
            raise ValueError(f"labels must be balanced, random or a list of classes, not {self.labels!r}")
        if not self.labels:
            raise ValueError("labels must not be an empty list")

    @property
    def objective(self) -> Objective | None:
        """The objective that the sampler needs; None if no sampler is set."""
        return next((objective for objective, samplers in SAMPLERS.items() if self.sampler in samplers), None)


@dataclass(frozen=True, kw_only=True)
class Sample(SampleConfig):
    """Sample images from a generator; the same command again makes missing images.

    Example: hieratok sample runs/dit-b --tokenizer runs/f16d16-multi --out samples --num 64 --cfg 4.2 --scales all
    """

    run: str
    """Generator: a run's folder, a generator's folder or a hub id."""
    tokenizer: str
    """Its tokenizer: a run's folder, a tokenizer's folder, a hub id, or a folder of diffusers' AutoencoderKL or
    AutoencoderDC."""
    out: str
    """Folder to write to: 256px/000000.png and so on, samples.npz for ADM's evaluation suite, contact-sheet.png."""
    scales: Literal["finest", "all"] = "finest"
    """Scales to decode: the finest, or all, each into its own folder: 16px, 32px, ..."""
    preview: bool = False
    """Decode every scale; coarse images of a batch are written before the finest is computed."""
    precision: Precision = "fp32"
    """bf16: the generator runs in bfloat16 (autocast), as in training."""
    compile: bool = False
    """Use torch.compile for the generator: minutes to start, then faster; for thousands of images."""
    device: str | None = None
    """Where to compute, such as cuda:0 or cpu. Default: the GPU if there is one."""
