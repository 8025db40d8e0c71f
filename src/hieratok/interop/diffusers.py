"""The models of this package for users of diffusers: `pip install 'hieratok[diffusers]'`.

    from hieratok.interop import AutoencoderHieraTok, HieraTokDiT, HieraTokPipeline
    vae = AutoencoderHieraTok.from_hieratok(HieraTok.from_pretrained("runs/f16d16-multi"))
    dit = HieraTokDiT.from_hieratok(DiT.from_pretrained("runs/dit-xl"))
    pipeline = HieraTokPipeline(dit, vae, DDIMScheduler(clip_sample=False))
    images = pipeline([207, 360], guidance_scale=4.2).images

Importing this module imports diffusers, which takes a while; nothing else of the package imports it. diffusers' classes
are taken from submodules, where they are declared for type checkers.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hieratok.core.extras import needs_extras

with needs_extras():
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from diffusers.utils.accelerate_utils import apply_forward_hook
    from diffusers.utils.outputs import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor

from hieratok.generation import diffusion
from hieratok.generation.dit import DiT, DiTConfig, LatentSpace
from hieratok.generation.sampling import guided
from hieratok.tokenizer.model import HieraTok, TokenizerConfig

OutputType = Literal["pil", "np", "pt"]


def takes(config_class: type) -> Callable[[Callable], Callable]:
    """Give an `__init__` with `**settings` the fields of a config dataclass as its keywords, in place of a copy of
    them: diffusers reads a model's configuration off that signature."""

    def with_signature(init: Callable) -> Callable:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
        settings = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(config_class)
        ]
        init.__signature__ = inspect.Signature([*own, *settings])  # type: ignore[attr-defined]
        return init

    return with_signature


class AutoencoderHieraTok(ModelMixin, AutoencoderMixin, ConfigMixin):
    """A `HieraTok` with the face of diffusers' autoencoders; the model itself is `.tokenizer`.

    Args:
        latents_mean: (d,), mean of every latent channel over training images; None: not measured.
        latents_std: (d,), its standard deviation.
        settings: the fields of `TokenizerConfig`.

    Raises:
        ValueError: settings that do not fit together.
    """

    @register_to_config
    @takes(TokenizerConfig)
    def __init__(
        self,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.tokenizer = HieraTok(TokenizerConfig(**settings))
        if latents_mean is not None and latents_std is not None:
            self.tokenizer.latent_mean.copy_(torch.tensor(latents_mean))
            self.tokenizer.latent_std.copy_(torch.tensor(latents_std))

    @classmethod
    def from_hieratok(cls, tokenizer: HieraTok) -> "AutoencoderHieraTok":
        """Around a tokenizer, whose weights are shared and not copied."""
        statistics = {}
        if tokenizer.latent_mean.isfinite().all() and tokenizer.latent_std.isfinite().all():
            statistics = {"latents_mean": tokenizer.latent_mean.tolist(), "latents_std": tokenizer.latent_std.tolist()}
        with torch.device("meta"):  # no memory for weights that are replaced at once
            model = cls(**statistics, **asdict(tokenizer.config))
        model.tokenizer = tokenizer
        return model.train(tokenizer.training)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images (B, 3, H, W) in [-1, 1] -> `latent_dist` over (B, d, ceil(H/f), ceil(W/f)), in the images' dtype.

        Sides that are no multiples of f are padded as by `HieraTok.encode`; `decode` does not cut the padding off.

        Raises:
            ValueError: another shape.
        """
        posterior = self.tokenizer.encode(x)
        moments = torch.cat((posterior.mean, posterior.logvar), dim=1).to(x.dtype)
        distribution = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)  # type: ignore[arg-type]

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents (B, d, h, w) -> `sample`, the finest scale (B, 3, f h, f w), about [-1, 1].

        Args:
            z: latents, not normalised.
            return_dict: else a tuple.
            generator: not used; some pipelines pass one.

        Raises:
            ValueError: another shape.
        """
        sample = self.tokenizer.decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_pyramid(self, z: Tensor) -> list[Tensor]:
        """Raw latents (B, d, h, w) -> an image per scale, (B, 3, f h_k, f w_k), coarse to fine, about [-1, 1]."""
        return self.tokenizer.decode_pyramid(z)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Images to their reconstructions, from the posterior's mean or a sample of it."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)


class HieraTokDiT(ModelMixin, ConfigMixin):
    """A `DiT` with the face of diffusers' transformers; the model itself is `.dit`.

    Args:
        latents: the fields of `LatentSpace`, whose latents it has learned; None: not known.
        settings: the fields of `DiTConfig`.

    Raises:
        ValueError: settings that do not fit together.
    """

    @register_to_config
    @takes(DiTConfig)
    def __init__(self, latents: dict[str, Any] | None = None, **settings: Any):
        super().__init__()
        self.dit = DiT(DiTConfig(**settings))
        self.dit.latents = LatentSpace(**latents) if latents else None

    @classmethod
    def from_hieratok(cls, dit: DiT) -> "HieraTokDiT":
        """Around a generator, whose weights are shared and not copied."""
        with torch.device("meta"):
            model = cls(latents=asdict(dit.latents) if dit.latents else None, **asdict(dit.config))
        model.dit = dit
        return model.train(dit.training)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """`DiT.forward`: the same arguments in the same units, whose prediction is `sample`."""
        sample = self.dit(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)  # type: ignore[arg-type]


@dataclass
class HieraTokPipelineOutput(BaseOutput):
    """What the pipeline returns."""

    images: Any
    """The finest scale: a list of PIL images, or an array (B, H, W, 3) or tensor (B, 3, H, W) in [0, 1]."""
    pyramid: list[Any] | None = None
    """The same for every scale, coarse to fine, if asked for."""


class HieraTokPipeline(DiffusionPipeline):
    """Class labels -> images: our generator and decoder, and a scheduler of diffusers.

    Args:
        transformer: the generator.
        vae: the tokenizer whose latents it has learned, or one of diffusers' image autoencoders if it was trained on
            that one's.
        scheduler: for objective ddpm any that takes a prediction of the noise, on the noise schedule of training and
            without clipping, such as `DDIMScheduler(clip_sample=False)`, `DPMSolverMultistepScheduler()` or, for the
            learned variance, `DDPMScheduler(variance_type="learned_range", clip_sample=False)`; their
            `timestep_spacing="linspace"` gives our samplers' times. For objective flow
            `FlowMatchEulerDiscreteScheduler()` or another of flow matching.

    Raises:
        ValueError: models that do not fit each other, or a scheduler that does not fit the generator.
    """

    transformer: HieraTokDiT
    vae: Any
    scheduler: Any
    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: HieraTokDiT, vae: Any, scheduler: Any):
        super().__init__()
        made, taken = transformer.dit.config.latent_channels, vae.config.latent_channels
        if made != taken:
            raise ValueError(f"the generator makes latents of {made} channels, but the autoencoder takes {taken}")
        check_scheduler(scheduler, transformer.dit.config)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        all_scales: bool = False,
        return_dict: bool = True,
    ) -> HieraTokPipelineOutput | tuple:
        """Sample an image for each label.

        Args:
            class_labels: B classes.
            guidance_scale: w in unconditional + w (conditional - unconditional), over all channels; 1: no guidance.
            num_inference_steps: of the scheduler.
            generator: for the noise; with one for each image, an image does not depend on the others.
            latents: standard normals (B, d, h, w) to start from; None: drawn.
            output_type: PIL images, an array (np) or a tensor (pt).
            all_scales: decode every scale, and not the finest alone.
            return_dict: else a tuple (images, pyramid).

        Raises:
            ValueError: labels, noise or guidance that the generator cannot take, or a scheduler that does not fit it.
        """
        config = self.transformer.dit.config
        check_scheduler(self.scheduler, config)
        check_call(class_labels, guidance_scale, output_type, config)
        if all_scales and not hasattr(self.vae, "decode_pyramid"):
            raise ValueError(f"{type(self.vae).__name__} has one scale: leave out all_scales")
        space = self.latent_space()
        device = self._execution_device
        shape = (len(class_labels), *config.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}")
        y = torch.as_tensor(list(class_labels), device=device)
        z = self.denoise(latents.to(device, torch.float32), y, guidance_scale, num_inference_steps, generator)
        z = space.denormalize(z).to(self.vae.dtype)
        pyramid = self.vae.decode_pyramid(z) if all_scales else [self.vae.decode(z, return_dict=False)[0]]
        images: list[Any] = [self.image_processor.postprocess(x.float(), output_type) for x in pyramid]
        self.maybe_free_model_hooks()
        output = HieraTokPipelineOutput(images=images[-1], pyramid=images if all_scales else None)
        return output if return_dict else (output.images, output.pyramid)

    def latent_space(self) -> LatentSpace:
        """How latents are denormalised: as the generator was trained, or else by the autoencoder's statistics.

        Raises:
            ValueError: neither is known.
        """
        config = self.vae.config
        if self.transformer.dit.latents is not None:
            return self.transformer.dit.latents
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            raise ValueError(
                "neither the generator nor the autoencoder says how latents were normalised: no statistics"
            )
        return LatentSpace("", mean, std)

    def denoise(
        self,
        z: Tensor,
        y: Tensor,
        guidance_scale: float,
        steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """Standard normals (B, d, h, w), float32 -> normalised latents, by the scheduler."""
        config = self.transformer.dit.config
        scheduler: Any = self.scheduler

        def in_float32(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.transformer(x.to(self.transformer.dtype), t, y, return_dict=False)[0].float()

        predict = guided(in_float32, guidance_scale, null_label=config.num_classes)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):  # equal steps to the very end, as our samplers'
            scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=z.device)
        else:
            scheduler.set_timesteps(steps, device=z.device)
        random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        z = z * scheduler.init_noise_sigma if config.objective == "ddpm" else z
        progress_bar: Any = self.progress_bar
        for timestep in progress_bar(scheduler.timesteps):
            if config.objective == "ddpm":
                t = timestep.expand(len(z))
                output = predict(scheduler.scale_model_input(z, timestep), t, y)
                if scheduler.config.get("variance_type") != "learned_range":
                    output = output[:, : config.latent_channels]
            else:  # diffusers counts time from the data, and so its velocity points to the noise
                t = (1 - timestep.double() / scheduler.config.num_train_timesteps).float().expand(len(z))
                output = -predict(z, t, y)
            z = scheduler.step(output, timestep, z, **random, return_dict=False)[0]
        return z


def check_call(class_labels: Sequence[int], guidance_scale: float, output_type: str, config: DiTConfig) -> None:
    """Raise a ValueError, of one line, for what the generator cannot be asked for."""
    if not len(class_labels):
        raise ValueError("class_labels must name a class for each image: it is empty")
    for label in class_labels:
        if not 0 <= label < config.num_classes:
            raise ValueError(f"label {label} is out of range: the generator knows 0 .. {config.num_classes - 1}")
    if guidance_scale != 1 and config.label_dropout == 0:
        raise ValueError("guidance_scale must be 1: the generator was trained without label dropout")
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}, not {output_type!r}")


def check_scheduler(scheduler: Any, config: DiTConfig) -> None:
    """Whether a scheduler's steps are those of the process that the generator was trained for.

    Raises:
        ValueError: says in one line why not; what would otherwise be noise, or images that are slightly wrong.
    """
    name, settings = type(scheduler).__name__, scheduler.config
    flow = name.startswith("FlowMatch") or settings.get("prediction_type") == "flow_prediction"
    predicts = "flow_prediction" if flow else settings.get("prediction_type")
    wanted = "epsilon" if config.objective == "ddpm" else "flow_prediction"
    if predicts != wanted:
        raise ValueError(
            f"{name} with prediction type {predicts} does not fit a generator of objective {config.objective}, which"
            f" needs {wanted}: use {'DDIMScheduler' if wanted == 'epsilon' else 'FlowMatchEulerDiscreteScheduler'}"
        )
    for option in ("clip_sample", "thresholding"):
        if settings.get(option):
            raise ValueError(f"{name} clips latents as if they were pixels in [-1, 1]: set {option}=False")
    if config.objective == "flow":
        return
    betas = getattr(scheduler, "betas", None)
    if betas is None or len(betas) != diffusion.STEPS or not torch.allclose(
        betas.double().cpu(), diffusion.LINEAR.betas, rtol=1e-3
    ):  # fmt: skip
        raise ValueError(
            f"{name} has another noise schedule than training, {diffusion.STEPS} linear steps:"
            f' set beta_schedule="linear", beta_start={diffusion.FIRST_BETA}, beta_end={diffusion.LAST_BETA}'
        )
    learned = str(settings.get("variance_type") or "").startswith("learned")
    usable = config.learn_sigma and isinstance(scheduler, DDPMScheduler) and settings.variance_type == "learned_range"
    if learned and not usable:
        raise ValueError(
            f"{name} with variance_type {settings.variance_type!r}: only DDPMScheduler with 'learned_range' can use the"
            f" variance of a generator that learned one"
        )


for model in (AutoencoderHieraTok, HieraTokDiT, HieraTokPipeline):
    model.__module__ = "hieratok.interop"  # a saved pipeline names a class by its module, which must not move
