"""Guidance, labels, and samples that depend on seed and index alone."""

import numpy as np
import pytest
import torch

from hieratok.generation import sampling
from hieratok.generation.dit import DiT, DiTConfig
from hieratok.generation.sampling import ImageNoise, SampleConfig, class_labels, guided, sample_latents

CPU = torch.device("cpu")
EVERY_SAMPLER = ("ddpm", "ddim", "euler", "heun", "sde")


def small_model(sampler: str = "ddpm", **changes) -> DiT:
    """A DiT that the sampler fits, with weights that do something."""
    objective = SampleConfig(sampler=sampler, steps=2).objective
    settings = dict(latent_channels=4, latent_size=4, width=32, depth=2, heads=2, num_classes=5)
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**settings, "objective": objective, "learn_sigma": objective == "ddpm", **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def options(sampler: str, **changes) -> SampleConfig:
    extra = {"ddim": dict(eta=0.5), "euler": dict(time_shift=0.5)}.get(sampler, {})
    return SampleConfig(**{**dict(sampler=sampler, steps=5, cfg=2.0, num=8), **extra, **changes})


def all_latents(model: DiT, config: SampleConfig, indices=None) -> dict[int, torch.Tensor]:
    return {i: z for batch in sample_latents(model, config, indices) for i, z in zip(batch.indices, batch.latents)}


# --- noise belongs to an image ---------------------------------------------------------------------------------------


def test_noise_is_bit_equal_in_every_batch():
    """Images 0 .. 7 together, alone, and in another order: the first draw and every later one."""
    together = ImageNoise(3, range(8), (4, 4, 4), CPU)
    backwards = ImageNoise(3, range(7, -1, -1), (4, 4, 4), CPU)
    alone = [ImageNoise(3, [i], (4, 4, 4), CPU) for i in range(8)]
    for _ in range(3):
        noise = together()
        assert noise.dtype == torch.float32
        assert torch.equal(noise, torch.cat([draw() for draw in alone]))
        assert torch.equal(noise.flip(0), backwards())


def test_noise_is_standard_normal_and_unrelated_between_images_seeds_and_draws():
    draws = [ImageNoise(seed, [i], (4, 50, 50), CPU) for seed in (0, 1) for i in (0, 1)]
    noise = torch.cat([draw() for draw in draws] + [draw() for draw in draws]).flatten(1)
    correlation = np.corrcoef(noise.numpy())
    assert np.abs(correlation - np.eye(8)).max() < 0.05
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02


@pytest.mark.parametrize("sampler", EVERY_SAMPLER)
def test_samples_do_not_depend_on_the_batch(sampler):
    """Batches of 8, of 1 and of 3, two processes' shares, and what an interrupted job left."""
    model = small_model(sampler)
    whole = all_latents(model, options(sampler, batch_size=8))
    assert list(whole) == list(range(8))
    parts = [
        all_latents(model, options(sampler, batch_size=1)),
        all_latents(model, options(sampler, batch_size=3)),
        {
            **all_latents(model, options(sampler), range(0, 8, 2)),
            **all_latents(model, options(sampler), range(1, 8, 2)),
        },
        all_latents(model, options(sampler, num=100), [6, 2]),
    ]
    size = max(float(z.abs().max()) for z in whole.values())
    for part in parts:
        for i, z in part.items():
            torch.testing.assert_close(z, whole[i], rtol=0, atol=1e-4 * size)
    assert (whole[0] - whole[5]).abs().max() > 0.01 * size
    other = all_latents(model, options(sampler, seed=1))
    assert (whole[0] - other[0]).abs().max() > 0.01 * size


def test_noise_does_not_depend_on_labels_or_guidance():
    """With a model that predicts nothing, the same noise gives the same latents whatever the labels."""
    model = small_model()
    torch.nn.init.zeros_(model.final_layer.linear.weight)
    torch.nn.init.zeros_(model.final_layer.linear.bias)
    balanced = all_latents(model, options("ddpm", labels="balanced", cfg=1.0))
    random = all_latents(model, options("ddpm", labels="random", cfg=3.0))
    for i in balanced:
        torch.testing.assert_close(balanced[i], random[i])


def test_batches_tell_indices_and_labels():
    batches = list(sample_latents(small_model(), options("ddim", num=5, batch_size=2, labels=(3, 1))))
    assert [b.indices for b in batches] == [[0, 1], [2, 3], [4]]
    assert torch.cat([b.labels for b in batches]).tolist() == [3, 1, 3, 1, 3]
    assert [tuple(b.latents.shape) for b in batches] == [(2, 4, 4, 4), (2, 4, 4, 4), (1, 4, 4, 4)]
    assert all(torch.isfinite(b.latents).all() for b in batches)


# --- guidance --------------------------------------------------------------------------------------------------------


class Recorder:
    """A model of 2 d outputs that depend on the label, and the inputs of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((x, t, y))
        label = y.view(-1, 1, 1, 1).to(x.dtype)
        return torch.cat((x * (1 + label), x - label), 1)


def test_guidance_over_all_channels_in_one_batch():
    model, x = Recorder(), torch.randn(3, 6, 2, 2)
    t, y = torch.tensor([7, 7, 7]), torch.tensor([0, 1, 2])
    output = guided(model, 4.0, null_label=9)(x, t, y)
    (conditional, unconditional) = (Recorder()(x, t, y), Recorder()(x, t, torch.full((3,), 9)))
    torch.testing.assert_close(output[:, :6], unconditional[:, :6] + 4 * (conditional - unconditional)[:, :6])
    assert torch.equal(output[:, 6:], conditional[:, 6:])  # the variance is the conditional one
    ((both, times, labels),) = model.calls
    assert torch.equal(both, torch.cat((x, x)))
    assert times.tolist() == [7] * 6
    assert labels.tolist() == [0, 1, 2, 9, 9, 9]


@pytest.mark.parametrize("learned_variance", [True, False])
def test_legacy_guidance_of_three_channels(learned_variance):
    def model(x, t, y):
        return Recorder()(x, t, y)[:, : 12 if learned_variance else 6]

    x, t, y = torch.randn(2, 6, 2, 2), torch.tensor([7, 7]), torch.tensor([0, 1])
    legacy = guided(model, 4.0, null_label=9, channels=3)(x, t, y)
    full = guided(model, 4.0, null_label=9)(x, t, y)
    assert legacy.shape == full.shape
    torch.testing.assert_close(legacy[:, :3], full[:, :3])
    assert torch.equal(legacy[:, 3:], model(x, t, y)[:, 3:])
    assert not torch.allclose(legacy[:, 3:6], full[:, 3:6])


def test_guidance_weight_1_is_the_model_itself():
    model = Recorder()
    assert guided(model, 1.0, null_label=9, interval=(0, 1), channels=3) is model


@pytest.mark.parametrize("sampler", EVERY_SAMPLER)
def test_cfg_1_equals_no_guidance(sampler):
    """Bit for bit, and with half the work of a guided pass."""
    model = small_model(sampler)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    plain = all_latents(model, options(sampler, cfg=1.0, labels="balanced"))
    assert set(sizes) == {8}
    y, draw = torch.arange(8) % 5, ImageNoise(0, range(8), (4, 4, 4), CPU)
    config = options(sampler)
    with torch.inference_mode():
        if config.objective == "ddpm":
            direct = sampling.diffusion.sample(model, draw(), y, draw, 5, sampler, config.eta)
        else:
            direct = sampling.flow.sample(model, draw(), y, draw, 5, sampler, config.time_shift or 1.0)
    assert torch.equal(torch.stack(list(plain.values())), direct)
    sizes.clear()
    strong = all_latents(model, options(sampler, cfg=3.0, labels="balanced"))
    assert set(sizes) == {16}
    assert any(not torch.allclose(strong[i], plain[i], rtol=1e-3) for i in plain)


def test_guidance_within_an_interval_alone():
    x, y = torch.randn(2, 6, 2, 2), torch.tensor([0, 1])
    for time, is_guided in ((0.1, False), (0.25, True), (0.4, True), (0.5, True), (0.6, False)):
        model, t = Recorder(), torch.full((2,), time)
        output = guided(model, 4.0, null_label=9, interval=(0.25, 0.5))(x, t, y)
        assert len(model.calls) == 1
        assert len(model.calls[0][0]) == (4 if is_guided else 2)
        expected = guided(Recorder(), 4.0 if is_guided else 1.0, null_label=9)(x, t, y)
        assert torch.equal(output, expected)


@pytest.mark.parametrize(("sampler", "interval"), [("ddpm", (0, 500)), ("euler", (0.5, 1.0))])
def test_interval_is_in_the_processes_own_time(sampler, interval):
    """Five steps: DDPM's at 999, 749, 500, 250, 0; the flow's at 0, 0.2, ..., 0.8."""
    model = small_model(sampler)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    all_latents(model, options(sampler, cfg_interval=interval, time_shift=1.0))
    assert sizes == ([8, 8, 16, 16, 16] if sampler == "ddpm" else [8, 8, 8, 16, 16])


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels():
    assert class_labels("balanced", range(7), 3, seed=0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert class_labels((4, 2), [0, 1, 2, 5], 5, seed=0).tolist() == [4, 2, 4, 2]
    random = class_labels("random", range(4000), 4, seed=0)
    assert random.dtype == torch.long
    assert random.bincount().tolist() == pytest.approx([1000] * 4, abs=130)
    assert class_labels("random", [17, 3], 4, seed=0).tolist() == random[[17, 3]].tolist()
    assert class_labels("random", range(4000), 4, seed=1).tolist() != random.tolist()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sampler="dpm"), "sampler must be one of ddpm, ddim, euler, heun, sde, not 'dpm'"),
        (dict(steps=0), "steps must be at least 1"),
        (dict(sampler="ddpm", steps=1001), "steps must be at most 1000 for sampler ddpm"),
        (dict(num=0), "num must be at least 1"),
        (dict(batch_size=-2), "batch_size must be at least 1"),
        (dict(cfg=-1.0), "cfg must be a number of at least 0, not -1.0"),
        (dict(cfg=float("nan")), "cfg must be a number of at least 0, not nan"),
        (dict(cfg_interval=(500, 100)), r"cfg_interval must be two times, the lower first, not \[500, 100\]"),
        (dict(cfg_interval=[1]), "cfg_interval must be two times"),
        (dict(sampler="euler", time_shift=0.0), "time_shift must be positive"),
        (dict(sampler="ddpm", time_shift=0.5), "time_shift is for the samplers heun, euler, sde, not ddpm"),
        (dict(sampler="ddim", eta=1.5), r"eta must be in \[0, 1\]"),
        (dict(sampler="ddpm", eta=0.5), "eta is for the sampler ddim, not ddpm"),
        (dict(seed=-1), "seed must not be negative"),
        (dict(labels="all"), "labels must be balanced, random or a list of classes, not 'all'"),
        (dict(labels=()), "labels must not be an empty list"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        SampleConfig(**settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            dict(),
            dict(sampler="heun"),
            "sampler heun does not fit a generator trained with objective ddpm: use ddpm or ddim",
        ),
        (
            dict(objective="flow", learn_sigma=False),
            dict(sampler="ddpm"),
            "sampler ddpm does not fit a generator trained with objective flow: use heun or euler or sde",
        ),
        (dict(), dict(labels=(1, 5)), r"label 5 is out of range: the generator knows 0 \.\. 4"),
        (dict(), dict(labels=[-1]), "label -1 is out of range"),
        (dict(label_dropout=0.0), dict(cfg=2.0), "cfg must be 1: the generator was trained without label dropout"),
    ],
)
def test_settings_that_do_not_fit_the_generator(model, settings, message):
    with pytest.raises(ValueError, match=message):
        next(sample_latents(small_model(**model), SampleConfig(**settings)))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"in training mode, where it drops labels: call \.eval\(\) first"):
        next(sample_latents(small_model().train(), SampleConfig()))


def test_options_read_from_a_command_line():
    from hieratok.settings import load_options

    arguments = ["--sampler", "euler", "--labels", "[1,2]", "--cfg_interval", "[0.2,0.8]", "--legacy_cfg"]
    config = load_options(SampleConfig, [], "hieratok sample", arguments)
    assert config == SampleConfig(sampler="euler", labels=(1, 2), cfg_interval=(0.2, 0.8), legacy_cfg=True)
