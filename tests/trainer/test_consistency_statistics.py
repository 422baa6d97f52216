"""Separation, calibration and resampling: values by hand, and what must hold for every input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raise_trainer.consistency.analysis import confidence_analysis
from raise_trainer.consistency.statistics import (
    Clusters,
    auroc,
    auroc_figure,
    bin_of,
    calibration_error,
    mean_figure,
    overlap,
    overlap_figure,
    shares,
)
from tests.budget import assert_as_exact_as_a_double, assert_equal_but_for_roundings

ANSWERS = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.95, 1.0]), st.integers(0, 3)),
    min_size=1,
    max_size=30,
)


def same(a: float, b: float) -> bool:
    assert_equal_but_for_roundings(
        torch.tensor([a], dtype=torch.float64).nan_to_num(9.0),
        torch.tensor([b], dtype=torch.float64).nan_to_num(9.0),
        name="figure",
    )
    return True


def test_auroc_by_hand() -> None:
    assert auroc([1, 1, 0, 0], [0.9, 0.6, 0.5, 0.1]) == 1.0
    assert auroc([0, 1], [0.9, 0.1]) == 0.0
    # pairs: 0.8 > 0.5, 0.8 > 0.8 half, 0.3 < 0.5, 0.3 < 0.8
    assert auroc([1, 1, 0, 0], [0.8, 0.3, 0.5, 0.8]) == 1.5 / 4
    assert auroc([1, 0, 0], [0.5, 0.5, 0.5]) == 0.5
    assert math.isnan(auroc([1, 1], [0.1, 0.2])) and math.isnan(auroc([], []))
    assert auroc([1, 0, 0], [0.5, 0.4, 0.6], [1, 3, 1]) == 0.75


def test_overlap_by_hand() -> None:
    # bins of a quarter: right 2/3 in the last, 1/3 in the first; wrong 1/2 in the first, 1/2 in the second
    right, score = [1, 1, 1, 0, 0], [0.9, 1.0, 0.1, 0.2, 0.25]
    assert_as_exact_as_a_double(overlap(right, score, bins=4), 1 / 3, name="overlap")
    assert overlap([1, 0], [0.3, 0.3]) == 1.0 and overlap([1, 0], [0.3, 0.8]) == 0.0
    assert math.isnan(overlap([1], [0.3]))


def test_bins_and_calibration_by_hand() -> None:
    assert bin_of([0.0, 0.0999, 0.1, 0.5, 0.999, 1.0], 10).tolist() == [0, 0, 1, 5, 9, 9]
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"values\[1\]"):
            bin_of([0.5, wrong], 10)
    right, confidence = [1, 0, 1, 1], [0.9, 0.95, 0.2, 0.25]
    low, high = shares(right, confidence, bins=2)
    assert (low.low, low.high, low.count, low.share) == (0.0, 0.5, 2, 1.0)
    assert (high.count, high.share) == (2, 0.5)
    assert_as_exact_as_a_double(low.mean or 0.0, 0.225, name="mean")
    # 2/4 * |1 - 0.225| + 2/4 * |0.5 - 0.925|
    assert_as_exact_as_a_double(calibration_error(right, confidence, bins=2), 0.6, name="error")
    empty = shares([1], [0.9], bins=2)[0]
    assert empty.count == 0 and empty.mean is None and empty.share is None


@given(ANSWERS)
def test_auroc_of_every_pair(answers: list[tuple[bool, float, int]]) -> None:
    flags, score = [a for a, _, _ in answers], [s for _, s, _ in answers]
    up, down = ([s for a, s in zip(flags, score, strict=True) if a == side] for side in (True, False))
    pairs = [(u > d) + (u == d) / 2 for u in up for d in down]
    found = auroc(flags, score)
    assert same(found, sum(pairs) / len(pairs) if pairs else math.nan)
    same(auroc(np.logical_not(flags), score), 1 - found)
    same(auroc(flags, np.exp(score)), found)  # of ranks alone


@given(ANSWERS)
def test_weights_are_repetitions(answers: list[tuple[bool, float, int]]) -> None:
    flags, score, times = (np.array(x) for x in zip(*answers, strict=True))
    again = np.repeat(np.arange(len(answers)), times)
    for make in (auroc_figure, overlap_figure):
        same(make(flags, score)(times.astype(float)), make(flags[again], score[again])(np.ones(len(again))))


@given(ANSWERS)
def test_bounds(answers: list[tuple[bool, float, int]]) -> None:
    flags, score = [a for a, _, _ in answers], [s for _, s, _ in answers]
    found = overlap(flags, score)
    if not math.isnan(found):
        assert found >= 0
        same(max(found, 1.0), 1.0)
        same(overlap(np.logical_not(flags), score), found)
    assert 0 <= calibration_error(flags, score) <= 1
    assert sum(b.count for b in shares(flags, score)) == len(answers)


def test_videos_are_resampled_whole() -> None:
    """Two videos whose answers are all alike: a resample has mean 0, 1/2 or 1, never anything between."""
    clusters = Clusters(["a"] * 5 + ["b"] * 5, resamples=200)
    values = [0.0] * 5 + [1.0] * 5
    seen = set[float]()

    def figure(weight: np.ndarray) -> float:
        seen.add(mean_figure(values)(weight))
        return mean_figure(values)(weight)

    found = clusters.interval(figure)
    assert seen == {0.0, 0.5, 1.0}
    assert (found.value, found.low, found.high, found.resamples) == (0.5, 0.0, 1.0, 200)
    assert clusters.interval(mean_figure(values)) == found  # the same draws again
    only = clusters.interval(mean_figure([0.0] * 5), np.arange(10) < 5)
    assert (only.value, only.low, only.high) == (0.0, 0.0, 0.0) and only.resamples < 200
    alone = Clusters(["a", "a"]).interval(mean_figure([0.0, 1.0]))
    assert (alone.value, alone.low, alone.resamples) == (0.5, None, 0)
    assert Clusters([]).interval(mean_figure([])).value is None
    with pytest.raises(ValueError, match="resamples: got -1"):
        Clusters(["a"], resamples=-1)


def test_the_interval_of_a_biased_figure_reaches_as_far_to_both_sides() -> None:
    clusters = Clusters([*"abcdefgh"], resamples=100)
    rare = mean_figure([0.0] * 7 + [1.0])
    plain, wide = (clusters.interval(rare, biased=biased) for biased in (False, True))
    assert (plain.low, plain.high) == (0.0, 0.375) and (wide.low, wide.high) == (0.0, 0.375)
    common = mean_figure([1.0] * 7 + [0.0])
    assert clusters.interval(common, biased=True).high == 1.0
    same_side = Clusters([*"ab"], resamples=100)

    def noisy(weight: np.ndarray) -> float:
        return 0.5 if bool((weight == 1).all()) else 0.25

    assert same_side.interval(noisy, biased=True).high == 0.75


def test_intervals_of_an_overlap_hold_the_truth() -> None:
    """Histograms of known overlap: uniform ones of width 1, 0.4 apart, in bins of a fifth: 0.6."""
    source, held, runs = np.random.default_rng(0), 0, 60
    for _ in range(runs):
        right = source.random(300) < 0.5
        score = (source.random(300) + np.where(right, 0.4, 0.0)) / 1.4
        found = Clusters(range(300), resamples=100).interval(
            overlap_figure(right, score, bins=7), biased=True
        )
        assert found.low is not None and found.high is not None
        held += found.low <= 0.6 <= found.high
    assert held >= 0.85 * runs


def test_analysis_by_hand() -> None:
    nan = math.nan
    found = confidence_analysis(
        right=[1, 0, 1, 0],
        match=[1, 1, 0, 0],
        answer_confidence=[0.9, 0.4, 0.8, nan],
        sequence_confidence=[0.5, 0.6, 0.5, 0.5],
        min_prob=[0.85, 0.4, 0.15, nan],
        video=["a", "a", "b", "c"],
        resamples=50,
    )
    assert (found.answers, found.videos, found.answer.answers, found.sequence.answers) == (4, 3, 3, 4)
    assert found.accuracy.value == found.match.value == 0.5
    assert found.answer.auroc.value == 1.0 and found.answer.overlap.value == 0.0
    assert found.sequence.auroc.value == 0.25 and found.min_prob_auroc.value == 1.0
    assert sum(found.answer.histogram_right) == 2 and found.answer.histogram_wrong[8] == 1
    assert [b.share for b in found.min_prob_match if b.count] == [0.0, 1.0, 1.0]
    # bins of a tenth: |0 - 0.4| / 3 + |1 - 0.8| / 3 + |1 - 0.9| / 3
    assert_as_exact_as_a_double(found.answer.calibration_error.value or 0.0, 0.7 / 3, name="error")
    assert found == confidence_analysis(
        [1, 0, 1, 0], [1, 1, 0, 0], [0.9, 0.4, 0.8, nan], [0.5, 0.6, 0.5, 0.5], [0.85, 0.4, 0.15, nan],
        ["a", "a", "b", "c"], resamples=50,
    )  # fmt: skip
    with pytest.raises(ValueError, match="match: got 2 values, wanted 1"):
        confidence_analysis([1], [1, 0], [0.5], [0.5], [0.5], ["a"])
