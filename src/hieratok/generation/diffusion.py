"""The DDPM process, the paper's generator objective: noise prediction with a learned variance, as DiT trains it.

Convention of time: t = 0 .. 999 are training steps; x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, so t = 0 has least
noise and t = 999 almost no data. Sources: Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (learned variance,
respacing), Song et al. 2021 (DDIM), Peebles and Xie 2023 (their combination in DiT).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hieratok.generation.config import STEPS
from hieratok.generation.process import Draw, Predict

FIRST_BETA, LAST_BETA = 1e-4, 0.02


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise of each step, and derived quantities. Tables are float64 and cast where they are used.

    Functions take `i` (B,), steps of this schedule, 0 .. len - 1; `timesteps[i]` are the times passed to a model.
    """

    betas: Tensor
    """(T,) float64: variance of the noise that step i adds."""
    timesteps: Tensor
    """(T,) int64, ascending: the training step of step i."""

    @classmethod
    def linear(cls) -> "Schedule":
        """The training schedule: betas rise linearly over 1000 steps."""
        betas = torch.linspace(FIRST_BETA, LAST_BETA, STEPS, dtype=torch.float64, device="cpu")
        return cls(betas, torch.arange(STEPS, device="cpu"))

    def __len__(self) -> int:
        return len(self.betas)

    def respaced(self, steps: int) -> "Schedule":
        """`steps` of this schedule's steps, evenly spread from the first to the last (a single one: the last).

        Raises:
            ValueError: fewer than 1 or more than the schedule has.
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps must be between 1 and {len(self)}, not {steps}")
        first = 0 if steps > 1 else len(self) - 1
        spread = torch.linspace(first, len(self) - 1, steps, dtype=torch.float64, device="cpu")
        return self.subset(spread.round().long().tolist())

    def subset(self, steps: Sequence[int]) -> "Schedule":
        """Only these steps, ascending; their betas grow so that abar, and so each step's noise, does not change."""
        kept = torch.as_tensor(steps, dtype=torch.long)
        abar = self.abar[kept]
        return Schedule(1 - abar / _previous(abar), self.timesteps[kept])

    @cached_property
    def abar(self) -> Tensor:
        """Product of (1 - beta) up to step i: the data's share of the variance."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{i-1} | x_i, x_0); 0 at the first step."""
        return self.betas * (1 - _previous(self.abar)) / (1 - self.abar)

    @cached_property
    def posterior_logvar(self) -> Tensor:
        """Log of the posterior variance; the first step, where it is infinite, gets the second's, as in DDPM."""
        return self.posterior_variance[torch.arange(len(self)).clamp(min=min(1, len(self) - 1))].log()

    def noisy(self, x: Tensor, noise: Tensor, i: Tensor) -> Tensor:
        """A sample of q(x_i | x_0)."""
        return _at(self.abar.sqrt(), i, x) * x + _at((1 - self.abar).sqrt(), i, x) * noise

    def data(self, x_i: Tensor, noise: Tensor, i: Tensor) -> Tensor:
        """x_0 for a given noise: `noisy`, solved for x."""
        return _at((1 / self.abar).sqrt(), i, x_i) * x_i - _at((1 / self.abar - 1).sqrt(), i, x_i) * noise

    def posterior_mean(self, x: Tensor, x_i: Tensor, i: Tensor) -> Tensor:
        """Mean of q(x_{i-1} | x_i, x_0 = x)."""
        before = _previous(self.abar)
        data_share = before.sqrt() * self.betas / (1 - self.abar)
        noisy_share = (1 - self.betas).sqrt() * (1 - before) / (1 - self.abar)
        return _at(data_share, i, x) * x + _at(noisy_share, i, x) * x_i

    def logvar(self, interpolation: Tensor | None, x_i: Tensor, i: Tensor) -> Tensor:
        """Log-variance of the model's step from x_i to x_{i-1}: beta's, or with a learned `interpolation` (of x_i's
        shape) between the posterior's (-1) and beta's (1)."""
        if interpolation is None:
            return _at(self.betas.log(), i, x_i).expand_as(x_i)
        share = (interpolation + 1) / 2
        return share * _at(self.betas.log(), i, x_i) + (1 - share) * _at(self.posterior_logvar, i, x_i)


def _previous(abar: Tensor) -> Tensor:
    """abar of the step before each; 1, all data, before the first."""
    return torch.cat((abar.new_ones(1), abar[:-1]))


def _at(table: Tensor, i: Tensor, like: Tensor) -> Tensor:
    """A table's entries i (B,) -> (B, 1, 1, 1), in the dtype and on the device of `like`."""
    return table.to(like.device, like.dtype)[i].view(-1, *[1] * (like.ndim - 1))


LINEAR = Schedule.linear()


def loss(
    model: Predict, x: Tensor, y: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss at random times: `mse`, and `vb` if the model predicts a variance.

    Args:
        model: predicts the noise, (B, d, h, w), or noise and variance, (B, 2 d, h, w), at times 0 .. 999.
        x: latents (B, d, h, w), float32, about unit variance.
        y: (B,) class labels.
        generator: for times and noise, on x's device; None: torch's own.

    Returns:
        The scalar to minimise, and its terms by name for the log.
    """
    t = torch.randint(STEPS, (len(x),), device=x.device, generator=generator)
    noise = torch.empty_like(x).normal_(generator=generator)
    terms = {name: term.mean() for name, term in loss_terms(model, x, y, t, noise).items()}
    return torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}


def loss_terms(model: Predict, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Per-image terms (B,) of the loss at times t (B,), int64, for given noise (B, d, h, w).

    `mse` is the noise's mean squared error; `vb` the variational bound's term in bits per latent value, in which only
    the variance learns: the mean is held fixed. Its weight is 1: Nichol and Dhariwal's 0.001 times the 1000 steps.
    """
    x_t = LINEAR.noisy(x, noise, t)
    predicted, interpolation = split(model(x_t, t, y).to(x.dtype), x)
    terms = {"mse": (predicted - noise).square().flatten(1).mean(1)}
    if interpolation is not None:
        terms["vb"] = bound_terms(x, x_t, predicted.detach(), interpolation, t)
    return terms


def bound_terms(x: Tensor, x_t: Tensor, noise: Tensor, interpolation: Tensor, t: Tensor) -> Tensor:
    """The variational bound's term L_t in bits per latent value, (B,): KL of the posterior from the model's step.

    At t = 0 it is the likelihood of x in 256 levels over [-1, 1]. Latents have no such levels; it is kept as in DiT,
    and trains only the variance of the one step that adds no noise.
    """
    mean = LINEAR.posterior_mean(LINEAR.data(x_t, noise, t), x_t, t)
    logvar = LINEAR.logvar(interpolation, x_t, t)
    true_mean = LINEAR.posterior_mean(x, x_t, t)
    true_logvar = _at(LINEAR.posterior_logvar, t, x)
    ratio = true_logvar - logvar
    kl = 0.5 * (ratio.exp() - 1 - ratio + (true_mean - mean).square() * (-logvar).exp())
    first = _at(LINEAR.timesteps == 0, t, x).bool()
    nats = torch.where(first, level_nll(x, mean, 0.5 * logvar), kl)
    return nats.flatten(1).mean(1) / math.log(2)


def level_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log probability (nats) that a normal variable is within half a level of x, of 256 levels over [-1, 1]; the
    outermost levels reach to infinity. Probabilities are at least 1e-12."""
    upper = torch.special.ndtr((x - mean + 1 / 255) * (-log_std).exp())
    lower = torch.special.ndtr((x - mean - 1 / 255) * (-log_std).exp())
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return -(upper - lower).clamp(min=1e-12).log()


def split(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A model's output -> predicted noise, and the variance's interpolation if there is one; both of x's shape."""
    d = x.shape[1]
    assert output.shape[1] in (d, 2 * d), (output.shape, x.shape)
    return (output, None) if output.shape[1] == d else (output[:, :d], output[:, d:])


def sample(
    model: Predict,
    x: Tensor,
    y: Tensor,
    draw: Draw,
    steps: int = 250,
    sampler: Literal["ddpm", "ddim"] = "ddpm",
    eta: float = 0.0,
) -> Tensor:
    """From noise to latents.

    Args:
        model: as in `loss`.
        x: standard normals (B, d, h, w).
        y: (B,) class labels.
        draw: noise for the steps that need it.
        steps: evaluations of the model, 1 .. 1000.
        sampler: the ancestral sampler, or DDIM.
        eta: of DDIM: 0 is deterministic, 1 as random as ddpm with the posterior's variance.

    Raises:
        ValueError: steps out of range.
    """
    schedule = LINEAR.respaced(steps)
    return ddpm(model, x, y, draw, schedule) if sampler == "ddpm" else ddim(model, x, y, draw, schedule, eta)


def ddpm(model: Predict, x: Tensor, y: Tensor, draw: Draw, schedule: Schedule) -> Tensor:
    """Ancestral sampling: each step draws x_{i-1} from the model's normal; the last returns its mean."""
    for step in reversed(range(len(schedule))):
        i = torch.full((len(x),), step, device=x.device)
        output = model(x, schedule.timesteps.to(x.device)[i], y).to(x.dtype)
        noise, interpolation = split(output, x)
        mean = schedule.posterior_mean(schedule.data(x, noise, i), x, i)
        x = mean + (0.5 * schedule.logvar(interpolation, x, i)).exp() * draw() if step else mean
    return x


def ddim(model: Predict, x: Tensor, y: Tensor, draw: Draw, schedule: Schedule, eta: float = 0.0) -> Tensor:
    """DDIM: x_0 as predicted, noised again to the step before with the predicted noise and, for eta > 0, new noise."""
    before = _previous(schedule.abar)
    fresh_variance = eta**2 * schedule.posterior_variance
    for step in reversed(range(len(schedule))):
        i = torch.full((len(x),), step, device=x.device)
        noise, _ = split(model(x, schedule.timesteps.to(x.device)[i], y).to(x.dtype), x)
        data = schedule.data(x, noise, i)
        x = _at(before.sqrt(), i, x) * data + _at((1 - before - fresh_variance).sqrt(), i, x) * noise
        if eta > 0 and step:
            x = x + _at(fresh_variance.sqrt(), i, x) * draw()
    return x
