"""How much sooner one training curve reaches the level of another: a definition of figure 4's "1.38x faster". [ours]

A curve is log gFID over log step, made monotone (isotonic regression), with linear interpolation. The speed-up is the
ratio of the first steps at which both curves reach a level of the baseline. Curves are not extrapolated.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hieratok.core.extras import needs_extras
from hieratok.core.seeding import numpy_generator

SHARES = (0.5, 0.75, 1.0)
"""Levels: the baseline's values after these shares of its steps."""
REPLICATES = 1_000
CONFIDENCE = 0.95


class SpeedUp(NamedTuple):
    """The speed-up at one level of the baseline's curve."""

    level: float
    """gFID to reach."""
    baseline_step: float
    """First step at which the baseline's curve reaches the level."""
    step: float | None
    """The same for the other curve; None: not reached."""
    ratio: float | None
    """baseline_step / step: above 1, the other is faster; None: not reached."""
    low: float | None
    """Lower end of the ratio's 95% bootstrap interval; None: not reached."""
    high: float | None
    """Its upper end."""
    at_least: bool
    """The other curve reaches the level at its first evaluation: the ratio is a lower bound."""


def speed_up(
    steps: Sequence[int], baseline: Sequence[Sequence[float]], other: Sequence[Sequence[float]], seed: int = 0
) -> list[SpeedUp]:
    """The speed-up at several levels, with intervals.

    The bootstrap resamples whole curves if there are several seeds, and with one seed the deviations of its points from
    a smooth curve, which say nothing about other seeds.

    Args:
        steps: of both curves' evaluations, ascending, at least three.
        baseline: positive values, (seeds, steps).
        other: the curve that may be faster, likewise.
        seed: of the bootstrap.

    Raises:
        ValueError: too few or unordered steps, or values that do not fit them or are not positive.
    """
    x = np.log(np.asarray(steps, dtype=np.float64))
    if len(x) < 3 or not (np.diff(x) > 0).all():
        raise ValueError("a speed-up needs curves of at least three steps, ascending")
    curves = []
    for values in (baseline, other):
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] != len(x) or not (np.isfinite(array).all() and (array > 0).all()):
            raise ValueError(f"curves must be positive numbers, one for each of the {len(x)} steps and each seed")
        curves.append(np.log(array))
    rng = numpy_generator("bootstrap", seed)
    fitted = [monotone(curve.mean(0)) for curve in curves]
    resampled = [[monotone(resample(x, curve, rng)) for curve in curves] for _ in range(REPLICATES)]
    result = []
    for share in SHARES:
        at = int(np.searchsorted(steps, share * steps[-1]))
        first, second = reach(x, fitted[0], fitted[1], at)
        # A replicate that does not reach the level counts as the slowest.
        drawn = sorted(_ratio(*reach(x, a, b, at)) for a, b in resampled)
        tail = (1 - CONFIDENCE) / 2
        low, high = drawn[math.floor(tail * REPLICATES)], drawn[math.ceil((1 - tail) * REPLICATES) - 1]
        result.append(
            SpeedUp(
                math.exp(fitted[0][at]),
                math.exp(first),
                None if second is None else math.exp(second),
                None if second is None else _ratio(first, second),
                low or None,
                high or None,
                at_least=second == float(x[0]),
            )
        )
    return result


def reach(x: np.ndarray, baseline: np.ndarray, other: np.ndarray, at: int) -> tuple[float, float | None]:
    """First log step at which each of two falling curves over x reaches the baseline's level at index `at`."""
    first = first_step(x, baseline, baseline[at])
    assert first is not None
    return first, first_step(x, other, baseline[at])


def monotone(values: np.ndarray) -> np.ndarray:
    """The falling curve nearest to `values`, (steps,)."""
    with needs_extras():
        from scipy.optimize import isotonic_regression

    return isotonic_regression(values, increasing=False).x


def first_step(x: np.ndarray, falling: np.ndarray, level: float) -> float | None:
    """Where a falling curve over x first reaches `level`; x[0] if it begins there, None if it never does."""
    below = np.flatnonzero(falling <= level + 1e-9)  # tolerance for rounding
    if not len(below):
        return None
    i = int(below[0])
    if i == 0 or falling[i - 1] == falling[i]:
        return float(x[i])
    share = (falling[i - 1] - level) / (falling[i - 1] - falling[i])
    return float(x[i - 1] + min(share, 1.0) * (x[i] - x[i - 1]))


def resample(x: np.ndarray, curves: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One bootstrap replicate of the mean of log curves (seeds, steps) over x.

    With one seed: a parabola in log-log, or with fewer than five steps a line, plus resampled deviations, scaled up for
    the fit's degrees of freedom.
    """
    seeds, steps = curves.shape
    if seeds > 1:
        return curves[rng.integers(seeds, size=seeds)].mean(0)
    degree = 2 if steps >= 5 else 1
    smooth = np.polynomial.Polynomial.fit(x, curves[0], degree)(x)
    deviations = (curves[0] - smooth) * math.sqrt(steps / (steps - degree - 1))
    return smooth + deviations[rng.integers(steps, size=steps)]


def _ratio(first: float, second: float | None) -> float:
    return 0.0 if second is None else math.exp(first - second)
