"""Flow matching along straight lines, with velocity prediction (Lipman et al. 2023; SiT, Ma et al. 2024).

Convention of time: t = 0 is noise and t = 1 data, as in SiT: x_t = t x + (1 - t) noise, velocity v = x - noise.
(Stable Diffusion 3 and diffusers count the other way: their time is 1 - t, their velocity -v.)
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

from hieratok.generation.config import TimeSampling
from hieratok.generation.process import Draw, Predict

Time = TypeVar("Time", float, Tensor)


def loss(
    model: Predict,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator | None = None,
    time_sampling: TimeSampling = "uniform",
    shift: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss at random times: `mse` of the velocity.

    Args:
        model: predicts the velocity, (B, d, h, w), at times in [0, 1].
        x: latents (B, d, h, w), float32, about unit variance.
        y: (B,) class labels.
        generator: for times and noise, on x's device; None: torch's own.
        time_sampling: uniform, or the sigmoid of a standard normal, which favours the middle (logit-normal).
        shift: s of `time_shift`, which these times then pass.

    Returns:
        The scalar to minimise, and its terms by name for the log.
    """
    t = torch.empty(len(x), dtype=x.dtype, device=x.device)
    if time_sampling == "uniform":
        t.uniform_(generator=generator)
    else:
        t = t.normal_(generator=generator).sigmoid()
    t = time_shift(t, shift)
    noise = torch.empty_like(x).normal_(generator=generator)
    mse = loss_terms(model, x, y, t, noise)["mse"].mean()
    return mse, {"mse": mse.detach()}


def loss_terms(model: Predict, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Per-image terms (B,) of the loss at times t (B,) for given noise (B, d, h, w)."""
    time = t.view(-1, *[1] * (x.ndim - 1))
    velocity = model(time * x + (1 - time) * noise, t, y).to(x.dtype)
    return {"mse": (velocity - (x - noise)).square().flatten(1).mean(1)}


def time_shift(t: Time, shift: float) -> Time:
    """t' = s t / (1 + (s - 1) t): with s < 1 more steps are at the noisy end, which large latents need.

    Stable Diffusion 3 and diffusers count time from the data: their shift is 1 / s.
    """
    return shift * t / (shift * t + (1 - t))  # in this form, 1 stays exactly 1


def sample(
    model: Predict,
    x: Tensor,
    y: Tensor,
    draw: Draw,
    steps: int = 50,
    sampler: Literal["euler", "heun", "sde"] = "euler",
    shift: float = 1.0,
) -> Tensor:
    """From noise to latents, in equal steps of the unshifted time.

    Args:
        model: as in `loss`.
        x: standard normals (B, d, h, w).
        y: (B,) class labels.
        draw: noise for the SDE's steps.
        steps: of the integrator; heun evaluates the model twice in each.
        sampler: the ODE by Euler's or Heun's method, or the SDE by Euler-Maruyama.
        shift: s of `time_shift`.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        return model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), y).to(x.dtype)

    times = [time_shift(i / steps, shift) for i in range(steps + 1)]
    for t, end in pairwise(times):
        if sampler == "heun":
            x = heun_step(velocity, x, t, end)
        elif sampler == "sde" and end < 1:
            x = sde_step(velocity, x, t, end, draw())
        else:  # the SDE's last step too: it adds no noise and ends at the expected data
            x = euler_step(velocity, x, t, end)
    return x


Velocity = Callable[[Tensor, float], Tensor]


def euler_step(velocity: Velocity, x: Tensor, t: float, end: float) -> Tensor:
    """dx = v dt, first order."""
    return x + (end - t) * velocity(x, t)


def heun_step(velocity: Velocity, x: Tensor, t: float, end: float) -> Tensor:
    """dx = v dt, second order: the mean of the velocities at both ends of an Euler step."""
    v = velocity(x, t)
    return x + (end - t) * (v + velocity(x + (end - t) * v, end)) / 2


def sde_step(velocity: Velocity, x: Tensor, t: float, end: float, noise: Tensor) -> Tensor:
    """dx = (v + g^2 / 2 score) dt + g dW with g^2 = 2 (1 - t), SiT's default ("sigma") diffusion coefficient.

    On the straight path the score is (t v - x) / (1 - t), so the drift is (1 + t) v - x: nothing to divide by.
    """
    drift = (1 + t) * velocity(x, t) - x
    return x + (end - t) * drift + (2 * (1 - t) * (end - t)) ** 0.5 * noise
