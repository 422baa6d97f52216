"""Paired differences over seeds: Student's interval, and the smallest difference that could have been seen.

A value of a seed is a mean over hundreds of completions, so the differences over seeds are close to normal,
and for 8 of them Student's interval has its coverage. A percentile bootstrap of 8 values does not: it misses
the factor n / (n - 1) in the variance and the tails of t, and covers about 90 % where 95 % are asked for.

Student's t is read as a normal variable over s, with s² = chi² / df: P(T > t | shift) = E_s[Phi(shift - t s)]
(shift: the noncentrality). So one integral gives quantiles and power.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, POWER = 0.95, 0.8
_GRID = 4001  # points of the integral over s; an even number of intervals, for Simpson's rule


@dataclass(frozen=True)
class Paired:
    """Mean of n paired differences with its interval; low, high and detectable are NaN for n = 1.

    detectable: the smallest true difference that a two-sided test at 1 - LEVEL would have found with
    probability POWER, given the standard deviation `sd` of the differences that was seen.
    """

    mean: float
    low: float
    high: float
    n: int
    sd: float
    detectable: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def paired(first: Sequence[float], second: Sequence[float], *, level: float = LEVEL) -> Paired:
    """Of second - first, seed by seed. ValueError for none, or for lengths that differ."""
    if len(first) != len(second) or not first:
        raise ValueError(f"first, second: got {len(first)} and {len(second)} values, wanted the same n >= 1")
    difference = [b - a for a, b in zip(first, second, strict=True)]
    n, mean = len(difference), math.fsum(difference) / len(difference)
    if n == 1:
        return Paired(mean, math.nan, math.nan, 1, math.nan, math.nan)
    sd = deviation(difference)
    half = t_quantile(0.5 + level / 2, n - 1) * sd / math.sqrt(n)
    return Paired(mean, mean - half, mean + half, n, sd, detectable(sd, n, level=level))


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def detectable(sd: float, n: int, *, level: float = LEVEL, power: float = POWER) -> float:
    """The difference that a two-sided paired t-test of n pairs finds with probability `power`."""
    critical, df = t_quantile(0.5 + level / 2, n - 1), n - 1

    def found(shift: float) -> float:
        return t_above(critical, df, shift) + t_above(critical, df, -shift)

    return _root(lambda shift: found(shift) - power, 0.0, 100.0) * sd / math.sqrt(n)


def t_quantile(p: float, df: int) -> float:
    """The p-quantile of Student's t, 0.5 <= p < 1."""
    return _root(lambda t: (1 - p) - t_above(t, df), 0.0, 1e4)


def t_above(t: float, df: int, shift: float = 0.0) -> float:
    """P(T > t) for Student's t with df degrees of freedom and noncentrality `shift`."""
    # s is near 1 with a spread of 1 / sqrt(2 df); with few degrees the density is wide.
    s = np.linspace(0.0, 1 + 9 / math.sqrt(df), _GRID)
    with np.errstate(divide="ignore"):
        log_density = (df - 1) * np.log(s) if df > 1 else np.zeros_like(s)
    log_density = log_density - df * s**2 / 2
    constant = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    above = np.array([0.5 * math.erfc((t * x - shift) / math.sqrt(2)) for x in s])
    weight = np.full(_GRID, 2.0)
    weight[1::2], weight[0], weight[-1] = 4.0, 1.0, 1.0
    return float((weight * np.exp(log_density + constant) * above).sum() * (s[1] - s[0]) / 3)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function crosses 0, by halving; `high` when it does not."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return high
