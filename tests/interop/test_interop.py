"""The faces for diffusers: the same numbers as our own models give, and files that load again."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hieratok import HieraTok, TokenizerConfig, cli
from hieratok.data.images import to_float
from hieratok.data.latents import Manifest
from hieratok.generation import diffusion, flow
from hieratok.generation.dit import DiT, DiTConfig, LatentSpace
from hieratok.generation.sampling import guided

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what diffusers imports
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from hieratok.interop import AutoencoderHieraTok, HieraTokDiT, HieraTokPipeline

# diffusers' schedulers turn tensors into arrays in a way that numpy 2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning:diffusers")

TOKENIZER = TokenizerConfig(
    image_size=16, patch_size=4, latent_channels=4, scales=(1, 2, 4), encoder_width=16, encoder_depth=1,
    encoder_heads=2, decoder_width=24, decoder_depth=1, decoder_heads=2, init_std=0.3,
)  # fmt: skip
MEAN, STD = (0.1, -0.2, 0.3, 0.0), (0.5, 1.0, 2.0, 1.5)


@pytest.fixture(scope="module")
def tokenizer() -> HieraTok:
    torch.manual_seed(0)
    model = HieraTok(TOKENIZER).eval()
    model.latent_mean.copy_(torch.tensor(MEAN))
    model.latent_std.copy_(torch.tensor(STD))
    return model


@pytest.fixture(scope="module")
def vae(tokenizer) -> AutoencoderHieraTok:
    return AutoencoderHieraTok.from_hieratok(tokenizer)


def make_dit(objective: str, **changes) -> DiT:
    """One whose prediction depends on everything: DiT's own start would predict zero."""
    settings = dict(latent_channels=4, latent_size=4, width=16, depth=2, heads=2, num_classes=3)
    torch.manual_seed(1)
    model = DiT(DiTConfig(**{**settings, "objective": objective, "learn_sigma": objective == "ddpm", **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.latents = LatentSpace("of another", (0.5, 0.0, -0.5, 1.0), (1.0, 0.5, 2.0, 1.0))
    return model.eval()


def pipeline(vae, objective: str, scheduler, **changes) -> HieraTokPipeline:
    made = HieraTokPipeline(HieraTokDiT.from_hieratok(make_dit(objective, **changes)), vae, scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def photos(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


# --- the autoencoder --------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_equal(vae: AutoencoderHieraTok, tokenizer: HieraTok) -> None:
    images = photos(2, 3, 16, 16)
    posterior, ours = vae.encode(images).latent_dist, tokenizer.encode(images)
    assert torch.equal(posterior.mean, ours.mean)
    assert torch.equal(posterior.logvar, ours.logvar)
    assert torch.equal(posterior.mode(), ours.mode())
    drawn = posterior.sample(torch.Generator().manual_seed(5))
    fresh = torch.randn(ours.mean.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, ours.mean + torch.exp(0.5 * ours.logvar) * fresh)
    assert torch.equal(vae.decode(drawn).sample, tokenizer.decode(drawn))
    assert torch.equal(vae(images).sample, tokenizer.decode(ours.mean))
    assert all(map(torch.equal, vae.decode_pyramid(drawn), tokenizer.decode_pyramid(drawn)))


def test_autoencoder_gives_what_the_tokenizer_gives(vae, tokenizer):
    check_equal(vae, tokenizer)
    assert not vae.training
    assert vae.config.latent_channels == 4
    assert vae.config.decoder_width == 24
    assert vae.config.latents_mean == pytest.approx(MEAN)
    assert vae.config.latents_std == pytest.approx(STD)


def test_autoencoder_survives_its_files(vae, tokenizer, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderHieraTok.from_pretrained(tmp_path)
    check_equal(loaded, tokenizer)
    assert loaded.tokenizer.config == TOKENIZER
    assert {**loaded.config, "scales": (1, 2, 4)}.items() >= TOKENIZER.__dict__.items()
    assert torch.equal(loaded.tokenizer.latent_mean, tokenizer.latent_mean)
    assert torch.equal(loaded.tokenizer.latent_std, tokenizer.latent_std)


def test_autoencoder_from_its_config(vae):
    fresh = AutoencoderHieraTok.from_config(vae.config)
    assert fresh.tokenizer.config == TOKENIZER
    assert fresh.tokenizer.latent_std.tolist() == pytest.approx(STD)
    without = AutoencoderHieraTok(**TOKENIZER.__dict__)
    assert without.config.latents_mean is None
    assert without.tokenizer.latent_mean.isnan().all()


def test_autoencoder_in_half_precision(tokenizer):
    vae = AutoencoderHieraTok(**TOKENIZER.__dict__)
    vae.tokenizer.load_state_dict(tokenizer.state_dict())
    vae.eval().to(torch.bfloat16)
    images = photos(1, 3, 16, 16)
    with torch.no_grad():
        z = vae.encode(images.bfloat16()).latent_dist.mode()
        assert z.dtype == torch.bfloat16
        decoded = vae.decode(z).sample
        assert decoded.dtype == torch.bfloat16
        exact = tokenizer.decode(tokenizer.encode(images).mode())
    assert (decoded - exact).abs().mean() < 0.1 * exact.abs().mean()


# --- the pipeline -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoded(tokenizer: HieraTok, dit: DiT, z: torch.Tensor) -> list[torch.Tensor]:
    """Every scale in [0, 1]."""
    assert dit.latents is not None
    return [(x / 2 + 0.5).clamp(0, 1) for x in tokenizer.decode_pyramid(dit.latents.denormalize(z))]


@torch.no_grad()
def test_flow_agrees_with_our_sampler(vae, tokenizer):
    pipe, dit = pipeline(vae, "flow", FlowMatchEulerDiscreteScheduler(shift=2.0)), make_dit("flow")
    start, y = noise(2, 4, 4, 4), torch.tensor([2, 0])
    predict = guided(dit, 3.0, null_label=3)
    z = flow.sample(predict, start, y, lambda: start, steps=6, shift=1 / 2)
    found = pipe(y, 3.0, 6, latents=start, output_type="pt", all_scales=True)
    expected = decoded(tokenizer, dit, z)
    assert [x.shape[-1] for x in expected] == [4, 8, 16]
    for ours, theirs in zip(expected, found.pyramid, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert torch.equal(found.images, found.pyramid[-1])
    unguided = pipe(y, 1.0, 6, latents=start, output_type="pt").images
    assert (unguided - found.images).abs().max() > 0.01


@torch.no_grad()
def test_ddim_agrees_with_our_sampler(vae, tokenizer):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe, dit = pipeline(vae, "ddpm", scheduler), make_dit("ddpm")
    start, y = noise(2, 4, 4, 4), torch.tensor([1, 2])
    # diffusers' last step ends at abar of training step 0 unless it is set to one, ours always at one
    scheduler.set_timesteps(10)
    schedule = diffusion.LINEAR.subset(scheduler.timesteps.flip(0).tolist())
    z = diffusion.ddim(guided(dit, 2.0, null_label=3), start, y, lambda: start, schedule)
    found = pipe(y, 2.0, 10, latents=start, output_type="pt")
    assert found.pyramid is None
    torch.testing.assert_close(found.images, decoded(tokenizer, dit, z)[-1], atol=1e-3, rtol=0)


@torch.no_grad()
def test_ddpm_draws_with_the_learned_variance(vae, tokenizer):
    """Our ancestral sampler with diffusers' noise: the same, so the learned variance is used alike."""
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    pipe, dit = pipeline(vae, "ddpm", scheduler), make_dit("ddpm")
    start, y = noise(2, 4, 4, 4), torch.tensor([1, 2])
    stream = torch.Generator().manual_seed(9)
    z = diffusion.sample(dit, start, y, lambda: torch.randn(start.shape, generator=stream), steps=8)
    found = pipe(y, 1.0, 8, torch.Generator().manual_seed(9), latents=start, output_type="pt").images
    torch.testing.assert_close(found, decoded(tokenizer, dit, z)[-1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@torch.no_grad()
def test_other_solvers_reach_the_same_latents(vae, tokenizer, scheduler):
    """With many steps all solvers of the probability-flow ODE agree, and so do they with our DDIM."""
    pipe, dit = pipeline(vae, "ddpm", scheduler(timestep_spacing="linspace")), make_dit("ddpm")
    start, y = noise(1, 4, 4, 4), torch.tensor([1])
    z = diffusion.sample(dit, start, y, lambda: start, steps=100, sampler="ddim")
    found = pipe(y, 1.0, 50, latents=start, output_type="pt").images
    assert (found - decoded(tokenizer, dit, z)[-1]).abs().mean() < 0.01


def test_an_image_depends_on_its_own_generator_alone(vae):
    pipe = pipeline(vae, "ddpm", DDPMScheduler(variance_type="learned_range", clip_sample=False))

    def images(*seeds: int) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe([1] * len(seeds), 2.0, 4, generators, output_type="np").images

    together = images(5, 6)
    assert together.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(images(6)[0], together[1], atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_pil_images(vae):
    pipe = pipeline(vae, "flow", FlowMatchEulerDiscreteScheduler())
    start = noise(2, 4, 4, 4)
    images, pyramid = pipe([0, 1], num_inference_steps=2, latents=start, all_scales=True, return_dict=False)
    array = pipe([0, 1], num_inference_steps=2, latents=start, output_type="np").images
    assert [image.size for image in images] == [(16, 16)] * 2
    assert [scale[0].size for scale in pyramid] == [(4, 4), (8, 8), (16, 16)]
    assert np.abs(np.asarray(images[1], dtype=float) - 255 * array[1]).max() <= 1


def test_pipeline_survives_its_files(vae, tmp_path):
    pipe = pipeline(vae, "flow", FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.save_pretrained(tmp_path)
    loaded = HieraTokPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.dit.config == pipe.transformer.dit.config
    assert loaded.transformer.dit.latents == pipe.transformer.dit.latents
    settings = dict(num_inference_steps=3, latents=noise(1, 4, 4, 4), output_type="np")
    found, expected = (one([1], 2.0, **settings).images for one in (loaded, pipe))
    np.testing.assert_allclose(found, expected, atol=1e-6)  # weights that lie elsewhere in memory round differently


@torch.no_grad()
def test_latents_are_denormalised_by_the_autoencoder_if_the_generator_is_silent(vae, tokenizer):
    pipe = pipeline(vae, "flow", FlowMatchEulerDiscreteScheduler())
    pipe.transformer.dit.latents = None
    start = noise(1, 4, 4, 4)
    z = flow.sample(pipe.transformer.dit, start, torch.tensor([1]), lambda: start, steps=3)
    expected = (tokenizer.decode(tokenizer.denormalize(z)) / 2 + 0.5).clamp(0, 1)
    found = pipe([1], num_inference_steps=3, latents=start, output_type="pt").images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    pipe.vae = AutoencoderHieraTok(**TOKENIZER.__dict__).eval()
    with pytest.raises(ValueError, match="has statistics of latents"):
        pipe([1], num_inference_steps=3)


def test_latents_of_an_autoencoder_of_diffusers():
    torch.manual_seed(0)
    kl = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    pipe = pipeline(kl, "flow", FlowMatchEulerDiscreteScheduler())
    assert pipe([0], num_inference_steps=2, output_type="np").images.shape == (1, 4, 4, 3)
    with pytest.raises(ValueError, match="AutoencoderKL has one scale"):
        pipe([0], all_scales=True)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "scheduler", "message"),
    [
        ("ddpm", FlowMatchEulerDiscreteScheduler(), "of objective ddpm, which needs epsilon: use DDIMScheduler"),
        ("flow", DDIMScheduler(clip_sample=False), "which needs flow_prediction: use FlowMatchEuler"),
        ("ddpm", DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), "prediction type v_prediction"),
        ("ddpm", DDIMScheduler(), "set clip_sample=False"),
        ("ddpm", DDPMScheduler(clip_sample=False, thresholding=True), "set thresholding=False"),
        ("ddpm", DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear"), "another noise schedule"),
        ("ddpm", DDIMScheduler(100, clip_sample=False), "another noise schedule"),
        ("ddpm", DPMSolverMultistepScheduler(variance_type="learned_range"), "only DDPMScheduler"),
        ("ddpm", DDPMScheduler(variance_type="learned", clip_sample=False), "variance_type 'learned'"),
    ],
)
def test_schedulers_that_do_not_fit(vae, objective, scheduler, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(vae, objective, scheduler)
    assert "\n" not in str(error.value)


def test_a_scheduler_put_in_later_is_checked_too(vae):
    pipe = pipeline(vae, "flow", FlowMatchEulerDiscreteScheduler())
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    with pytest.raises(ValueError, match="DDIMScheduler with prediction type epsilon does not fit"):
        pipe([0])


def test_a_variance_that_was_not_learned(vae):
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    with pytest.raises(ValueError, match="learned one"):
        pipeline(vae, "ddpm", scheduler, learn_sigma=False)


def test_calls_that_do_not_fit(vae):
    pipe = pipeline(vae, "flow", FlowMatchEulerDiscreteScheduler())
    bad = [
        (dict(class_labels=[0, 3]), "label 3 is out of range: the generator knows 0 .. 2"),
        (dict(class_labels=[]), "it is empty"),
        (dict(class_labels=[0], output_type="jpeg"), "output_type must be one of pil, np, pt"),
        (dict(class_labels=[0], latents=torch.zeros(2, 4, 4, 4)), r"latents must have shape \(1, 4, 4, 4\)"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            pipe(**call)
    undropped = pipeline(vae, "flow", FlowMatchEulerDiscreteScheduler(), label_dropout=0.0)
    with pytest.raises(ValueError, match="guidance_scale must be 1"):
        undropped([0], 2.0)
    with pytest.raises(ValueError, match="latents of 8 channels, but the autoencoder takes 4"):
        pipeline(vae, "flow", FlowMatchEulerDiscreteScheduler(), latent_channels=8)


def test_the_package_does_not_import_diffusers():
    code = (
        "import sys, hieratok.tokenizer.pretrained, hieratok; hieratok.HieraTok; assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- generators of other tokenizers' latents --------------------------------------------------------------------------


def save_kl(folder: Path, seed: int = 0) -> AutoencoderKL:
    """f2, of 16 px."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    return model


def save_dc(folder: Path) -> AutoencoderDC:
    """f2, deterministic, of no size."""
    torch.manual_seed(0)
    model = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    return model


@pytest.fixture
def workplace(tmp_path, monkeypatch, capsys):
    """`hieratok ...` in a folder with six photos of two classes: exit status and the last line on standard error."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        path = tmp_path / "photos" / ("cat" if i < 3 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = cli.main([*map(str, arguments)])
        return status, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return call


TRAIN = [
    *("--model.width", 16, "--model.depth", 1, "--model.heads", 2, "--model.latent_channels", 4),
    *("--model.latent_size", 8, "--model.num_classes", 2, "--train.steps", 2, "--train.batch_size", 2),
    *("--train.picture_every", 2, "--data.num_workers", 0),
]


def test_a_generator_of_another_tokenizers_latents(workplace, tmp_path):
    model = save_kl(tmp_path / "sd")
    assert workplace("latents", "sd", "--data", "photos", "--out", "cache", "--device", "cpu")[0] == 0
    manifest = Manifest.read("cache")
    assert manifest.shape == (4, 8, 8)
    assert manifest.tokenizer["config"]["_class_name"] == "AutoencoderKL"
    with Image.open("photos/cat/0.png") as file:
        picture = torch.from_numpy(np.array(file)).permute(2, 0, 1)
    with torch.no_grad():
        expected = model.encode(to_float(torch.stack((picture, picture.flip(-1))))).latent_dist
    for name in ("mean", "logvar"):
        stored = torch.from_numpy(np.load(f"cache/shard-00000/{name}.npy")[0])
        torch.testing.assert_close(stored, getattr(expected, name), rtol=1e-4, atol=1e-5)

    train = ["train", "dit-tiny", "--tokenizer", "sd", "--data", "cache", "--out", "run", *TRAIN]
    assert workplace(*train)[0] == 0
    dit = DiT.from_pretrained("run")
    assert dit.latents is not None
    assert dit.latents.encoder_sha256 == manifest.tokenizer["encoder_sha256"]
    assert list(Path("run").rglob("*.png"))  # decoded on the way

    draw = ["sample", "run", "--tokenizer", "sd", "--out", "drawn", "--num", 3, "--sampler", "euler", "--steps", 2]
    assert workplace(*draw, "--device", "cpu")[0] == 0
    assert len(list(Path("drawn/16px").glob("*.png"))) == 3

    save_kl(tmp_path / "other", seed=1)
    status, error = workplace(*draw[:3], "other", "--out", "no", *draw[6:])
    assert status == 2
    assert "trained on latents of another tokenizer, sd, than other" in error
    status, error = workplace(*train[:3], "other", "--data", "cache", "--out", "no", *TRAIN)
    assert status == 2
    assert "cache holds latents of another tokenizer, sd" in error
    status, error = workplace(*train[:3], "sd", "--data", "photos", "--out", "no", *TRAIN)
    assert status == 2
    assert "from a folder of its latents: hieratok latents sd --data photos --out DIR" in error


def test_quantisation_layers_belong_to_the_encoder(tmp_path):
    """AutoencoderKL's last convolution decides the latents too; its decoder does not."""
    from hieratok.tokenizer.pretrained import load_tokenizer

    def changed(name: str) -> str:
        model = save_kl(tmp_path / name)
        with torch.no_grad():
            if name != "nothing":
                getattr(model, name).weight.add_(1)
        model.save_pretrained(tmp_path / name)
        return load_tokenizer(str(tmp_path / name)).encoder_sha256

    assert changed("post_quant_conv") == changed("nothing") != changed("quant_conv")


def test_a_deterministic_autoencoder(workplace, tmp_path):
    model = save_dc(tmp_path / "dc")
    status, error = workplace("latents", "dc", "--data", "photos", "--out", "cache")
    assert status == 2
    assert "this AutoencoderDC does not say how large its images are: give --size" in error
    assert "multiple of 2" in workplace("latents", "dc", "--data", "photos", "--out", "cache", "--size", 15)[1]
    assert workplace("latents", "dc", "--data", "photos", "--out", "cache", "--size", 16, "--device", "cpu")[0] == 0
    with Image.open("photos/dog/5.png") as file, torch.no_grad():
        z = model.encode(to_float(torch.from_numpy(np.array(file)).permute(2, 0, 1)[None])).latent
    stored = torch.from_numpy(np.load("cache/shard-00000/mean.npy")[5, :1])
    torch.testing.assert_close(stored, z, rtol=1e-4, atol=1e-5)
    assert np.load("cache/shard-00000/logvar.npy").max() == -30
    assert workplace("train", "dit-tiny", "--tokenizer", "dc", "--data", "cache", "--out", "run", *TRAIN)[0] == 0


def test_folders_that_cannot_be_used(workplace, tmp_path, tokenizer):
    save_kl(tmp_path / "sd")
    status, error = workplace("latents", "sd", "--data", "photos", "--stats-only", "--device", "cpu")
    assert status == 2
    assert "--stats-only is for our tokenizers" in error
    shutil.copytree("sd", "damaged")
    Path("damaged/diffusion_pytorch_model.safetensors").unlink()
    status, error = workplace("latents", "damaged", "--data", "photos", "--out", "cache")
    assert status == 2
    assert "damaged/diffusion_pytorch_model.safetensors does not exist" in error
    shutil.copy("sd/config.json", "damaged/diffusion_pytorch_model.safetensors")
    status, error = workplace("latents", "damaged", "--data", "photos", "--out", "cache")
    assert status == 2
    assert "damaged cannot be loaded as AutoencoderKL" in error
    tokenizer.save_pretrained("ours")
    status, error = workplace("latents", "ours", "--data", "photos", "--out", "cache", "--size", 32)
    assert status == 2
    assert "ours was trained on images of 16 px, not 32" in error
