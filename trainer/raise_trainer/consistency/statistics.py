"""Separation, calibration and their intervals: numpy on arrays of N answers."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Figure = Callable[[Floats], float]  # of weights [N] to a number, NaN where it is undefined
LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval from resampled videos: `Clusters.interval`.

    value: None when undefined. low, high: None when undefined or when there are fewer than two videos.
    resamples: those in which the figure was defined, which the interval is of.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    resamples: int = 0


@dataclass(frozen=True)
class Bin:
    """Answers with low <= x < high (the last bin has its upper end too). mean: of x; share: of those that are
    right, or match; both None for an empty bin.
    """

    low: float
    high: float
    count: int
    mean: float | None
    share: float | None


def auroc(positive: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float:
    """P(score of a positive > score of a negative) + P(equal) / 2, in [0, 1]; NaN if one side is empty.

    positive [N] bool, score [N], weight [N] >= 0 (1 each): how often an answer counts.
    """
    return auroc_figure(positive, score)(_weights(weight, len(np.atleast_1d(np.asarray(score)))))


def auroc_figure(positive: ArrayLike, score: ArrayLike) -> Figure:
    """`auroc` as a function of the weights; sorts once."""
    flags = np.asarray(positive, bool)
    values, place = np.unique(np.asarray(score, np.float64), return_inverse=True)

    def figure(weight: Floats) -> float:
        up = np.bincount(place, weight * flags, minlength=len(values))
        down = np.bincount(place, weight * ~flags, minlength=len(values))
        pairs = up.sum() * down.sum()
        if not pairs:
            return float("nan")
        return float((up * (down.cumsum() - down / 2)).sum() / pairs)

    return figure


def overlap(
    positive: ArrayLike, score: ArrayLike, *, bins: int = 20, weight: ArrayLike | None = None
) -> float:
    """Overlap coefficient of two histograms, sum_b min(share of positives in b, share of negatives in b).

    score [N] in [0, 1], in `bins` of equal width. In [0, 1]: 0 apart, 1 the same; NaN if one side is empty.
    """
    return overlap_figure(positive, score, bins=bins)(_weights(weight, len(np.asarray(score))))


def overlap_figure(positive: ArrayLike, score: ArrayLike, *, bins: int = 20) -> Figure:
    """`overlap` as a function of the weights."""
    flags, place = np.asarray(positive, bool), bin_of(score, bins)

    def figure(weight: Floats) -> float:
        up = np.bincount(place, weight * flags, minlength=bins)
        down = np.bincount(place, weight * ~flags, minlength=bins)
        if not up.sum() or not down.sum():
            return float("nan")
        return float(np.minimum(up / up.sum(), down / down.sum()).sum())

    return figure


def bin_of(values: ArrayLike, bins: int) -> NDArray[np.int64]:
    """min(floor(x * bins), bins - 1) for x [N] in [0, 1]. ValueError for one outside, or NaN."""
    x = np.asarray(values, np.float64)
    outside = ~((x >= 0) & (x <= 1))
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(f"values[{at}]: got {x[at]}, wanted a number from 0 to 1; leave that answer out")
    return np.minimum((x * bins).astype(np.int64), bins - 1)


def shares(flags: ArrayLike, x: ArrayLike, *, bins: int = 10) -> list[Bin]:
    """A reliability diagram: in each of `bins` of equal width, the mean of x and the share of flags."""
    on, values, place = np.asarray(flags, bool), np.asarray(x, np.float64), bin_of(x, bins)
    made = list[Bin]()
    for b in range(bins):
        inside = place == b
        count = int(inside.sum())
        mean, share = (float(v[inside].mean()) if count else None for v in (values, on))
        made.append(Bin(b / bins, (b + 1) / bins, count, mean, share))
    return made


def calibration_error_figure(right: ArrayLike, confidence: ArrayLike, *, bins: int = 10) -> Figure:
    """Expected calibration error, sum_b n_b / N |share right in b - mean confidence in b|, of the weights.

    confidence [N] in [0, 1], in `bins` of equal width. In [0, 1]; NaN for no answers.
    """
    gap = np.asarray(right, bool) - np.asarray(confidence, np.float64)
    place = bin_of(confidence, bins)

    def figure(weight: Floats) -> float:
        total = weight.sum()
        sums = np.bincount(place, weight * gap, minlength=bins)
        return float(np.abs(sums).sum() / total) if total else float("nan")

    return figure


def calibration_error(right: ArrayLike, confidence: ArrayLike, *, bins: int = 10) -> float:
    """The figure of `calibration_error_figure`, each answer counted once."""
    return calibration_error_figure(right, confidence, bins=bins)(_weights(None, len(np.asarray(right))))


def mean_figure(values: ArrayLike) -> Figure:
    """The mean of values [N], of the weights; NaN for none."""
    x = np.asarray(values, np.float64)

    def figure(weight: Floats) -> float:
        total = weight.sum()
        return float((weight * x).sum() / total) if total else float("nan")

    return figure


class Clusters:
    """Resamples whole videos with replacement, as many as there are; the same ones for every figure.

    video [N]: the video of each answer. resamples: how many. seed: of the draws.
    """

    def __init__(self, video: Sequence[Hashable], *, resamples: int = 1000, seed: int = 0) -> None:
        if resamples < 0:
            raise ValueError(f"resamples: got {resamples}, wanted 0 or more")
        numbers = {name: i for i, name in enumerate(dict.fromkeys(video))}
        self.of = np.array([numbers[name] for name in video], np.int64)
        self.count, self.resamples, self.seed = len(numbers), resamples, seed

    def interval(self, figure: Figure, chosen: Flags | None = None, *, biased: bool = False) -> Interval:
        """A figure of the answers and its interval. chosen [N]: those the figure is of, all if None.

        The interval is the middle 95 % of the figure over resamples (percentile bootstrap). biased: for a
        figure in [0, 1] that noise alone moves one way, as it lowers an overlap and raises a calibration
        error. A resample adds that noise once more, so that its middle may not hold the figure; the interval
        reaches then as far to the other side, within [0, 1].
        """
        of = self.of if chosen is None else self.of[chosen]
        value = figure(np.ones(len(of)))
        if np.isnan(value):
            return Interval(None)
        if self.count < 2 or not self.resamples:
            return Interval(value)
        source = np.random.default_rng(self.seed)
        values = list[float]()
        for _ in range(self.resamples):
            drawn = np.bincount(source.integers(self.count, size=self.count), minlength=self.count)
            values.append(figure(drawn[of].astype(np.float64)))
        known = np.array([v for v in values if not np.isnan(v)])
        if not len(known):
            return Interval(value)
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if biased:
            reach = max(value - low, high - value)
            low, high = max(value - reach, 0.0), min(value + reach, 1.0)
        return Interval(value, float(low), float(high), len(known))


def _weights(weight: ArrayLike | None, count: int) -> Floats:
    return np.ones(count) if weight is None else np.asarray(weight, np.float64)
