"""This package's models as diffusers classes: `pip install 'hieratok[diffusers]'`.

    from hieratok.interop import AutoencoderHieraTok, HieraTokDiT, HieraTokPipeline
    vae = AutoencoderHieraTok.from_pretrained("runs/f16d16-multi")
    dit = HieraTokDiT.from_pretrained("runs/dit-xl")
    pipeline = HieraTokPipeline(dit, vae, DDIMScheduler(clip_sample=False))
    images = pipeline([207, 360], guidance_scale=4.2).images

Importing this module imports diffusers, which is slow; no other module imports it. diffusers' classes are imported from
submodules, where they are declared for type checkers.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from hieratok.core.extras import needs_extras

with needs_extras():
    import diffusers
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.accelerate_utils import apply_forward_hook
    from diffusers.utils.outputs import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor

from hieratok.core import checkpoint
from hieratok.core.files import read_json_table
from hieratok.generation import diffusion
from hieratok.generation.dit import DiT, DiTConfig, LatentSpace
from hieratok.generation.sampling import guided
from hieratok.tokenizer.model import HieraTok, TokenizerConfig, check_images
from hieratok.tokenizer.tiling import in_tiles, overlap_of

OutputType = Literal["pil", "np", "pt", "latent"]
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
"""Arguments of `from_pretrained` that our own loaders take too."""


def takes(config_class: type) -> Callable[[Callable], Callable]:
    """Give an `__init__` with `**settings` the fields of a config dataclass as keywords: diffusers reads a model's
    configuration from that signature."""

    def with_signature(init: Callable) -> Callable:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
        settings = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(config_class)
        ]
        init.__signature__ = inspect.Signature([*own, *settings])  # type: ignore[attr-defined]
        return init

    return with_signature


class OwnModel(ModelMixin, ConfigMixin):
    """Base of the classes around our models: loads runs and pushed models as diffusers loads its own."""

    _supports_gradient_checkpointing = True
    _own: ClassVar[type[HieraTok | DiT]]
    """The model's class."""
    _inside: ClassVar[str]
    """Its sub-folder in a run."""

    @classmethod
    def from_hieratok(cls, model: Any, /) -> Self:
        """Around a model of ours."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(  # type: ignore[override]  # diffusers' own takes None too, and fails
        cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any
    ) -> Self:
        """From a run's folder, what `hieratok push` or the model's own `save_pretrained` wrote, a folder written by
        diffusers, or a hub id of either. In evaluation mode.

        Args:
            pretrained_model_name_or_path: where it is.
            options: those of diffusers, such as `torch_dtype`, `device_map`, `variant` or `subfolder`. For our models
                some, such as `device_map`, need space for a copy in the temporary folder.

        Raises:
            FileNotFoundError: nothing there, or a file is missing.
            ValueError: the files do not fit this class or each other.
        """
        source = os.fspath(pretrained_model_name_or_path)
        hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
        if options.get("subfolder") or is_of_diffusers(source, cls._inside, hub):
            return super().from_pretrained(source, **options)
        rest = {name: value for name, value in options.items() if name not in HUB_OPTIONS and value is not None}
        dtype = rest.pop("torch_dtype", None)
        dtype = rest.pop("dtype", dtype)
        loaded = cls.from_hieratok(cls._own.from_pretrained(source, dtype=dtype, **hub))
        if rest:
            with tempfile.TemporaryDirectory() as folder:
                loaded.save_pretrained(folder)
                loaded = super().from_pretrained(folder, torch_dtype=dtype, **rest)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info
        model.register_to_config(_name_or_path=source)
        return loaded


def is_of_diffusers(source: str, inside: str, hub: dict[str, Any]) -> bool:
    """Whether diffusers wrote a model.

    Args:
        source: folder or hub id.
        inside: the model's sub-folder in a run of ours.
        hub: options of `checkpoint.find`.

    Raises:
        FileNotFoundError, ValueError: no model, or one that cannot be read.
    """
    return "_class_name" in read_json_table(checkpoint.find(source, inside, **hub) / checkpoint.CONFIG)


class AutoencoderHieraTok(OwnModel, AutoencoderMixin):
    """A `HieraTok` with the interface of diffusers' autoencoders; the model itself is `.tokenizer`.

    Latents are raw. Generators learn `(z - latents_mean) / latents_std * scaling_factor`, the formula of diffusers'
    pipelines, with `scaling_factor` 1.

    `enable_slicing()` encodes and decodes one image at a time, `enable_tiling()` images larger than the training size
    in tiles of that size, which overlap.

    Args:
        scaling_factor: 1, for scripts that read it.
        latents_mean: (d,), mean of every latent channel over training images; None: not measured.
        latents_std: (d,), its standard deviation.
        settings: the fields of `TokenizerConfig`.

    Raises:
        ValueError: settings that do not fit together.
    """

    _own, _inside = HieraTok, "tokenizer"
    _no_split_modules: ClassVar = ["HieraTok"]  # its parts exchange generators, which hooks cannot move

    @register_to_config
    @takes(TokenizerConfig)
    def __init__(
        self,
        scaling_factor: float = 1.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        **settings: Any,
    ):
        super().__init__()
        if scaling_factor != 1:
            raise ValueError(f"scaling_factor must be 1, not {scaling_factor}: latents_mean and latents_std normalise")
        self.use_slicing = self.use_tiling = False
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

    def enable_tiling(self) -> None:
        """Encode and decode images larger than the training size in overlapping, blended tiles of that size.

        Raises:
            ValueError: no overlap fits the scales.
        """
        overlap_of(self.tokenizer.config)
        self.use_tiling = True

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images (B, 3, H, W) in [-1, 1] -> `latent_dist` over (B, d, ceil(H/f), ceil(W/f)), in the images' dtype.

        Sides that are no multiples of f are padded as by `HieraTok.encode`; `decode` does not cut the padding off.

        Raises:
            ValueError: another shape.
        """

        def moments(images: Tensor) -> list[Tensor]:
            posterior = self.tokenizer.encode(images)
            return [torch.cat((posterior.mean, posterior.logvar), dim=1)]

        check_images(x)
        distribution = DiagonalGaussianDistribution(self._in_parts(moments, x, unit=1)[0].to(x.dtype))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)  # type: ignore[arg-type]

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents (B, d, h, w) -> `sample`, the finest scale (B, 3, f h, f w), about [-1, 1].

        Args:
            z: latents, not normalised.
            return_dict: else a tuple.
            generator: ignored; some pipelines pass one.

        Raises:
            ValueError: another shape.
        """
        self.tokenizer.scales_of(z)
        sample = self._in_parts(lambda z: [self.tokenizer.decode(z)], z, unit=self.tokenizer.config.patch_size)[0]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_pyramid(self, z: Tensor) -> list[Tensor]:
        """Raw latents (B, d, h, w) -> an image per scale, (B, 3, f h_k, f w_k), coarse to fine, about [-1, 1].

        Raises:
            ValueError: another shape.
        """
        self.tokenizer.scales_of(z)
        return self._in_parts(self.tokenizer.decode_pyramid, z, unit=self.tokenizer.config.patch_size)

    def _in_parts(self, function: Callable[[Tensor], list[Tensor]], x: Tensor, unit: int) -> list[Tensor]:
        """`function` of x (B, C, H, W), whose elements have `unit` pixels: whole, or in slices and tiles if enabled."""
        config = self.tokenizer.config
        tile = config.image_size // unit

        def of_slice(x: Tensor) -> list[Tensor]:
            if not self.use_tiling or max(x.shape[-2:]) <= tile:
                return function(x)
            return [y.to(self.dtype) for y in in_tiles(function, x, tile, overlap_of(config) // unit)]

        parts = [of_slice(part) for part in (x.split(1) if self.use_slicing else (x,))]
        return [torch.cat(outputs) for outputs in zip(*parts)]

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


class HieraTokDiT(OwnModel):
    """A `DiT` with the interface of diffusers' transformers; the model itself is `.dit`.

    Args:
        latents: the fields of its `LatentSpace`; None: not known.
        settings: the fields of `DiTConfig`.

    Raises:
        ValueError: settings that do not fit together.
    """

    _own, _inside = DiT, "generator"
    _no_split_modules: ClassVar = ["DiT"]
    _skip_layerwise_casting_patterns: ClassVar = ["t_embedder"]  # it computes in the precision of its weights

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
        """`DiT.forward`, with the same arguments and units; the prediction is `sample`."""
        sample = self.dit(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)  # type: ignore[arg-type]


@dataclass
class HieraTokPipelineOutput(BaseOutput):
    """The pipeline's output."""

    images: Any
    """The finest scale: a list of PIL images, or an array (B, H, W, 3) or tensor (B, 3, H, W) in [0, 1]; or the
    normalised latents (B, d, h, w)."""
    pyramid: list[Any] | None = None
    """The same for every scale, coarse to fine, if asked for."""


class HieraTokPipeline(DiffusionPipeline):
    """Class labels -> images: our generator and decoder, and a scheduler of diffusers.

    Args:
        transformer: the generator.
        vae: the tokenizer of its latents, or one of diffusers' image autoencoders if it was trained on its latents.
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
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        transformer: HieraTokDiT,
        vae: AutoencoderHieraTok | AutoencoderKL | AutoencoderDC,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        made, taken = transformer.dit.config.latent_channels, vae.config["latent_channels"]
        if made != taken:
            raise ValueError(f"the generator makes latents of {made} channels, but the autoencoder takes {taken}")
        check_scheduler(scheduler, transformer.dit.config)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False

    @property
    def guidance_scale(self) -> float:
        """Guidance of the running call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback may set `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[Any] | Tensor,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        all_scales: bool = False,
        return_dict: bool = True,
        num_images_per_prompt: int = 1,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> HieraTokPipelineOutput | tuple:
        """Sample B images: `num_images_per_prompt` for each label, one after the other.

        Args:
            class_labels: a class, or several; nested lists are read row by row.
            guidance_scale: w in unconditional + w (conditional - unconditional), over all channels; 1: no guidance.
            num_inference_steps: of the scheduler.
            generator: for the noise; with one for each image, an image does not depend on the others.
            latents: standard normals (B, d, h, w) to start from; None: drawn.
            output_type: PIL images, an array (np), a tensor (pt), or normalised latents (latent), which
                `latent_space().denormalize` converts for the autoencoder.
            all_scales: decode every scale, not only the finest.
            return_dict: else a tuple (images, pyramid).
            num_images_per_prompt: images of each label.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": normalised latents}) after every
                step; `latents` in what it returns replace them.
            callback_on_step_end_tensor_inputs: names in the callback's last argument; only `latents` is available.

        Raises:
            ValueError: labels, noise or guidance that do not fit the generator, or a scheduler that does not.
        """
        config = self.transformer.dit.config
        check_scheduler(self.scheduler, config)
        y = flat_labels(class_labels, config.num_classes)
        check_call(guidance_scale, output_type, num_images_per_prompt, config)
        wanted = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if unknown := [name for name in wanted if name not in self._callback_tensor_inputs]:
            raise ValueError(f"callbacks can ask for {', '.join(self._callback_tensor_inputs)}, not {unknown[0]!r}")
        if all_scales and output_type == "latent":
            raise ValueError("latents have no scales: leave out all_scales")
        if all_scales and not hasattr(self.vae, "decode_pyramid"):
            raise ValueError(f"{type(self.vae).__name__} has one scale: leave out all_scales")
        space = self.latent_space()
        device = self._execution_device
        y = y.repeat_interleave(num_images_per_prompt).to(device)
        shape = (len(y), *config.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}")
        self._guidance_scale, self._interrupt = guidance_scale, False

        def on_step_end(step: int, timestep: Tensor, z: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return z
            returned = callback_on_step_end(self, step, timestep, {"latents": z} if wanted else {})
            return (returned or {}).get("latents", z)

        z = self.denoise(latents.to(device, torch.float32), y, num_inference_steps, generator, on_step_end)
        if output_type == "latent":
            images, pyramid = z, None
        else:
            z = space.denormalize(z).to(self.vae.dtype)
            decoded = self.vae.decode_pyramid(z) if all_scales else [self.vae.decode(z, return_dict=False)[0]]
            pyramid = [self.image_processor.postprocess(x.float(), output_type) for x in decoded]
            images = pyramid[-1]
        self.maybe_free_model_hooks()
        output = HieraTokPipelineOutput(images=images, pyramid=pyramid if all_scales else None)
        return output if return_dict else (output.images, output.pyramid)

    def latent_space(self) -> LatentSpace:
        """The latents' normalisation: the generator's, else by the autoencoder's statistics.

        Raises:
            ValueError: neither is known.
        """
        config = self.vae.config
        if self.transformer.dit.latents is not None:
            return self.transformer.dit.latents
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            raise ValueError("neither the generator nor the autoencoder has statistics of latents")
        return LatentSpace("", mean, std)

    def denoise(
        self,
        z: Tensor,
        y: Tensor,
        steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        on_step_end: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Standard normals (B, d, h, w), float32 -> normalised latents, by the scheduler; `on_step_end` gets the step,
        its timestep and its latents, and returns latents."""
        config = self.transformer.dit.config
        scheduler: Any = self.scheduler

        def in_float32(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.transformer(x.to(self.transformer.dtype), t, y, return_dict=False)[0].float()

        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):  # equal steps to the end, as in our samplers
            scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=z.device)
        else:
            scheduler.set_timesteps(steps, device=z.device)
        random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        z = z * scheduler.init_noise_sigma if config.objective == "ddpm" else z
        self._num_timesteps = len(scheduler.timesteps)
        progress_bar: Any = self.progress_bar
        for step, timestep in enumerate(progress_bar(scheduler.timesteps)):
            if self.interrupt:
                continue
            predict = guided(in_float32, self.guidance_scale, null_label=config.num_classes)
            if config.objective == "ddpm":
                t = timestep.expand(len(z))
                output = predict(scheduler.scale_model_input(z, timestep), t, y)
                if scheduler.config.get("variance_type") != "learned_range":
                    output = output[:, : config.latent_channels]
            else:  # diffusers counts time from the data, so its velocity points to the noise
                t = (1 - timestep.double() / scheduler.config.num_train_timesteps).float().expand(len(z))
                output = -predict(z, t, y)
            z = scheduler.step(output, timestep, z, **random, return_dict=False)[0]
            z = on_step_end(step, timestep, z)
        return z


def flat_labels(class_labels: int | Sequence[Any] | Tensor, num_classes: int) -> Tensor:
    """A class or several, possibly nested -> (B,), row by row.

    Raises:
        ValueError: no classes, not whole numbers, or classes out of range.
    """
    try:
        y = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError("class_labels must be whole numbers, in rows of one length if nested") from error
    if not y.numel():
        raise ValueError("class_labels must name a class for each image: it is empty")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"class_labels must be whole numbers, not {y.dtype}")
    for label in y.flatten().tolist():
        if not 0 <= label < num_classes:
            raise ValueError(f"label {label} is out of range: the generator knows 0 .. {num_classes - 1}")
    return y.flatten().long()


def check_call(guidance_scale: float, output_type: str, num_images_per_prompt: int, config: DiTConfig) -> None:
    """Raise ValueError for arguments that do not fit the generator."""
    if guidance_scale != 1 and config.label_dropout == 0:
        raise ValueError("guidance_scale must be 1: the generator was trained without label dropout")
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}, not {output_type!r}")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be 1 or more, not {num_images_per_prompt}")


def check_scheduler(scheduler: Any, config: DiTConfig) -> None:
    """Check that a scheduler fits the process that the generator was trained for.

    Raises:
        ValueError: it does not; images would be noise or slightly wrong.
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
    model.__module__ = "hieratok.interop"  # saved pipelines contain this module's name, which must not change
    setattr(diffusers, model.__name__, model)  # DiffusionPipeline.from_pretrained and AutoModel look for classes there
