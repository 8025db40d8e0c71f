"""Previews in pipelines of diffusers: with schedulers whose steps are known, the estimate is exact."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.frozen import on_autoencoder, save_autoencoder
from helpers.models import save_generator, save_tokenizer
from hieratok import HieraTok
from hieratok.interop import AutoencoderHieraTok, HieraTokDiT, HieraTokPipeline, HieraTokPreview
from hieratok.interop.preview import image_estimate, level

diffusers = pytest.importorskip("diffusers")
pytestmark = [  # of what diffusers does with numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

ODE = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddim, v": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "ddim, last": lambda: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler, karras": lambda: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=1, algorithm_type="dpmsolver++"),
    "dpm, flow": lambda: diffusers.DPMSolverMultistepScheduler(
        solver_order=1, use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(solver_order=1, disable_corrector=list(range(50))),
}


def predict(scheduler: Any, x: torch.Tensor, image: torch.Tensor, step: int) -> torch.Tensor:
    """What a network says that sees through the noise to `image`."""
    alpha, sigma = level(scheduler, step)
    noise = (x - alpha * image) / sigma
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * image, "flow_prediction": noise - image}[kind]


@pytest.mark.parametrize("name", ODE)
def test_the_estimate_is_the_image_that_the_network_predicts(name):
    """In every step another one."""
    scheduler = ODE[name]()
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for i, t in enumerate(scheduler.timesteps):
        image = torch.randn(2, 4, 8, 8, generator=generator)
        scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else None
        following = scheduler.step(predict(scheduler, x, image, i), t, x).prev_sample
        if (i < 7 and name != "unipc") or i == 0:
            torch.testing.assert_close(image_estimate(scheduler, i, x, following), image, rtol=2e-3, atol=2e-3)
        x = following


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_random_steps_are_refused_with_a_way_out(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=f"{name} adds noise in every step.* denoised=False"):
        image_estimate(scheduler, 1, x, x)


@pytest.fixture
def tokenizer(tmp_path) -> HieraTok:
    torch.manual_seed(0)
    return HieraTok(on_autoencoder(save_autoencoder(tmp_path / "vae"))).eval()


def generate(scheduler: Any, preview: HieraTokPreview, image: torch.Tensor, steps: int, **pipeline: Any) -> None:
    """The loop that all of diffusers' pipelines have."""
    scheduler.set_timesteps(steps)
    pipe = SimpleNamespace(scheduler=scheduler, **pipeline)
    x = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(scheduler, x, image, i), t, x).prev_sample
        returned = preview(pipe, i, t, {"latents": x})
        assert returned == {}


def test_previews_show_the_image_from_early_on(tokenizer):
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    preview = HieraTokPreview(tokenizer, pixels=16, every=3, show=lambda p: seen.append(p.step))
    generate(ODE["ddim"](), preview, image, 10)
    assert [p.step for p in preview.images] == seen == [2, 5, 8, 9]
    with torch.inference_mode():
        expected = tokenizer.postprocess(tokenizer.decode(image, 2))
    for p in preview.images:
        assert len(p.pictures) == 2
        assert p.pictures[0].size == (16, 16)
        assert p.milliseconds > 0
        for found, wanted in zip(p.pictures, expected):
            difference = torch.tensor(list(found.tobytes())).int() - torch.tensor(list(wanted.tobytes())).int()
            assert difference.abs().max() <= 1


def test_noisy_latents_are_decoded_as_they_are(tokenizer):
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = HieraTokPreview(tokenizer, pixels=8, every=1, denoised=False)
    clean = HieraTokPreview(tokenizer, pixels=8, every=1)
    generate(ODE["ddim"](), plain, image, 4)
    generate(ODE["ddim"](), clean, image, 4)
    assert [p.step for p in plain.images] == [0, 1, 2, 3]
    assert [p.step for p in clean.images] == [1, 2, 3]
    assert plain.images[1].pictures[0].tobytes() != clean.images[0].pictures[0].tobytes()
    assert plain.images[-1].pictures[0].tobytes() == clean.images[-1].pictures[0].tobytes()


def test_normalised_and_packed_latents(tokenizer):
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    space = SimpleNamespace(denormalize=lambda z: 2 * z + 1)
    ours = HieraTokPreview(tokenizer, every=9)
    generate(ODE["flow"](), ours, (image - 1) / 2, 4, latent_space=lambda: space)
    packed = HieraTokPreview(tokenizer, every=9, unpack=lambda z: z.unflatten(1, (4, 8)))
    generate(ODE["flow"](), packed, image.flatten(1, 2), 4)
    plain = HieraTokPreview(tokenizer, every=9)
    generate(ODE["flow"](), plain, image, 4)
    pictures = [torch.tensor(list(p.images[-1].pictures[0].tobytes())).int() for p in (ours, packed, plain)]
    assert (pictures[0] - pictures[2]).abs().max() <= 1
    assert (pictures[1] - pictures[2]).abs().max() <= 1


def test_other_latents_are_refused_in_one_line(tokenizer):
    preview = HieraTokPreview(tokenizer, every=1)
    with pytest.raises(ValueError, match=r"latents are .* and the preview's tokenizer has 4 channels"):
        generate(ODE["flow"](), preview, torch.zeros(1, 3, 8, 8), 2)
    with pytest.raises(ValueError, match="every and pixels must be at least 1"):
        HieraTokPreview(tokenizer, every=0)


def test_pixels_choose_the_scale(tokenizer):
    assert [HieraTokPreview(tokenizer, pixels=p).scale for p in (1, 4, 5, 32, 4096)] == [0, 0, 1, 3, 3]


def test_a_pipeline_of_diffusers_calls_it(tokenizer):
    """Kandinsky 2.2's decoder, small, with random weights: the one of diffusers' that needs no text encoder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = diffusers.VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline

    pipeline = KandinskyV22Pipeline(unet, ODE["ddim"](), movq)
    pipeline.set_progress_bar_config(disable=True)
    preview = HieraTokPreview(tokenizer, pixels=16, every=2)
    options: Any = dict(height=64, width=64, num_inference_steps=6, guidance_scale=1.0, output_type="np")
    embeds = torch.randn(1, 32)
    again = torch.Generator().manual_seed(0)
    images = pipeline(embeds, embeds, **options, generator=again, callback_on_step_end=preview).images
    assert [p.step for p in preview.images] == [1, 3, 5]
    side = preview.images[0].pictures[0].size[0]
    assert side >= 16
    unwatched = pipeline(embeds, embeds, **options, generator=again.manual_seed(0)).images
    assert (images == unwatched).all()


def test_a_pipeline_of_ours_calls_it(tmp_path):
    run, generator = save_tokenizer(tmp_path / "run"), tmp_path / "generator"
    save_generator(generator, run)
    pipeline = HieraTokPipeline(
        HieraTokDiT.from_pretrained(generator), AutoencoderHieraTok.from_pretrained(run), ODE["flow"]()
    )
    pipeline.set_progress_bar_config(disable=True)
    preview = HieraTokPreview(HieraTok.from_pretrained(run), pixels=16, every=4)
    noise = torch.Generator().manual_seed(0)
    images = pipeline([0, 1], num_inference_steps=4, generator=noise, callback_on_step_end=preview).images
    for found, wanted in zip(preview.images[-1].pictures, images, strict=True):
        difference = torch.tensor(list(found.tobytes())).int() - torch.tensor(list(wanted.tobytes())).int()
        assert difference.abs().max() <= 1
