"""Flow matching against a Gaussian whose velocity, path and score are known in closed form, and against diffusers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hieratok.generation import flow

MEAN, STD = 0.7, 0.4
NO_CLASS = torch.zeros(0)


def gaussian_velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """E[data - noise | x_t] for data N(MEAN, STD^2): regression of one Gaussian on another."""
    t = t.view(-1, 1, 1, 1)
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def gaussian_score(x: torch.Tensor, t: float) -> torch.Tensor:
    return -(x - t * MEAN) / (t**2 * STD**2 + (1 - t) ** 2)


def never() -> torch.Tensor:
    raise AssertionError("no noise should be drawn")


def normals(shape, seed: int = 3):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_loss_compares_with_data_minus_noise_on_the_straight_line():
    g = torch.Generator().manual_seed(0)
    x, noise, output = torch.randn(3, 4, 2, 3, 3, generator=g, dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    seen = []

    def model(x_t, time, y):
        seen.append((x_t, time))
        return output

    mse = flow.loss_terms(model, x, NO_CLASS, t, noise)["mse"]
    for n in range(4):
        torch.testing.assert_close(seen[0][0][n], t[n] * x[n] + (1 - t[n]) * noise[n])
        torch.testing.assert_close(mse[n], ((output[n] - x[n] + noise[n]) ** 2).mean())
    assert torch.equal(seen[0][0][0], noise[0])  # t = 0 is noise
    assert torch.equal(seen[0][0][3], x[3])  # t = 1 is data
    assert torch.equal(seen[0][1], t)


def test_the_known_velocity_minimises_the_loss():
    x = MEAN + STD * torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def value(factor):
        generator = torch.Generator().manual_seed(1)
        return float(flow.loss(lambda x, t, y: factor * gaussian_velocity(x, t, y), x, NO_CLASS, generator)[0])

    assert value(1.0) < min(value(0.9), value(1.1), value(-1.0))


@pytest.mark.parametrize(
    ("time_sampling", "quartiles"),
    [("uniform", (0.25, 0.5, 0.75)), ("logit-normal", tuple(1 / (1 + math.exp(-z)) for z in (-0.67449, 0, 0.67449)))],
)
def test_times_and_generator(time_sampling, quartiles):
    times = []

    def model(x, t, y):
        times.append(t)
        return 0 * x

    x = torch.randn(20_000, 1, 1, 1)
    value, terms = flow.loss(model, x, NO_CLASS, torch.Generator().manual_seed(0), time_sampling)
    assert torch.equal(value, terms["mse"])
    t = times[0]
    assert t.dtype == torch.float32
    assert (t.min() >= 0) & (t.max() <= 1)
    assert np.quantile(t, (0.25, 0.5, 0.75)).tolist() == pytest.approx(quartiles, abs=0.015)
    again, _ = flow.loss(model, x, NO_CLASS, torch.Generator().manual_seed(0), time_sampling)
    assert torch.equal(value, again)


# --- the samplers ----------------------------------------------------------------------------------------------------


def errors(sampler: str, steps: tuple[int, ...], shift: float = 1.0) -> list[float]:
    """Against the flow's exact map of a Gaussian, x -> MEAN + STD x."""
    x = normals((2, 1, 8, 8))()
    samples = [flow.sample(gaussian_velocity, x, NO_CLASS, never, n, sampler, shift) for n in steps]
    return [float((s - (MEAN + STD * x)).abs().max()) for s in samples]


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(sampler, order):
    found = errors(sampler, (40, 80, 160))
    for coarse, fine in pairwise(found):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_heun_is_closer_at_the_same_cost():
    (heun,), (euler,) = errors("heun", (20,)), errors("euler", (40,))
    assert heun < euler / 5


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 200), ("heun", 20), ("sde", 200)])
@pytest.mark.parametrize("shift", [1.0, 0.4])
def test_moments_of_a_gaussian(sampler, steps, shift):
    shape = (2, 1, 100, 100)
    draw = normals(shape)
    samples = flow.sample(
        gaussian_velocity, draw(), NO_CLASS, draw if sampler == "sde" else never, steps, sampler, shift
    )
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(samples.std()) == pytest.approx(STD, abs=0.015)


def test_sde_forgets_its_noise_and_the_ode_does_not():
    shape = (1, 1, 100, 100)
    start = normals(shape, seed=0)()
    correlation = {}
    for sampler in ("euler", "sde"):
        samples = flow.sample(gaussian_velocity, start, NO_CLASS, normals(shape, seed=1), 200, sampler)
        correlation[sampler] = np.corrcoef(start.flatten(), samples.flatten())[0, 1]
    assert correlation["euler"] > 0.999
    assert correlation["sde"] < 0.6


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_sde_step_is_drift_with_the_score_and_noise(t):
    """dx = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dW, with the score of the Gaussian itself."""
    x, noise = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    h = 0.01

    def velocity(x, t):
        return gaussian_velocity(x, torch.tensor([t], dtype=torch.float64), NO_CLASS)

    expected = x + h * (velocity(x, t) + (1 - t) * gaussian_score(x, t)) + math.sqrt(2 * (1 - t) * h) * noise
    torch.testing.assert_close(flow.sde_step(velocity, x, t, t + h, noise), expected)


def test_last_step_of_the_sde_is_the_expected_data():
    """E[data | x_t] = x_t + (1 - t) v, and no noise after it."""
    x = normals((1, 1, 4, 4))()
    draws = []

    def draw():
        draws.append(normals((1, 1, 4, 4), seed=9)())
        return draws[-1]

    samples = flow.sample(lambda x, t, y: torch.ones_like(x), x, NO_CLASS, draw, 2, "sde")
    middle = x + 0.5 * (1 - x) + draws[0]  # drift (1 + 0) v - x, g = sqrt(2 * 1 * 0.5)
    torch.testing.assert_close(samples, middle + 0.5)
    assert len(draws) == 1


def test_models_are_asked_at_the_shifted_times():
    times = []

    def model(x, t, y):
        times.append(float(t[0]))
        return 0 * x

    flow.sample(model, torch.zeros(2, 1, 1, 1), NO_CLASS, never, 4, "euler", 0.5)
    assert times == pytest.approx([0, 0.125 / 0.875, 0.25 / 0.75, 0.375 / 0.625])


@pytest.mark.parametrize("s", [0.3, 1.0, 3.0])
def test_time_shift(s):
    assert flow.time_shift(0.0, s) == 0
    assert flow.time_shift(1.0, s) == 1
    for t in (0.1, 0.5, 0.8):
        assert flow.time_shift(flow.time_shift(t, s), 1 / s) == pytest.approx(t)
        # the other direction of time has the inverse shift
        assert 1 - flow.time_shift(t, s) == pytest.approx(flow.time_shift(1 - t, 1 / s))
        assert (flow.time_shift(t, s) < t) == (s < 1)


# --- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 0.4])
def test_euler_takes_the_path_of_diffusers(shift):
    pytest.importorskip("diffusers", reason="needs the extra hieratok[diffusers]")
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    def model(x, t, y):
        return torch.tanh(x) + torch.cos(3 * x + 5 * t.view(-1, 1, 1, 1))

    steps = 20
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    start = normals((2, 3, 4, 4))().float()
    theirs = start
    for t in scheduler.timesteps:  # their time is 1000 (1 - ours), their velocity noise - data
        velocity = -model(theirs, (1 - t / 1000).expand(2), NO_CLASS)
        theirs = scheduler.step(velocity, t, theirs).prev_sample
    ours = flow.sample(model, start, NO_CLASS, never, steps, "euler", shift)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
