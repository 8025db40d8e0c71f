"""How much sooner one training curve reaches what another reaches: figure 4's "1.38x faster", defined. [ours]

A curve is log gFID over log step, made to fall monotonically (isotonic regression) and joined by straight lines. Both
are asked for the first step at which they reach a level of the baseline's; the speed-up is the ratio. A curve that
does not reach the level is not extrapolated.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHARES = (0.5, 0.75, 1.0)
"""Levels are what the baseline has reached after these shares of its steps."""
REPLICATES = 1_000
CONFIDENCE = 0.95


class SpeedUp(NamedTuple):
    """At one level of the baseline's curve."""

    level: float
    """gFID that both must reach."""
    baseline_step: float
    """First step at which the baseline's curve is there."""
    step: float | None
    """The same of the other; None: not reached."""
    ratio: float | None
    """baseline_step / step: above 1, the other is faster; None: not reached."""
    low: float | None
    """Lower end of the ratio's 95% bootstrap interval; None: in that case not reached."""
    high: float | None
    """Its upper end."""
    at_least: bool
    """The other is there at its first evaluation already: the ratio is a lower bound."""


def speed_up(
    steps: Sequence[int], baseline: Sequence[Sequence[float]], other: Sequence[Sequence[float]], seed: int = 0
) -> list[SpeedUp]:
    """The speed-up at several levels, with intervals.

    The bootstrap draws whole curves where there are several seeds, and with one seed the deviations of its points from
    the monotone curve, which knows nothing of how other seeds would differ.

    Args:
        steps: at which both were evaluated, ascending, at least two.
        baseline: positive values, (seeds, steps).
        other: the same of what may be faster.
        seed: of the bootstrap.

    Raises:
        ValueError: too few or unordered steps, or values that do not fit them or are not positive.
    """
    x = np.log(np.asarray(steps, dtype=np.float64))
    if len(x) < 2 or not (np.diff(x) > 0).all():
        raise ValueError("a speed-up needs curves of at least two steps, ascending")
    curves = []
    for values in (baseline, other):
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] != len(x) or not (np.isfinite(array).all() and (array > 0).all()):
            raise ValueError(f"curves must be positive numbers, one for each of the {len(x)} steps and each seed")
        curves.append(np.log(array))
    rng = np.random.default_rng(seed)
    resampled = [[resample(curve, rng) for curve in curves] for _ in range(REPLICATES)]
    result = []
    for share in SHARES:
        at = int(np.searchsorted(steps, share * steps[-1]))
        level, first, second = reach(x, curves[0].mean(0), curves[1].mean(0), at)
        # A replicate that is not reached counts as slower than any that is.
        drawn = sorted(_ratio(*reach(x, a, b, at)[1:]) for a, b in resampled)
        tail = (1 - CONFIDENCE) / 2
        low, high = drawn[math.floor(tail * REPLICATES)], drawn[math.ceil((1 - tail) * REPLICATES) - 1]
        reached = second is not None
        result.append(
            SpeedUp(
                math.exp(level),
                math.exp(first or 0.0),
                math.exp(second) if reached else None,
                _ratio(first, second) if reached else None,
                low or None,
                high or None,
                at_least=reached and second == float(x[0]),
            )
        )
    return result


def reach(x: np.ndarray, baseline: np.ndarray, other: np.ndarray, at: int) -> tuple[float, float | None, float | None]:
    """The baseline's monotone level at index `at`, and the first log step at which each curve is there; all logs."""
    a, b = monotone(baseline), monotone(other)
    return float(a[at]), first_step(x, a, a[at]), first_step(x, b, a[at])


def monotone(values: np.ndarray) -> np.ndarray:
    """The falling curve nearest to `values`, (steps,)."""
    from sklearn.isotonic import isotonic_regression

    return isotonic_regression(values, increasing=False)


def first_step(x: np.ndarray, falling: np.ndarray, level: float) -> float | None:
    """Where a falling curve over x first is at or below `level`; at x[0] if it begins there, None if it never is."""
    below = np.flatnonzero(falling <= level + 1e-9)  # rounding must not hide a level that is just reached
    if not len(below):
        return None
    i = int(below[0])
    if i == 0 or falling[i - 1] == falling[i]:
        return float(x[i])
    share = (falling[i - 1] - level) / (falling[i - 1] - falling[i])
    return float(x[i - 1] + min(share, 1.0) * (x[i] - x[i - 1]))


def resample(curves: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One bootstrap replicate of the mean of log curves (seeds, steps)."""
    seeds, steps = curves.shape
    if seeds > 1:
        return curves[rng.integers(seeds, size=seeds)].mean(0)
    fitted = monotone(curves[0])
    return fitted + (curves[0] - fitted)[rng.integers(steps, size=steps)]


def _ratio(first: float | None, second: float | None) -> float:
    return 0.0 if first is None or second is None else math.exp(first - second)
