"""T-GRPO's and GRPO-CARE's bonuses against values worked out by hand, and what holds for every input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raise_core.bonuses import consistency_bonus, temporal_bonus
from tests.budget import assert_exact

ACC = st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0])


def packed(*spans: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.tensor([x for span in spans for x in span], dtype=torch.float64)
    return logp, torch.tensor([0, *map(len, spans)]).cumsum(0)


def flags(bonus: torch.Tensor) -> list[bool]:
    return (bonus > 0).tolist()


def test_order_that_helps_is_rewarded_where_the_answer_is_right() -> None:
    """Group 0: mean 0.5 against 0.8 * 0.5; group 7: 0.25 against 0.8 * 1; group 3 has no video."""
    acc = torch.tensor([1.0, 0, 1, 0, 0.5, 0.25, 0, 0.25, 1, 1])
    group = torch.tensor([0, 0, 0, 0, 7, 7, 7, 7, 3, 3])
    shuffled = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 7, 0, 7])
    got = temporal_bonus(acc, shuffled[0].float(), group, shuffled[1])
    assert_exact(got, torch.tensor([0.3, 0, 0.3, 0, 0, 0, 0, 0, 0, 0]), name="bonus")


@pytest.mark.parametrize("shuffled, given", [(0.625, True), (0.64, False)])
def test_four_fifths_of_the_shuffled_accuracy_are_enough(shuffled: float, given: bool) -> None:
    acc = torch.tensor([1.0, 0.0], dtype=torch.float64)
    got = temporal_bonus(acc, acc.new_tensor([shuffled]), torch.tensor([4, 4]), torch.tensor([4]))
    assert flags(got) == [given, False]


def test_an_accuracy_of_a_tenth_is_not_above_a_tenth() -> None:
    acc, one = torch.tensor([0.1, 0.2]), torch.tensor([0])
    assert flags(temporal_bonus(acc, torch.zeros(1), one.expand(2), one)) == [False, True]
    logp, offsets = packed([-0.1])
    assert flags(consistency_bonus(logp, offsets, acc[:1], one)) == [False]


def test_likely_answers_of_the_accurate_are_rewarded() -> None:
    """L = 0.8, 0.5, 0.95 (cut from 1), 0.9; mean accuracy 0.675 leaves out the last; mean L is 0.75."""
    logp, offsets = packed([math.log(0.8)] * 3, [math.log(0.25), 0.0], [0.0], [math.log(0.9)])
    acc = torch.tensor([1.0, 0.7, 0.8, 0.2], dtype=torch.float64)
    got = consistency_bonus(logp, offsets, acc, torch.zeros(4, dtype=torch.long))
    assert_exact(got, torch.tensor([0.5, 0, 0.4, 0], dtype=torch.float64), name="bonus")


@pytest.mark.parametrize("margin, given", [(0.0, False), (0.049, False), (0.051, True)])
def test_the_margin_lets_in_what_is_nearly_as_likely(margin: float, given: bool) -> None:
    """L = 0.8 and 0.9, mean 0.85."""
    logp, offsets = packed([math.log(0.8)], [math.log(0.9)])
    acc, group = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    assert flags(consistency_bonus(logp, offsets, acc, group, margin=margin)) == [given, True]


def test_answers_above_the_upper_bound_count_alike() -> None:
    logp, offsets = packed([math.log(0.951)], [math.log(0.999)], [0.0])
    acc, group = torch.ones(3), torch.zeros(3, dtype=torch.long)
    assert flags(consistency_bonus(logp, offsets, acc, group, margin=0.0)) == [True] * 3
    assert flags(consistency_bonus(logp, offsets, acc, group, margin=0.0, upper=1.0)) == [False, True, True]


def test_an_answer_without_tokens_is_never_likely() -> None:
    """It has no bonus, and does not raise the bar for the other one."""
    logp, offsets = packed([], [math.log(0.3)])
    got = consistency_bonus(logp, offsets, torch.ones(2), torch.zeros(2, dtype=torch.long), margin=0.0)
    assert_exact(got, torch.tensor([0.0, 0.5]), name="bonus")
    none = consistency_bonus(*packed(), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert none.shape == (0,)


def test_an_answer_of_probability_zero_has_likelihood_zero() -> None:
    logp, offsets = packed([-math.inf, -0.1], [-0.2])
    got = consistency_bonus(logp, offsets, torch.ones(2), torch.zeros(2, dtype=torch.long))
    assert_exact(got, torch.tensor([0.0, 0.5]), name="bonus")


GROUPS = st.lists(
    st.tuples(st.integers(0, 2), ACC, st.lists(st.floats(-5, 0), max_size=3)), min_size=1, max_size=10
)


@given(rows=GROUPS, order=st.randoms(use_true_random=False))
def test_groups_apart_and_in_any_order(rows: list[tuple[int, float, list[float]]], order: Any) -> None:
    """A group alone has the bonuses it has among others, and permuting the completions permutes them."""

    def bonuses(some: list[tuple[int, float, list[float]]]) -> tuple[list[bool], list[bool]]:
        acc = torch.tensor([a for _, a, _ in some], dtype=torch.float64)
        group = torch.tensor([g for g, _, _ in some])
        care = consistency_bonus(*packed(*(s for *_, s in some)), acc, group, margin=0.0)
        return flags(care), flags(temporal_bonus(acc, acc[::2], group, group[::2]))

    care, _ = bonuses(rows)
    for one in range(3):
        mine = [i for i, (g, *_) in enumerate(rows) if g == one]
        if mine:
            assert bonuses([rows[i] for i in mine])[0] == [care[i] for i in mine]
            able = [i for i in mine if rows[i][1] > 0.1 and rows[i][2]]
            best = [i for i in able if rows[i][1] == max(rows[j][1] for j in mine)]
            assert not best or any(care[i] for i in mine), "the likeliest of the accurate has it"
    places = list(range(len(rows)))
    order.shuffle(places)
    likely = [math.fsum(s) / max(len(s), 1) for *_, s in rows]
    if len(set(likely)) == len(likely):  # a tie with the mean may turn with the order of its sum
        assert bonuses([rows[i] for i in places])[0] == [care[i] for i in places]


@given(acc=st.lists(ACC, min_size=1, max_size=8), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_bonuses_go_to_right_answers_alone(acc: list[float], share: float) -> None:
    values, group = torch.tensor(acc, dtype=torch.float64), torch.zeros(len(acc), dtype=torch.long)
    bonus = temporal_bonus(values, values * share, group, group, weight=0.7)
    assert_exact(bonus, 0.7 * (values > 0.1).double(), name="bonus")


def test_equal_values_are_not_below_their_mean() -> None:
    """Sums of thirds and tenths round up; the mean of equal values must not."""
    for n in range(1, 40):
        logp, offsets = packed(*[[math.log(0.1) / 3]] * n)
        acc = torch.full((n,), 0.7, dtype=torch.float64)
        got = consistency_bonus(logp, offsets, acc, torch.zeros(n, dtype=torch.long), margin=0.0)
        assert flags(got) == [True] * n


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"acc": [1.0, 1.0]}, TypeError, "acc: got list, wanted a 1-D tensor"),
        ({"acc": torch.ones(2, dtype=torch.long)}, TypeError, "acc: got torch.int64, wanted a floating"),
        ({"group": torch.zeros(2)}, TypeError, "group: got torch.float32, wanted integer"),
        ({"group": torch.zeros(3, dtype=torch.long)}, ValueError, r"acc, group: got shapes \[2\] and \[3\]"),
        ({"acc": torch.tensor([1.0, math.nan])}, ValueError, r"acc\[1\]: got nan"),
        ({"weight": -1.0}, ValueError, "weight: got -1.0"),
        ({"margin": math.inf}, ValueError, "margin: got inf"),
        ({"upper": 0.0}, ValueError, "upper: got 0.0"),
        ({"logp": torch.zeros(2, 1)}, ValueError, r"logp: got torch.float32 of shape \[2, 1\]"),
        ({"logp": torch.tensor([0.0, math.nan])}, ValueError, "logp: NaN in the answer of completion 1"),
        ({"offsets": torch.tensor([0, 2])}, ValueError, r"offsets: got shape \[2\], wanted \[3\]"),
        ({"offsets": torch.tensor([0, 1, 3])}, ValueError, "offsets must rise from 0 to 2"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], error: Any, message: str) -> None:
    good: dict[str, Any] = {
        "logp": torch.zeros(2), "offsets": torch.arange(3), "acc": torch.ones(2),
        "group": torch.zeros(2, dtype=torch.long),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        consistency_bonus(**(good | change))


def test_shuffled_accuracies_are_checked_by_their_own_names() -> None:
    acc, group = torch.ones(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"acc_shuffled\[0\]: got inf"):
        temporal_bonus(acc, torch.tensor([math.inf]), group, group[:1])
    with pytest.raises(TypeError, match=r"group_shuffled: got torch\.float32"):
        temporal_bonus(acc, torch.ones(1), group, torch.zeros(1))
    with pytest.raises(ValueError, match="ratio: got -1"):
        temporal_bonus(acc, torch.ones(1), group, group[:1], ratio=-1)
