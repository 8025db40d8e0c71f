"""A mean of values with its 95% interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hieratok.core.extras import needs_extras

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95% interval."""

    mean: float
    low: float | None = None
    """None: no interval, as of a single value."""
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """The mean of values and its interval by Student's t; none of fewer than two values.

        Infinite values (the PSNR of identical images) are left out; if there are no others, the mean is infinite.
        """
        finite = [value for value in values if not math.isinf(value)]
        if not finite:
            return cls(math.inf)
        n, mean = len(finite), math.fsum(finite) / len(finite)
        if n == 1:
            return cls(mean)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (n - 1))
        half = half_width(deviation, n)
        return cls(mean, mean - half, mean + half)


def half_width(deviation: float, n: int) -> float:
    """Half of the 95% interval of a mean of n values (Student's t); NaN for fewer than two.

    Args:
        deviation: their standard deviation, with n - 1.
        n: how many there are.
    """
    with needs_extras():
        from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * deviation / math.sqrt(n) if n > 1 else math.nan
