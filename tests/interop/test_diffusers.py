"""What diffusers' own tests ask of every model, autoencoder and pipeline, of ours; as far as a CPU can run it."""

import contextlib
import inspect
import io
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.models import CONFIG, save_generator, save_tokenizer
from helpers.saved_runs import tokenizer_run, write_run
from hieratok import HieraTok, TokenizerConfig
from hieratok.generation.dit import DiT, DiTConfig
from hieratok.interop.hub import write_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what diffusers imports
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models import modeling_utils
    from diffusers.models.auto_model import AutoModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
    from diffusers.training_utils import EMAModel

    from hieratok.interop import AutoencoderHieraTok, HieraTokDiT, HieraTokPipeline

pytestmark = [  # of what diffusers does with numpy 2 and with the hub's client
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]


COMMIT = "0123456789" * 4


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Case(NamedTuple):
    """A model of ours with diffusers' face, its settings and an input."""

    kind: type
    settings: dict[str, Any]
    inputs: dict[str, torch.Tensor]

    def make(self, **changes: Any):
        torch.manual_seed(0)
        model = self.kind(**{**self.settings, **changes})
        with torch.no_grad():  # a DiT starts with zeros
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    def run(self, model) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.inputs).sample


DIT = dict(latent_channels=4, latent_size=4, width=16, depth=2, heads=2, num_classes=3)
CASES = {
    "autoencoder": Case(
        AutoencoderHieraTok,
        {**CONFIG.__dict__, "downsample": "conv", "decoder_depth": 2, "drop_path": 0.2},
        {"sample": seeded(2, 3, 16, 16).clamp(-1, 1)},
    ),
    "dit": Case(
        HieraTokDiT,
        {**DIT, "positions": "rotary", "norm": "rms", "qk_norm": True, "mlp": "swiglu"},
        {
            "hidden_states": seeded(2, 4, 4, 4),
            "timestep": torch.tensor([3, 900]),
            "class_labels": torch.tensor([0, 2]),
        },
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


# --- models: files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_a_model_survives_its_files(case, tmp_path, monkeypatch, variant, shard, parallel):
    model = case.make()
    sizes = {"max_shard_size": shard} if shard else {}
    model.save_pretrained(tmp_path, variant=variant, **sizes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shard)
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", parallel)
    loaded = case.kind.from_pretrained(tmp_path, variant=variant)
    assert not loaded.training
    assert {name: t.shape for name, t in loaded.state_dict().items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }
    torch.testing.assert_close(case.run(loaded), case.run(model))
    if variant:
        with pytest.raises(OSError, match="no file named"):
            case.kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_keeps_its_precision(case, tmp_path, dtype, low_cpu_mem_usage):
    case.make().to(dtype).save_pretrained(tmp_path)
    loaded = case.kind.from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.dtype == dtype
    assert all(parameter.dtype == dtype for parameter in loaded.parameters())


PARTS = {  # the names that a device map may have; the first stays in memory
    AutoencoderHieraTok: ["tokenizer.encoder", "tokenizer.downsample", "tokenizer.decoder"],
    HieraTokDiT: [f"dit.{name}" for name in ("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")],
}


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")  # buffers, which diffusers asks for
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": "disk"}, "parts"])
def test_device_maps(case, tmp_path, device_map):
    if device_map == "parts":
        buffers = [name for name, _ in case.make().named_buffers()]
        device_map = {**dict.fromkeys([*PARTS[case.kind], *buffers], "disk"), PARTS[case.kind][0]: "cpu"}
    model = case.make()
    model.save_pretrained(tmp_path / "model")
    loaded = case.kind.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off")
    assert "disk" not in str(device_map) or any(p.is_meta for p in loaded.parameters())
    torch.testing.assert_close(case.run(loaded), case.run(model))


def test_auto_model_finds_the_class(case, tmp_path):
    model = case.make()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is case.kind
    torch.testing.assert_close(case.run(loaded), case.run(model))


# --- models: use ------------------------------------------------------------------------------------------------------


def test_outputs(case):
    model = case.make()
    with torch.no_grad():
        output, again = model(**case.inputs), model(**case.inputs, return_dict=False)
    assert isinstance(again, tuple)
    assert torch.equal(output.sample, again[0])
    assert torch.equal(output[0], again[0])
    expected = (2, 3, 16, 16) if case.kind is AutoencoderHieraTok else (2, 8, 4, 4)
    assert output.sample.shape == expected


def test_attributes(case):
    model = case.make()
    model.own = 5
    model.register_to_config(setting=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.own == 5
        assert model.config.setting == 6
    with pytest.warns(FutureWarning, match="setting"):
        assert model.setting == 6
    with pytest.raises(AttributeError, match=f"'{case.kind.__name__}' object has no attribute 'missing'"):
        _ = model.missing


def loss_and_gradients(case: Case, model) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.train().zero_grad()
    torch.manual_seed(1)  # of dropped paths and labels
    output = model(**case.inputs).sample
    loss = F.mse_loss(output, seeded(*output.shape))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_training_with_an_average(case):
    model = case.make()
    average = EMAModel(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss, gradients = loss_and_gradients(case, model)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    optimizer.step()
    average.step(model.parameters())
    assert loss_and_gradients(case, model)[0] < loss


def test_training_in_mixed_precision(case):
    model = case.make()
    exact, _ = loss_and_gradients(case, model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(case, model)
    torch.testing.assert_close(loss.float(), exact, rtol=0.05, atol=0)
    assert all(gradient is not None for gradient in gradients.values())


def test_gradient_checkpointing(case):
    model = case.make()
    blocks = [module for module in model.modules() if type(module).__name__ == "Block"]
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    assert not model.is_gradient_checkpointing
    loss, gradients = loss_and_gradients(case, model)
    assert len(calls) == len(blocks)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    calls.clear()
    again, recomputed = loss_and_gradients(case, model)
    assert len(calls) == 2 * len(blocks)  # of each, its forward pass once more
    torch.testing.assert_close((again, recomputed), (loss, gradients))
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    calls.clear()
    case.run(model)
    assert len(calls) == len(blocks)


def test_gradient_checkpointing_by_a_function_of_the_users(case):
    model, seen = case.make(), []

    def checkpoint(block, *args):
        seen.append(type(block).__name__)
        return block(*args)

    model.enable_gradient_checkpointing(checkpoint)
    loss_and_gradients(case, model)
    assert set(seen) == {"Block"}


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_layerwise_casting(case, storage):
    model = case.make()
    size, expected = model.get_memory_footprint(), case.run(model)
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert model.dtype == torch.float32
    assert model.get_memory_footprint() < 0.75 * size
    relative = (case.run(model) - expected).norm() / expected.norm()
    assert 0 < relative < {torch.float16: 0.01, torch.float8_e4m3fn: 0.2, torch.float8_e5m2: 0.4}[storage]
    with torch.autocast("cpu"):
        loss_and_gradients(case, model)


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}])
def test_group_offloading(case, options):
    model = case.make()
    expected = case.run(model)
    if options["offload_type"] == "block_level":
        options = {**options, "num_blocks_per_group": 1}
    model.enable_group_offload(torch.device("cpu"), **options)
    torch.testing.assert_close(case.run(model), expected)


# --- the autoencoder: slices and tiles --------------------------------------------------------------------------------


def counted(vae: AutoencoderHieraTok, monkeypatch) -> list[int]:
    """The batch sizes that encoder and decoder get from here on."""
    sizes: list[int] = []

    def count(function: Callable) -> Callable:
        return lambda x, *args: (sizes.append(len(x)), function(x, *args))[1]

    for name in ("encode", "decode", "decode_pyramid"):
        monkeypatch.setattr(vae.tokenizer, name, count(getattr(vae.tokenizer, name)))
    return sizes


@torch.no_grad()
def test_slices(monkeypatch):
    vae = CASES["autoencoder"].make()
    x = seeded(3, 3, 16, 16)
    moments, z = vae.encode(x).latent_dist.parameters, seeded(3, 4, 4, 4)
    images, pyramid = vae.decode(z).sample, vae.decode_pyramid(z)
    sizes = counted(vae, monkeypatch)
    vae.enable_slicing()
    torch.testing.assert_close(vae.encode(x).latent_dist.parameters, moments)
    torch.testing.assert_close(vae.decode(z).sample, images)
    torch.testing.assert_close(vae.decode_pyramid(z), pyramid)
    assert sizes == [1] * 9
    vae.disable_slicing()
    assert torch.equal(vae.decode(z).sample, images)
    assert sizes[-1] == 3


@torch.no_grad()
def test_tiles():
    """Parts that no other tile covers are what the tile alone gives; sizes are those of whole images."""
    vae = CASES["autoencoder"].make()
    small, large = seeded(1, 3, 16, 16), seeded(2, 3, 28, 41)
    moments, z = vae.encode(small).latent_dist.parameters, seeded(2, 4, 7, 11)
    whole, whole_z = vae.decode(z).sample, vae.encode(large).latent_dist.parameters
    vae.enable_tiling()
    assert torch.equal(vae.encode(small).latent_dist.parameters, moments)
    found = vae.encode(large).latent_dist.parameters
    assert found.shape == whole_z.shape == (2, 8, 7, 11)
    # tiles of 4 tokens that share one: the first covers 0 .. 3, and the next begins at 3
    first = vae.encode(large[..., :16, :16]).latent_dist.parameters
    torch.testing.assert_close(found[..., :3, :3], first[..., :3, :3])
    second = vae.encode(large[..., :16, 12:28]).latent_dist.parameters
    torch.testing.assert_close(found[..., :3, 4:6], second[..., :3, 1:3])
    torch.testing.assert_close(found[..., :3, 3], (first[..., :3, 3] + second[..., :3, 0]) / 2)

    images, pyramid = vae.decode(z).sample, vae.decode_pyramid(z)
    assert images.shape == whole.shape == (2, 3, 28, 44)
    torch.testing.assert_close(pyramid[-1], images)
    assert [x.shape[-2:] for x in pyramid] == [(7, 11), (14, 22), (28, 44)]
    corner = vae.decode_pyramid(z[..., :4, :4])
    for tiled, alone in zip(pyramid, corner, strict=True):
        side = alone.shape[-1] * 3 // 4
        torch.testing.assert_close(tiled[..., :side, :side], alone[..., :side, :side])
    assert (images - whole).abs().max() > 1e-3
    vae.disable_tiling()
    assert torch.equal(vae.decode(z).sample, whole)


def test_tiles_in_half_precision():
    vae = CASES["autoencoder"].make().to(torch.bfloat16)
    vae.enable_tiling()
    with torch.no_grad():
        z = vae.encode(seeded(1, 3, 24, 24).bfloat16()).latent_dist.mode()
        assert z.dtype == vae.decode(z).sample.dtype == torch.bfloat16


def test_scales_that_cannot_be_tiled():
    vae = AutoencoderHieraTok(**{**CONFIG.__dict__, "image_size": 7, "patch_size": 1, "scales": (1, 7)})
    with pytest.raises(ValueError, match="cannot be tiled with scales"):
        vae.enable_tiling()


@pytest.mark.parametrize("x", [torch.zeros(1, 1, 16, 16), torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 16).int()])
def test_images_that_are_none(x):
    vae = AutoencoderHieraTok(**CONFIG.__dict__)
    vae.enable_slicing()
    with pytest.raises(ValueError, match="encode takes floating-point images"):
        vae.encode(x)
    with pytest.raises(ValueError, match="decode takes latents of shape"):
        vae.decode(x)


@torch.no_grad()
def test_stock_scripts_normalise_latents_rightly():
    """The two formulas that diffusers' training scripts and pipelines have, over latents of known statistics."""
    vae = CASES["autoencoder"].make(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0])
    z = vae.encode(seeded(1, 3, 16, 16)).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    learned = (z - mean) * vae.config.scaling_factor / std
    torch.testing.assert_close(learned, vae.tokenizer.normalize(z))
    torch.testing.assert_close(learned * std / vae.config.scaling_factor + mean, z)
    with pytest.raises(ValueError, match=r"scaling_factor must be 1, not 0\.18215"):
        AutoencoderHieraTok(scaling_factor=0.18215, **CONFIG.__dict__)


# --- where models come from -------------------------------------------------------------------------------------------


def in_hub_cache(folder: Path, hub_id: str, cache: Path) -> None:
    """As if it had been downloaded."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def sources(tmp_path) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """A tokenizer in every place that it may lie in: where, and options of `from_pretrained`."""
    run = write_run(tmp_path / "runs" / "photos", tokenizer_run())
    write_folder(run, "alice/photos", "mit", tmp_path / "pushed")
    AutoencoderHieraTok.from_hieratok(HieraTok.from_pretrained(run)).save_pretrained(tmp_path / "diffusers")
    in_hub_cache(tmp_path / "pushed", "alice/photos", tmp_path / "cache")
    in_hub_cache(tmp_path / "diffusers", "alice/diffusers", tmp_path / "cache")
    hub = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    places = {
        "run": (str(run), {}),
        "pushed": (str(tmp_path / "pushed"), {}),
        "diffusers": (str(tmp_path / "diffusers"), {}),
        "sub-folder": (str(tmp_path), {"subfolder": "diffusers"}),
        "hub id": ("alice/photos", hub),
        "hub id, by diffusers": ("alice/diffusers", hub),
    }
    return places.__getitem__


@pytest.mark.parametrize("place", ["run", "pushed", "diffusers", "sub-folder", "hub id", "hub id, by diffusers"])
@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.bfloat16}, {"device_map": "cpu"}])
def test_from_pretrained_takes(sources, place, options, tmp_path):
    source, hub = sources(place)
    vae = AutoencoderHieraTok.from_pretrained(source, **hub, **options)
    expected = HieraTok.from_pretrained(tmp_path / "pushed", dtype=options.get("torch_dtype"))
    assert not vae.training
    assert vae.dtype == expected.dtype
    assert vae.config._name_or_path == source
    weights = expected.state_dict()
    assert vae.tokenizer.state_dict().keys() == weights.keys()
    for name, tensor in vae.tokenizer.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, equal_nan=True)


def test_generators_come_from_runs_too(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    run = save_generator(tmp_path / "dit", tokenizer)
    dit = HieraTokDiT.from_pretrained(run)
    assert dit.dit.latents == DiT.from_pretrained(run).latents
    assert dit.config.latents["mean"] == pytest.approx((0.1, -0.2, 0.3, 0.0))
    dit, information = HieraTokDiT.from_pretrained(run, device_map="cpu", output_loading_info=True)
    assert dit.config._name_or_path == str(run)
    assert not information["missing_keys"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("bundled:photos", FileNotFoundError, "bundled:photos: this version comes without models"),
        ("nothing", FileNotFoundError, "nothing: no such folder"),
        ("empty", FileNotFoundError, "empty holds no model"),
        ("dit", ValueError, "does not describe a hieratok model"),
        ("damaged", ValueError, "does not fit"),
    ],
)
def test_sources_that_are_none(source, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    DiT(DiTConfig(**DIT)).save_pretrained("dit")
    HieraTok(CONFIG).save_pretrained("damaged")
    HieraTok(TokenizerConfig(**{**CONFIG.__dict__, "encoder_width": 32})).save_pretrained("other")
    shutil.copy("other/model.safetensors", "damaged")
    for load in (AutoencoderHieraTok.from_pretrained, HieraTok.from_pretrained):
        with pytest.raises(error, match=message) as raised:
            load(source)
        assert "\n" not in str(raised.value)


# --- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> HieraTokPipeline:
    return make_pipe()


def make_pipe(objective: str = "ddpm") -> HieraTokPipeline:
    dit = CASES["dit"].make(objective=objective, learn_sigma=objective == "ddpm")
    vae = CASES["autoencoder"].make(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    scheduler = DDIMScheduler(clip_sample=False) if objective == "ddpm" else FlowMatchEulerDiscreteScheduler()
    made = HieraTokPipeline(dit, vae, scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: HieraTokPipeline, class_labels: Any = 1, seed: int = 0, **options: Any):
    options = {"num_inference_steps": 3, "output_type": "np", **options}
    options.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(class_labels, **options).images


def test_the_call_has_the_usual_parameters():
    optional = {
        name for name, p in inspect.signature(HieraTokPipeline.__call__).parameters.items() if p.default != p.empty
    }
    assert optional >= {
        "num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict",
        "guidance_scale", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    }  # fmt: skip


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
@pytest.mark.parametrize("safe_serialization", [True, False])
@pytest.mark.parametrize("loader", [HieraTokPipeline, DiffusionPipeline])
def test_a_pipeline_survives_its_files(tmp_path, objective, loader, safe_serialization):
    pipe = make_pipe(objective)
    pipe.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is HieraTokPipeline
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(loaded), draw(pipe), atol=1e-5)


def test_a_pipeline_changes_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.to(dtype=torch.float16)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    for model in (pipe.transformer, pipe.vae, loaded.transformer, loaded.vae):
        assert model.dtype == torch.float16


def test_a_pipeline_from_another(pipe):
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    made = HieraTokPipeline.from_pipe(pipe)
    assert made is not pipe
    assert made.components == pipe.components
    assert set(pipe.components) == {"transformer", "vae", "scheduler"}
    made.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(made), draw(pipe))
    other = CASES["autoencoder"].make(latents_std=[1.0] * 4, latents_mean=[0.0] * 4)
    assert HieraTokPipeline.from_pipe(pipe, vae=other).vae is other


@pytest.mark.parametrize("scheduler", [item.name for item in KarrasDiffusionSchedulers])
def test_every_scheduler(pipe, scheduler):
    kind, betas = getattr(diffusers, scheduler), {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    try:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, skip_prk_steps=True, **betas)
    except ImportError as error:
        pytest.skip(str(error).strip())
    if scheduler == "EDMEulerScheduler":  # of another process
        with pytest.raises(ValueError, match="another noise schedule"):
            draw(pipe)
        return
    steps = 5 if "KDPM2" in scheduler else 2
    images = draw(pipe, num_inference_steps=steps)
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()


def test_batches(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    images = draw(pipe, [[1], [1], [1]], generator=generators)
    assert images.shape == (3, 16, 16, 3)
    np.testing.assert_allclose(images[:1], draw(pipe, [1]), atol=1e-4)


@pytest.mark.parametrize(
    "labels",
    [[1, 2, 0, 2], [[1, 2], [0, 2]], [[1], [2], [0], [2]], torch.tensor([[1, 2], [0, 2]]), np.array([1, 2, 0, 2])],
)
def test_nested_labels(pipe, labels):
    assert np.array_equal(draw(pipe, labels), draw(pipe, (1, 2, 0, 2)))


@pytest.mark.parametrize("label", [2, torch.tensor(2), np.int64(2)])
def test_a_label_alone(pipe, label):
    assert np.array_equal(draw(pipe, label), draw(pipe, [2]))


def test_images_per_label(pipe):
    once = draw(pipe, [1, 1, 2, 2])
    twice = draw(pipe, [1, 2], num_images_per_prompt=2)
    assert np.array_equal(once, twice)
    assert np.abs(once[0] - once[1]).max() > 0.01


def test_guidance(pipe):
    assert draw(pipe, guidance_scale=1.0).shape == draw(pipe, guidance_scale=7.5).shape
    assert np.abs(draw(pipe, guidance_scale=1.0) - draw(pipe, guidance_scale=7.5)).max() > 0.01


@torch.no_grad()
def test_output_types(pipe):
    arrays = draw(pipe)
    tensors = draw(pipe, output_type="pt")
    pictures = draw(pipe, output_type="pil")
    latents = draw(pipe, output_type="latent")
    np.testing.assert_allclose(tensors.permute(0, 2, 3, 1).numpy(), arrays, atol=1e-6)
    assert np.abs(np.asarray(pictures[0]) - (255 * arrays[0]).round()).max() <= 1
    assert latents.shape == (1, 4, 4, 4)
    decoded = pipe.vae.decode(latents * 2.0 / pipe.vae.config.scaling_factor + 0.1).sample  # as stock scripts do
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), tensors)
    images, pyramid = pipe(1, num_inference_steps=1, output_type="latent", return_dict=False)
    assert images.shape == (1, 4, 4, 4)
    assert pyramid is None


def test_callbacks(pipe):
    seen = []

    def watch(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        assert pipe.num_timesteps == 3
        seen.append((step, int(timestep), tensors["latents"].clone()))

    latents = draw(pipe, output_type="latent", callback_on_step_end=watch)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], latents)
    none = draw(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 4, 4)}, output_type="latent")
    assert not none.any()
    held = []
    draw(pipe, callback_on_step_end=lambda *a: held.append(a[3]), callback_on_step_end_tensor_inputs=[])
    assert held == [{}] * 3


def test_callbacks_stop_and_steer(pipe):
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return tensors

    steps = []
    calls = pipe.transformer.register_forward_hook(lambda *_: steps.append(1))
    draw(pipe, callback_on_step_end=stop)
    assert len(steps) == 2
    calls.remove()
    assert not np.array_equal(draw(pipe), draw(pipe, callback_on_step_end=stop))  # and the next call runs to its end

    def unguided(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 1.0
        return tensors

    one, last = draw(pipe, guidance_scale=6.0, callback_on_step_end=unguided), draw(pipe, guidance_scale=6.0)
    assert np.abs(one - last).max() > 1e-3


def test_official_callbacks(pipe):
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    class Zero(PipelineCallback):
        @property
        def tensor_inputs(self):
            return ["latents"]

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            return {"latents": 0 * callback_kwargs["latents"]}

    zero = MultiPipelineCallbacks([Zero(cutoff_step_ratio=1.0)])
    assert not draw(pipe, output_type="latent", callback_on_step_end=zero).any()


def test_progress_bar(pipe):
    pipe.set_progress_bar_config(disable=False)
    for disabled in (False, True):
        pipe.set_progress_bar_config(disable=disabled)
        with io.StringIO() as stream, contextlib.redirect_stderr(stream):
            draw(pipe)
            assert ("3/3" in stream.getvalue()) != disabled


def test_switches_that_the_models_share(pipe):
    expected = draw(pipe, [1, 2])
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    np.testing.assert_allclose(draw(pipe, [1, 2]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": [[1, 2], [0]]}, "in rows of one length if nested"),
        ({"class_labels": "cat"}, "class_labels must be whole numbers"),
        ({"class_labels": [1.0]}, "class_labels must be whole numbers, not torch.float32"),
        ({"class_labels": [[], []]}, "it is empty"),
        ({"class_labels": [[0], [3]]}, "label 3 is out of range"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be 1 or more, not 0"),
        ({"output_type": "latent", "all_scales": True}, "latents have no scales"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "can ask for latents, not 'prompt_embeds'"),
        ({"num_images_per_prompt": 2, "latents": torch.zeros(1, 4, 4, 4)}, r"must have shape \(2, 4, 4, 4\)"),
    ],
)
def test_calls_that_do_not_fit(pipe, call, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**{"class_labels": 1, **call})
    assert "\n" not in str(error.value)
