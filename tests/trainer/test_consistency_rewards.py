"""Rewards inside groups that are all right, by hand; what is not recorded is not made up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raise_trainer.consistency.confidence import Confidence
from raise_trainer.consistency.discrimination import REWARDS, discrimination, recorded_rewards
from tests.budget import assert_as_exact_as_a_double, assert_as_exact_as_fp32


def test_confidence_of_tokens() -> None:
    half, tenth = math.log(0.5), math.log(0.1)
    found = Confidence.of([half, half, tenth, half], 1, 3)
    assert found.logp == (half, tenth)
    assert_as_exact_as_a_double(found.answer or 0, math.sqrt(0.05), name="answer")
    assert_as_exact_as_a_double(found.mean_p or 0, 0.3, name="mean")
    assert_as_exact_as_a_double(found.min_p or 0, 0.1, name="least")
    assert_as_exact_as_a_double(found.sequence or 0, (0.5**3 * 0.1) ** 0.25, name="sequence")
    assert Confidence.of([half]) == Confidence(sequence=math.exp(half)) and Confidence.of([]) == Confidence()
    with pytest.raises(ValueError, match="start, stop: got 0, 2"):
        Confidence.of([half], 0, 2)


def test_rewards_by_hand() -> None:
    """Two prompts: in the first the two likelier answers get GRPO-CARE's bonus of a half."""
    p = [0.9, 0.8, 0.4, 0.7, 0.6]
    known = [Confidence.of([math.log(x)], 0, 1) for x in p]
    known[4] = Confidence.of([math.log(0.6), math.log(0.2)], 0, 2)
    found = recorded_rewards(known, [1, 1, 1, 1, 0], ["a", "a", "a", "b", "b"], [1, 1, 1, 1, 1])
    assert tuple(found) == REWARDS
    assert found["0/1"].tolist() == [1, 1, 1, 1, 0]
    assert found["grpo-care"].tolist() == [1.5, 1.5, 1.0, 1.5, 0.0]  # mean of 0.9, 0.8, 0.4 is 0.7
    for got, want in zip(found["rlpr"], [0.9, 0.8, 0.4, 0.7, 0.4], strict=True):
        assert_as_exact_as_a_double(float(got), want, name="rlpr")
    for got, x in zip(found["scre"], p[:4], strict=False):
        assert_as_exact_as_fp32(float(got), x ** math.exp(-0.1), name="scre")
    assert found["scre"][4] == 0


def test_what_is_not_recorded() -> None:
    known = [Confidence(answer=0.5, mean_p=0.6, min_p=0.4), Confidence.of([-0.1], 0, 1), Confidence()]
    found = recorded_rewards(known, [1, 1, 1], [0, 0, 1], [1, 0, 1])
    assert np.isnan(found["scre"]).tolist() == [True, False, True]
    assert np.isnan(found["rlpr"]).tolist() == [False, True, True]
    assert np.isnan(found["grpo-care"]).tolist() == [False, False, True]
    impossible = recorded_rewards([Confidence.of([-math.inf], 0, 1)], [1], [0], [1])
    assert impossible["grpo-care"].tolist() == [1.5] and impossible["rlpr"].tolist() == [0.0]


def test_discrimination_by_hand() -> None:
    """Group a: one of two pairs in order. b: a tie. c is not all right, d is alone, e has one kind only."""
    group = [*"aaa", *"bb", *"cc", "d", *"ee"]
    reward = [0.9, 0.5, 0.95, 0.7, 0.7, 0.2, 0.9, 0.3, 0.4, 0.6]
    support = [1, 0, 0, 1, 0, 1, 0, 1, 1, 1]
    right = [1, 1, 1, 1, 1, 1, 0, 1, 1, 1]
    found = discrimination(reward, support, right, group, group, resamples=20)
    assert (found.groups, found.mixed, found.pairs) == (3, 2, 3)
    assert_as_exact_as_a_double(found.auroc.value or 0, 1.5 / 3, name="auroc")
    # a: 0.9 - 0.725, b: 0
    assert_as_exact_as_a_double(found.difference.value or 0, 0.175 / 2, name="difference")
    spread = (np.std([0.9, 0.5, 0.95]) + 0 + 0.1) / 3
    assert_as_exact_as_a_double(found.spread.value or 0, float(spread), name="spread")
    plain = discrimination([1.0] * 10, support, right, group, group, resamples=20)
    assert (plain.auroc.value, plain.difference.value, plain.spread.value) == (0.5, 0.0, 0.0)


def test_unknown_support_makes_no_pairs_and_unknown_rewards_no_group() -> None:
    found = discrimination([0.9, 0.1, 0.5], [1, 0, 0], [1, 1, 1], "aaa", "vvv", known=[1, 0, 1])
    assert (found.groups, found.pairs, found.auroc.value, found.auroc.low) == (1, 1, 1.0, None)
    assert found.difference.value == 0.4
    none = discrimination([0.9, math.nan], [1, 0], [1, 1], "aa", "vv")
    assert (none.groups, none.auroc.value, none.spread.value) == (0, None, None)
    with pytest.raises(ValueError, match="support: got 1 values, wanted 2"):
        discrimination([0.9, 0.1], [1], [1, 1], "aa", "vv")
