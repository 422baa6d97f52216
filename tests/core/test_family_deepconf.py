"""DeepConf's windows, vote and early stop on values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import raise_core as rc
from raise_core.family.deepconf import PARTS, window_means
from tests.budget import assert_as_exact_as_a_double, assert_equal_but_for_roundings

C = torch.tensor([4.0, 2.0, 6.0, 8.0, 1.0, 3.0], dtype=torch.float64)
OFFSETS = torch.tensor([0, 5, 5, 6])


@pytest.mark.parametrize(
    "part, window, share, wanted",
    [
        ("mean", 2, 0.1, [4.2, 0.0, 3.0]),
        ("tail", 2, 0.1, [4.5, 0.0, 3.0]),
        ("lowest", 2, 0.1, [3.0, 0.0, 3.0]),  # windows 3, 4, 7, 4.5
        ("bottom", 2, 0.1, [3.0, 0.0, 3.0]),
        ("bottom", 2, 0.5, [3.5, 0.0, 3.0]),
        ("bottom", 2, 1.0, [4.625, 0.0, 3.0]),
        ("lowest", 100, 0.1, [4.2, 0.0, 3.0]),  # shorter than a window: one window
    ],
)
def test_by_hand(part: str, window: int, share: float, wanted: list[float]) -> None:
    got = rc.deepconf(-C, OFFSETS, part=part, window=window, share=share)
    assert_equal_but_for_roundings(got, torch.tensor(wanted, dtype=torch.float64), name=part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_broken_token_stays_in_its_response(part: str, bad: float) -> None:
    broken = -C
    broken[4] = bad
    got = rc.deepconf(broken, OFFSETS, part=part, window=2)
    assert got[0].isnan() and got[1:].tolist() == [0.0, 3.0]


@given(values=st.lists(st.floats(0, 20), min_size=1, max_size=40), window=st.integers(1, 50))
def test_windows_are_what_a_loop_gives(values: list[float], window: int) -> None:
    size = min(window, len(values))
    want = [math.fsum(values[i : i + size]) / size for i in range(len(values) - size + 1)]
    own = torch.tensor(values, dtype=torch.float64)
    assert_equal_but_for_roundings(
        window_means(own, window), torch.tensor(want, dtype=torch.float64), name="windows"
    )


def test_a_vote_is_weighted() -> None:
    weight = torch.tensor([1.0, 5.0, 1.5, 9.0, math.nan])
    winner, total = rc.weighted_vote(["a", "b", "a", None, "a"], weight)
    assert winner == "b" and total == {"a": 2.5, "b": 5.0}
    assert rc.weighted_vote(["a", "b", "a"], torch.tensor([3.0, 5.0, 2.5]))[0] == "a"
    assert rc.weighted_vote(["a", "b", "a"], torch.tensor([3.0, 5.0, 2.5]), keep=0.34) == (
        "b",
        {"b": 5.0, "a": 3.0},
    )
    assert rc.weighted_vote(["x", "y"], torch.ones(2))[0] == "x"
    assert rc.weighted_vote([None], torch.ones(1)) == (None, {})
    with pytest.raises(ValueError, match="weight: got 1 entries, wanted one for each of 2 answers"):
        rc.weighted_vote(["a", "b"], torch.ones(1))
    with pytest.raises(ValueError, match="keep: got 0"):
        rc.weighted_vote(["a"], torch.ones(1), keep=0)


def test_a_response_ends_where_it_loses_confidence() -> None:
    stop = rc.EarlyStop(3.5, window=2)
    assert [stop.add(-c) for c in (1.0, 6.0, 2.0, 1.0)] == [False, False, False, True]
    assert stop.lowest == 1.5
    whole = rc.deepconf(-torch.tensor([1.0, 6, 2, 1]), torch.tensor([0, 4]), part="lowest", window=2)
    assert whole.item() == stop.lowest


def test_the_threshold_passes_the_wanted_share() -> None:
    lowest = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    for keep, want in ((0.1, 10.0), (0.9, 2.0), (0.5, 6.0)):
        stop = rc.EarlyStop.calibrated(lowest, keep=keep, window=4)
        assert_as_exact_as_a_double(stop.threshold, want, name=f"keep {keep}")
    assert rc.EarlyStop.calibrated(torch.tensor([math.nan, 3.0])).threshold == 3
    with pytest.raises(ValueError, match="0 finite values"):
        rc.EarlyStop.calibrated(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="window: got 0"):
        rc.EarlyStop(1.0, window=0)


def test_wrong_parts_and_windows() -> None:
    with pytest.raises(ValueError, match=r"part: got 'top', wanted one of mean, bottom, lowest, tail"):
        rc.deepconf(-C, OFFSETS, part="top")
    with pytest.raises(ValueError, match=r"window, share: got 0 and 0\.1"):
        rc.deepconf(-C, OFFSETS, window=0)
