"""The DDPM process against Bayes' rule, integrals and known solutions in float64, and against diffusers' schedulers."""

import functools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from hieratok.generation import diffusion
from hieratok.generation.diffusion import LINEAR

MEAN, STD = 0.7, 0.4  # of the Gaussian "data" whose noise is known exactly
NO_CLASS = torch.zeros(0)


def shaped(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


@functools.cache
def training_tables() -> tuple[np.ndarray, np.ndarray]:
    """beta_t and abar_t from their definitions."""
    betas = np.array([1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)])
    return betas, np.array([np.prod(1 - betas[: t + 1]) for t in range(1000)])


def gaussian_noise(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """E[noise | x_t] for data N(MEAN, STD^2): regression of one Gaussian on another."""
    abar = torch.from_numpy(training_tables()[1])[t].view(-1, 1, 1, 1)
    return (1 - abar).sqrt() * (x - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar)


def with_variance(predict, interpolation: float):
    def model(x, t, y):
        noise = predict(x, t, y)
        return torch.cat((noise, torch.full_like(noise, interpolation)), 1)

    return model


def never() -> torch.Tensor:
    raise AssertionError("no noise should be drawn")


def normals(shape, seed: int = 3):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_training_schedule():
    betas, abar = training_tables()
    assert len(LINEAR) == 1000
    assert LINEAR.betas.dtype == torch.float64
    np.testing.assert_allclose(LINEAR.betas, betas, rtol=1e-12)
    np.testing.assert_allclose(LINEAR.abar, abar, rtol=1e-10)
    assert LINEAR.timesteps.tolist() == list(range(1000))


def bayes(schedule: diffusion.Schedule, i: int, x0: float, x_i: float) -> tuple[float, float]:
    """Mean and variance of q(x_{i-1} | x_i, x_0): precision-weighted product of two normals."""
    keep = float(schedule.abar[i] / schedule.abar[i - 1])  # of the variance, from i - 1 to i
    before = float(schedule.abar[i - 1])
    precision = 1 / (1 - before) + keep / (1 - keep)
    return (math.sqrt(before) * x0 / (1 - before) + math.sqrt(keep) * x_i / (1 - keep)) / precision, 1 / precision


@pytest.mark.parametrize("schedule", [LINEAR, LINEAR.respaced(250), LINEAR.respaced(7)], ids=len)
def test_posterior_is_bayes_rule(schedule):
    for i in {1, 2, len(schedule) // 2, len(schedule) - 1}:
        mean, variance = bayes(schedule, i, x0=0.8, x_i=-1.3)
        ours = schedule.posterior_mean(shaped([0.8]), shaped([-1.3]), torch.tensor([i]))
        assert float(ours) == pytest.approx(mean, rel=1e-9)
        assert float(schedule.posterior_variance[i]) == pytest.approx(variance, rel=1e-9)
        assert float(schedule.posterior_logvar[i]) == pytest.approx(math.log(variance), rel=1e-9)
    # the first step leads to the data itself
    assert float(schedule.posterior_mean(shaped([0.8]), shaped([-1.3]), torch.tensor([0]))) == pytest.approx(0.8)
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_logvar[0] == schedule.posterior_logvar[1]


def test_noising_and_its_inverse():
    abar = training_tables()[1]
    x, noise = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0, 1, 250, 700, 999])
    x_t = LINEAR.noisy(x, noise, t)
    expected = shaped(np.sqrt(abar[t])) * x + shaped(np.sqrt(1 - abar[t])) * noise
    torch.testing.assert_close(x_t, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(LINEAR.data(x_t, noise, t), x, rtol=1e-8, atol=1e-8)
    assert LINEAR.noisy(x.float(), noise.float(), t).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 7, 250, 1000])
def test_respaced_schedule_is_consistent(steps):
    schedule = LINEAR.respaced(steps)
    times = schedule.timesteps.tolist()
    assert len(schedule) == len(set(times)) == steps
    assert times == sorted(times)
    assert times[-1] == 999
    assert steps == 1 or times[0] == 0
    torch.testing.assert_close(schedule.abar, LINEAR.abar[times], rtol=1e-10, atol=0)
    before = -1
    for beta, t in zip(schedule.betas, times):  # a step keeps what the steps that it stands for kept
        assert float(1 - beta) == pytest.approx(float(torch.prod(1 - LINEAR.betas[before + 1 : t + 1])), rel=1e-9)
        before = t


def test_250_steps_as_in_dit():
    """The published spacing: multiples of 999 / 249, rounded."""
    assert LINEAR.respaced(250).timesteps.tolist() == [round(i * 999 / 249) for i in range(250)]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=f"steps must be between 1 and 1000, not {steps}"):
        diffusion.sample(gaussian_noise, torch.zeros(1, 1, 1, 1), NO_CLASS, never, steps)


def test_learned_variance_lies_between_posterior_and_beta():
    t = torch.tensor([1, 400, 999])
    x = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    beta, posterior = shaped(LINEAR.betas[t]), shaped(LINEAR.posterior_variance[t])
    for interpolation, expected in ((-1.0, posterior), (1.0, beta), (0.0, (beta * posterior).sqrt())):
        torch.testing.assert_close(LINEAR.logvar(x + interpolation, x, t).exp(), expected)
    torch.testing.assert_close(LINEAR.logvar(None, x, t).exp(), beta)


# --- the loss --------------------------------------------------------------------------------------------------------


def loss_case(t: list[int]) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x, noise, predicted, interpolation = torch.randn(4, len(t), 3, 4, 4, generator=g, dtype=torch.float64)
    predicted = noise + 0.1 * predicted
    return x, noise, predicted, 0.5 * interpolation, torch.tensor(t)


def test_loss_terms_against_normal_distributions():
    x, noise, predicted, interpolation, t = loss_case([1, 2, 500, 999])
    betas, abar = training_tables()
    terms = diffusion.loss_terms(lambda x, t, y: torch.cat((predicted, interpolation), 1), x, NO_CLASS, t, noise)
    torch.testing.assert_close(terms["mse"], ((predicted - noise) ** 2).mean((1, 2, 3)))
    for n, step in enumerate(t.tolist()):
        x_t = math.sqrt(abar[step]) * x[n] + math.sqrt(1 - abar[step]) * noise[n]
        predicted_data = (x_t - math.sqrt(1 - abar[step]) * predicted[n]) / math.sqrt(abar[step])
        variance = betas[step] * (1 - abar[step - 1]) / (1 - abar[step])
        share = (interpolation[n] + 1) / 2
        learned = torch.exp(share * math.log(betas[step]) + (1 - share) * math.log(variance))

        def mean(data, x_t=x_t, step=step):
            return (
                math.sqrt(abar[step - 1]) * betas[step] * data + math.sqrt(1 - betas[step]) * (1 - abar[step - 1]) * x_t
            ) / (1 - abar[step])

        true = Normal(mean(x[n]), math.sqrt(variance))
        kl = kl_divergence(true, Normal(mean(predicted_data), learned.sqrt()))
        torch.testing.assert_close(terms["vb"][n], kl.mean() / math.log(2), rtol=1e-6, atol=1e-9)


def test_first_steps_term_is_the_likelihood_of_a_level():
    """At t = 0: the normal's density integrated over x's level of 256 in [-1, 1], the outermost to infinity."""
    _, noise, predicted, interpolation, t = loss_case([0])
    x = torch.linspace(-1.2, 1.2, 48, dtype=torch.float64).view(1, 3, 4, 4)
    betas, abar = training_tables()
    terms = diffusion.loss_terms(lambda *_: torch.cat((predicted, interpolation), 1), x, NO_CLASS, t, noise)
    x_0 = math.sqrt(abar[0]) * x + math.sqrt(1 - abar[0]) * noise
    mean = (x_0 - math.sqrt(1 - abar[0]) * predicted) / math.sqrt(abar[0])
    share = (interpolation + 1) / 2
    posterior_1 = betas[1] * (1 - abar[0]) / (1 - abar[1])
    std = torch.exp(0.5 * (share * math.log(betas[0]) + (1 - share) * math.log(posterior_1)))
    total = 0.0
    for value, m, s in zip(x.flatten().tolist(), mean.flatten().tolist(), std.flatten().tolist()):
        low = -8.0 if value < -0.999 else value - 1 / 255
        high = 8.0 if value > 0.999 else value + 1 / 255
        points = torch.linspace(max(low, m - 12 * s), min(high, m + 12 * s), 20_001, dtype=torch.float64)
        density = torch.exp(-0.5 * ((points - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        mass = float(torch.trapezoid(density, points)) if points[-1] > points[0] else 0.0
        total -= math.log(max(mass, 1e-12))
    assert float(terms["vb"]) == pytest.approx(total / 48 / math.log(2), rel=1e-5)


def test_bound_trains_the_variance_alone():
    x, noise, predicted, interpolation, t = loss_case([0, 3, 800])
    predicted.requires_grad_()
    interpolation.requires_grad_()
    terms = diffusion.loss_terms(lambda *_: torch.cat((predicted, interpolation), 1), x, NO_CLASS, t, noise)
    for name, is_trained in (("vb", (False, True)), ("mse", (True, False))):
        gradients = torch.autograd.grad(terms[name].sum(), (predicted, interpolation), retain_graph=True)
        for gradient, trained in zip(gradients, is_trained):
            assert ((gradient.flatten(1) != 0).any(1) == trained).all(), name


def test_loss_is_the_terms_mean_and_follows_its_generator():
    seen = []

    def model(x, t, y):
        seen.append((x, t, y))
        return torch.cat((0 * x, 0 * x), 1)

    x, y = torch.randn(4000, 2, 2, 2), torch.arange(4000)
    value, terms = diffusion.loss(model, x, y, torch.Generator().manual_seed(5))
    assert float(value) == pytest.approx(float(terms["mse"] + terms["vb"]))
    assert float(terms["mse"]) == pytest.approx(1.0, abs=0.05)  # nothing predicted: the noise's variance
    _, t, labels = seen[0]
    assert torch.equal(labels, y)
    assert t.min() < 5
    assert t.max() > 994
    assert abs(t.float().mean() - 499.5) < 20
    again, _ = diffusion.loss(model, x, y, torch.Generator().manual_seed(5))
    assert torch.equal(again, value)
    other, _ = diffusion.loss(model, x, y, torch.Generator().manual_seed(6))
    assert not torch.equal(other, value)
    _, without_variance = diffusion.loss(lambda x, t, y: 0 * x, x, y)
    assert list(without_variance) == ["mse"]


# --- the samplers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", [-1.0, None])
def test_ddpm_reproduces_a_gaussian(interpolation):
    model = gaussian_noise if interpolation is None else with_variance(gaussian_noise, interpolation)
    shape = (2, 1, 100, 100)
    draw = normals(shape)
    samples = diffusion.sample(model, draw(), NO_CLASS, draw, steps=200)
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(samples.std()) == pytest.approx(STD, abs=0.02)


def test_ddim_converges_to_the_exact_map():
    """Without new noise DDIM integrates an ODE, whose solution for a Gaussian is known in closed form."""
    abar = float(LINEAR.abar[-1])
    x = normals((1, 1, 8, 8))()
    exact = MEAN + STD * (x - math.sqrt(abar) * MEAN) / math.sqrt(abar * STD**2 + 1 - abar)
    errors = []
    for steps in (10, 50, 250, 1000):
        samples = diffusion.sample(gaussian_noise, x, NO_CLASS, never, steps, "ddim")
        errors.append(float((samples - exact).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 8 * errors[3]
    assert errors[-1] < 0.01


def test_ddim_with_eta_1_is_ddpm_with_the_posteriors_variance():
    shape = (2, 1, 4, 4)
    x = normals(shape, seed=1)()
    ancestral = diffusion.sample(with_variance(gaussian_noise, -1.0), x, NO_CLASS, normals(shape), 20)
    ddim = diffusion.sample(with_variance(gaussian_noise, 0.3), x, NO_CLASS, normals(shape), 20, "ddim", eta=1.0)
    torch.testing.assert_close(ddim, ancestral, rtol=1e-9, atol=1e-9)


def test_a_single_step_is_the_expected_data():
    x = normals((1, 1, 2, 2))()
    t = torch.tensor([999])
    expected = LINEAR.data(x, gaussian_noise(x, t, NO_CLASS), t)
    for sampler in ("ddpm", "ddim"):
        torch.testing.assert_close(diffusion.sample(gaussian_noise, x, NO_CLASS, never, 1, sampler), expected)


# --- diffusers -------------------------------------------------------------------------------------------------------


def wavy(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Any smooth function will do as a model: noise and variance of a made-up network."""
    noise = x / (1 + x.square()).sqrt() + 0.1 * torch.cos(3 * x + t.view(-1, 1, 1, 1) / 200)
    return torch.cat((noise, torch.sin(2 * x)), 1)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
def test_ddpm_takes_the_path_of_diffusers(variance):
    pytest.importorskip("diffusers", reason="needs the extra hieratok[diffusers]")
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    def model(x, t, y):
        return wavy(x, t, y) if variance == "learned_range" else wavy(x, t, y)[:, : x.shape[1]]

    scheduler = DDPMScheduler(variance_type=variance, clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(50)
    start = normals((2, 3, 4, 4), seed=1)()
    theirs, g = start, torch.Generator().manual_seed(3)
    for t in scheduler.timesteps:
        output = model(theirs, t.expand(len(start)), NO_CLASS)
        theirs = scheduler.step(output, t, theirs, generator=g).prev_sample
    ours = diffusion.sample(model, start, NO_CLASS, normals((2, 3, 4, 4), seed=3), 50)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_takes_the_path_of_diffusers(eta):
    pytest.importorskip("diffusers", reason="needs the extra hieratok[diffusers]")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    def model(x, t, y):
        return wavy(x, t, y)[:, : x.shape[1]]

    scheduler = DDIMScheduler(clip_sample=False)  # its spacing: every 20th step from 0
    scheduler.set_timesteps(50)
    start = normals((2, 3, 4, 4), seed=1)()
    theirs, g = start, torch.Generator().manual_seed(3)
    for t in scheduler.timesteps:
        output = model(theirs, t.expand(len(start)), NO_CLASS)
        theirs = scheduler.step(output, t, theirs, eta=eta, generator=g).prev_sample
    schedule = LINEAR.subset(scheduler.timesteps.flip(0).tolist())
    ours = diffusion.ddim(model, start, NO_CLASS, normals((2, 3, 4, 4), seed=3), schedule, eta)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
