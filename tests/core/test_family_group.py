"""JEPO, NOVER and the filter of prompts on values computed by hand; groups of one, split groups, NaN."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from raise_core.family.group import LEAST
from tests.budget import assert_as_exact_as_a_double, assert_equal_but_for_roundings, assert_exact


def one_token_each(p: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(p, dtype=torch.float64).log(), torch.arange(len(p) + 1)


def test_jepo_by_hand() -> None:
    """Likelihoods 0.2, 0.4 (two tokens), 0.6: R = log 0.4; without them log 0.5, log 0.4, log 0.3."""
    logp = torch.tensor([0.2, 0.5, 0.8, 0.6, 0.3], dtype=torch.float64).log()
    got = rc.jepo(logp, torch.tensor([0, 1, 3, 4, 5]), torch.tensor([4, 4, 4, 9]), group_size=None)
    want = [math.log(0.4 / 0.5), 0.0, math.log(0.4 / 0.3), 0.0]
    assert_equal_but_for_roundings(got, torch.tensor(want, dtype=torch.float64), name="jepo")


def test_jepo_of_answers_that_are_far_too_long_for_a_probability() -> None:
    logp, offsets = torch.tensor([-1200.0, -1300.0], dtype=torch.float64), torch.arange(3)
    got = rc.jepo(logp, offsets, torch.zeros(2, dtype=torch.long))
    want = torch.tensor([100 - math.log(2), -math.log(2)], dtype=torch.float64)
    assert_equal_but_for_roundings(got, want, name="long")


def test_jepo_counts_an_empty_answer_as_impossible_and_leaves_a_nan_out() -> None:
    group = torch.zeros(3, dtype=torch.long)
    logp, offsets = torch.tensor([0.5, 0.5]).log(), torch.tensor([0, 1, 1, 2])
    got = rc.jepo(logp, offsets, group)
    assert got[1] < 0 < got[0] == got[2]
    assert_as_exact_as_a_double(
        rc.jepo(logp.double(), offsets, group)[1].item(), math.log(2 / 3), name="empty"
    )
    broken = torch.tensor([0.5, 0.25, math.nan], dtype=torch.float64).log()
    left = rc.jepo(broken, torch.arange(4), group)
    assert left[2].isnan()
    assert_exact(left[:2], rc.jepo(broken[:2], torch.arange(3), group[:2]), name="without it")
    nobody = rc.jepo(torch.tensor([-math.inf] * 2), torch.arange(3), group[:2])
    assert nobody.tolist() == [0.0, 0.0]
    lone = rc.jepo(torch.tensor([-1.0, -math.inf]).double(), torch.arange(3), group[:2])
    assert lone.isfinite().all() and lone[0] > -LEAST - 10 and lone[1] < 0


def test_nover_by_hand() -> None:
    """NLL 1, 2, 3 with 10, 1000, 1 reasoning tokens: log P is 1/2, 2/4, 3/1; the fourth has not the form."""
    logp = torch.tensor([-1.0, -2.0, -3.0, -0.1], dtype=torch.float64)
    tokens, group = torch.tensor([10, 1000, 1, 5]), torch.zeros(4, dtype=torch.long)
    valid = torch.tensor([True, True, True, False])
    got = rc.nover(logp, torch.arange(5), group, tokens, valid=valid)
    assert got.tolist() == [1.0, 1.0, 1 / 3, 0.0]  # equal P share rank 0; nobody is both longer and worse
    longer = rc.nover(logp, torch.arange(5), group, torch.tensor([1, 10, 1000, 5]), valid=valid)
    want = torch.tensor([2 / 3, 2 / 3, 1.0, 0.0], dtype=torch.float64)  # log P 1, 2/2, 3/4
    assert_equal_but_for_roundings(longer, want, name="ranks")


def test_nover_rewards_the_short_and_certain() -> None:
    logp, tokens = torch.tensor([-1.0, -9.0, -8.0]).double(), torch.tensor([2, 5, 9])
    got = rc.nover(logp, torch.arange(4), torch.zeros(3, dtype=torch.long), tokens)
    want = torch.tensor([1 + 2 / 2, 1 / 3, 2 / 3], dtype=torch.float64)
    assert_equal_but_for_roundings(got, want, name="efficiency")
    same = rc.nover(logp[:2], torch.arange(3), torch.zeros(2, dtype=torch.long), torch.tensor([4, 4]))
    assert same.tolist() == [1.0, 0.5]  # as long as the other is not longer


def test_nover_of_one_of_none_and_of_nan() -> None:
    group, tokens = torch.tensor([0, 1, 1, 1]), torch.tensor([3, 3, 3, 3])
    logp, offsets = torch.tensor([-1.0, math.nan, -2.0]), torch.tensor([0, 1, 2, 2, 3])
    got = rc.nover(logp, offsets, group, tokens)
    assert got[0] == 1 and got[1].isnan() and got[2:].tolist() == [0.0, 1.0]
    nobody = rc.nover(logp[:1], torch.tensor([0, 1]), group[:1], tokens[:1], valid=torch.tensor([False]))
    assert nobody.tolist() == [0.0]


@given(
    p=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8),
    seed=st.integers(0, 1000),
)
def test_the_order_of_a_group_does_not_matter(p: list[float], seed: int) -> None:
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))
    logp, offsets = one_token_each(p)
    group, tokens = torch.zeros(len(p), dtype=torch.long), torch.arange(1, len(p) + 1)
    assert_exact(
        rc.nover(logp[order], offsets, group, tokens[order]),
        rc.nover(logp, offsets, group, tokens)[order],
        name="nover",
    )
    both = rc.jepo(logp[order], offsets, group), rc.jepo(logp, offsets, group)[order]
    assert_equal_but_for_roundings(*both, name="jepo")


@pytest.mark.parametrize("name", ["jepo", "nover"])
def test_a_split_group_is_refused(name: str) -> None:
    logp, offsets = one_token_each([0.5, 0.5, 0.5])
    more = () if name == "jepo" else (torch.ones(3),)
    with pytest.raises(ValueError, match="prompt 7 has 1 of 2 completions here; a group that is split over"):
        getattr(rc, name)(logp, offsets, torch.tensor([3, 3, 7]), *more, group_size=2)
    with pytest.raises(TypeError, match="wanted integer prompt indices"):
        getattr(rc, name)(logp, offsets, torch.zeros(3), *more)


def filled(**options: float) -> tuple[rc.StdFilter, Tensor]:
    """A filter that has seen ten steps of std 0.5 and 0.1; the group numbers."""
    made, group = rc.StdFilter(**options), torch.tensor([0, 0, 5, 5])
    for _ in range(10):
        assert made.keep(rewards(0.5, 0.1), group).all()
    return made, group


def rewards(*stds: float) -> Tensor:
    """Pairs of rewards with these sample standard deviations."""
    return torch.tensor([x for s in stds for x in (0.0, s * math.sqrt(2))], dtype=torch.float64)


def test_the_filter_starts_late_and_compares_with_the_steps_before() -> None:
    made, group = filled()
    assert_as_exact_as_a_double(made.mean, statistics.mean([0.5, 0.1]), name="mean")
    assert made.keep(rewards(0.16, 0.14), group).tolist() == [True, True, False, False]
    assert_as_exact_as_a_double(made.mean, 0.3 + 0.01 * (0.15 - 0.3), name="moved")


def test_the_filter_goes_on_from_its_state() -> None:
    made, group = filled(beta=0.9)
    again = rc.StdFilter(beta=0.9)
    again.load_state_dict(made.state_dict())
    for stds in ((0.3, 0.2), (0.25, 0.4)):
        assert again.keep(rewards(*stds), group).tolist() == made.keep(rewards(*stds), group).tolist()
    assert again.state_dict() == made.state_dict()


def test_the_filter_leaves_single_completions_out_and_takes_an_empty_step() -> None:
    made, _ = filled()
    assert made.keep(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert made.keep(torch.ones(1), torch.zeros(1, dtype=torch.long)).tolist() == [False]


def test_the_filter_refuses_what_is_no_reward() -> None:
    made, group = rc.StdFilter(), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"rewards\[1\]: not finite"):
        made.keep(torch.tensor([0.0, math.nan]), group)
    with pytest.raises(TypeError, match="drop completions whose reward is None first"):
        made.keep([0.5, None], group)
    assert made.steps == 0
    with pytest.raises(ValueError, match="beta: got 2"):
        rc.StdFilter(beta=2)
