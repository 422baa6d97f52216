"""Paired statistics against tables of Student's t and values worked out by hand."""

from __future__ import annotations

import math

import pytest

from raise_trainer.study.statistics import detectable, deviation, paired, t_above, t_quantile

# printed tables of Student's t: p, degrees of freedom, quantile
QUANTILES = [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 7, 2.365), (0.95, 7, 1.895), (0.995, 3, 5.841)]


@pytest.mark.parametrize(("p", "df", "want"), QUANTILES)
def test_quantiles_are_those_of_the_printed_tables(p: float, df: int, want: float) -> None:
    assert round(t_quantile(p, df), 3) == want


def test_the_tail_at_known_points() -> None:
    """df 1 is Cauchy's: P(T > 1) = 1/4; df 2: P(T > t) = 1/2 - t / (2 sqrt(2 + t^2))."""
    assert round(t_above(1.0, 1), 6) == 0.25
    for t in (0.0, 0.7, 3.0):
        assert round(t_above(t, 2), 6) == round(0.5 - t / (2 * math.sqrt(2 + t * t)), 6)
    assert round(t_above(0.0, 5, 1.5), 6) == 0.933193  # the sign of T alone: Phi(1.5)


def test_an_interval_worked_out_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, sd 1, half width 4.302653 / sqrt(3)."""
    got = paired([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert (got.mean, got.sd, got.n) == (2.0, 1.0, 3)
    half = 4.30265273 / math.sqrt(3)
    assert round(got.low, 5) == round(2 - half, 5) and round(got.high, 5) == round(2 + half, 5)
    assert not got.clear and paired([0, 0, 0], [5, 6, 7]).clear and paired([5, 6, 7], [0, 0, 0]).clear


def test_what_all_seeds_share_does_not_widen_the_interval() -> None:
    shift = [0.0, 10.0, -3.0, 7.0]
    wide = paired([0.0] * 4, [0.1, 0.2, 0.3, 0.2])
    same = paired(shift, [s + d for s, d in zip(shift, [0.1, 0.2, 0.3, 0.2], strict=True)])
    assert round(wide.low, 9) == round(same.low, 9) and round(wide.high, 9) == round(same.high, 9)


def test_the_smallest_difference_at_the_usual_power() -> None:
    """n = 8, two-sided 5 %, power 80 %: an effect of 1.156 sd (tables of the paired t-test say 1.16)."""
    assert round(detectable(1.0, 8), 2) == 1.16
    assert round(detectable(0.02, 8), 4) == 0.0231 and detectable(1.0, 3) > detectable(1.0, 8)
    assert round(t_above(2.364624, 7, 1.156034 * math.sqrt(8)), 3) == 0.8


def test_one_pair_has_no_interval_and_none_is_refused() -> None:
    alone = paired([0.25], [0.5])
    assert alone.mean == 0.25 and math.isnan(alone.low) and math.isnan(alone.detectable) and not alone.clear
    with pytest.raises(ValueError, match="got 0 and 0 values, wanted the same n >= 1"):
        paired([], [])
    with pytest.raises(ValueError, match="got 1 and 2 values"):
        paired([1.0], [1.0, 2.0])


def test_equal_pairs_have_an_interval_of_no_width() -> None:
    got = paired([0.5, 0.25], [0.5, 0.25])
    assert (got.mean, got.low, got.high, got.sd, got.detectable) == (0, 0, 0, 0, 0)
    assert deviation([3.0]) == 0.0 and not got.clear
