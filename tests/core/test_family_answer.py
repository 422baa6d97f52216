"""Rewards of answers and of whole responses on values computed by hand, empty spans and NaN among them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from raise_core.family.segments import EMPTY_MEAN, EMPTY_SUM
from tests.budget import assert_equal_but_for_roundings, assert_exact, close_to

P = ([0.5, 0.25], [], [0.8], [0.9, 0.6, 0.3])  # probabilities of the tokens of four spans
OFFSETS = torch.tensor([0, 2, 2, 3, 6])
PROB = torch.tensor([p for span in P for p in span], dtype=torch.float64)
LOGP = PROB.log()
ANSWER = {
    "sequence_likelihood": [0.125, 0.0, 0.8, 0.162],
    "sum_logp": [math.log(0.125), EMPTY_SUM, math.log(0.8), math.log(0.162)],
    "mean_logp": [math.log(0.125) / 2, EMPTY_MEAN, math.log(0.8), math.log(0.162) / 3],
    "mean_prob": [0.375, 0.0, 0.8, 0.6],
    "min_prob": [0.25, 0.0, 0.8, 0.3],
    "rlpr": [0.375, 0.0, 0.8, 0.6],
    "em_rl_sequence": [math.log(0.125), EMPTY_SUM, math.log(0.8), math.log(0.162)],
}
VALUES = torch.tensor([1.0, 3.0, 0.5, 2.0, 4.0, 6.0], dtype=torch.float64)
RESPONSE = {
    "intuitor": [2.0, 0.0, 0.5, 4.0],
    "rent": [-2.0, -7.0, -0.5, -4.0],
    "em_rl_token": [-4.0, EMPTY_SUM, -0.5, -12.0],
}
CASES = [*((n, LOGP, w) for n, w in ANSWER.items()), *((n, VALUES, w) for n, w in RESPONSE.items())]
NAMES = [name for name, *_ in CASES]


def of(name: str) -> Callable[..., Tensor]:
    return getattr(rc, name)


@pytest.mark.parametrize("name, values, wanted", CASES, ids=NAMES)
def test_by_hand(name: str, values: Tensor, wanted: list[float]) -> None:
    """Also in fp32, and from bfloat16 that is not rounded any further."""
    want = torch.tensor(wanted, dtype=torch.float64)
    assert_equal_but_for_roundings(of(name)(values, OFFSETS), want, name=name)
    single = of(name)(values.float(), OFFSETS)
    assert single.dtype == torch.float32
    half = of(name)(values.bfloat16(), OFFSETS)
    assert_exact(half, of(name)(values.bfloat16().float(), OFFSETS), name="bfloat16")


@pytest.mark.parametrize("name, values, wanted", CASES, ids=NAMES)
def test_nothing_at_all_and_only_empty_spans(name: str, values: Tensor, wanted: list[float]) -> None:
    none = values.new_zeros(0)
    assert of(name)(none, torch.tensor([0])).shape == (0,)
    empty = of(name)(none, torch.tensor([0, 0, 0]))
    assert empty.tolist() == [wanted[1]] * 2
    assert wanted[1] <= min(wanted)  # never above what a span of tokens gets


@pytest.mark.parametrize("name, values, wanted", CASES, ids=NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_stays_in_its_span(name: str, values: Tensor, wanted: list[float], bad: float) -> None:
    broken = values.clone()
    broken[1] = bad
    got, clean = of(name)(broken, OFFSETS), of(name)(values, OFFSETS)
    assert not got[0].isfinite() and (math.isinf(bad) or got[0].isnan())
    assert_exact(got[1:], clean[1:], name="others")


@pytest.mark.parametrize("name", ["sequence_likelihood", "mean_prob", "min_prob", "rlpr"])
def test_a_token_of_probability_zero(name: str) -> None:
    logp = torch.tensor([0.0, -math.inf])
    assert of(name)(logp, torch.tensor([0, 2])).item() == {"mean_prob": 0.5, "rlpr": 0.5}.get(name, 0.0)


@given(logp=st.lists(st.floats(-30, 0), min_size=1, max_size=12))
def test_probabilities_are_ordered(logp: list[float]) -> None:
    """Product <= least <= mean, all in [0, 1]; the logs agree."""
    values, offsets = torch.tensor(logp, dtype=torch.float64), torch.tensor([0, len(logp)])
    product, least, mean = (of(n)(values, offsets) for n in ("sequence_likelihood", "min_prob", "mean_prob"))
    assert 0 <= product <= least <= 1 and mean <= close_to(torch.ones(1).double())
    assert least <= mean or math.isclose(least, mean)
    assert_equal_but_for_roundings(rc.sum_logp(values, offsets).exp(), product, name="sum")
    assert_equal_but_for_roundings(
        rc.mean_logp(values, offsets) * len(logp), rc.sum_logp(values, offsets), name="mean"
    )


@pytest.mark.parametrize("name, values, wanted", CASES, ids=NAMES)
def test_differentiable(name: str, values: Tensor, wanted: list[float]) -> None:
    leaf = values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: of(name)(x, OFFSETS), (leaf,))


def test_rlpr_takes_off_what_is_likely_anyway() -> None:
    baseline = torch.tensor([0.1, 0.2, 0.9, 0.6], dtype=torch.float64)
    got = rc.rlpr(LOGP, OFFSETS, baseline)
    want = torch.tensor([0.275, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert_equal_but_for_roundings(got, want, name="debiased")
    baseline[0] = math.nan
    assert rc.rlpr(LOGP, OFFSETS, baseline).isnan().tolist() == [True, False, False, False]


def test_rent_counts_a_missing_answer_as_uncertain() -> None:
    answered = torch.tensor([True, True, False, True])
    got = rc.rent(VALUES, OFFSETS, answered=answered, missing=9.0)
    assert got.tolist() == [-2.0, -9.0, -9.0, -4.0]


BAD = [
    (lambda: rc.mean_prob([0.0], OFFSETS), TypeError, "logp: got list"),
    (lambda: rc.mean_prob(torch.zeros(6, dtype=torch.long), OFFSETS), TypeError, "logp: got torch.int64"),
    (lambda: rc.mean_prob(torch.zeros(2, 3), OFFSETS), TypeError, r"of shape \[2, 3\]"),
    (lambda: rc.mean_prob(LOGP, OFFSETS.float()), TypeError, "offsets: got torch.float32"),
    (lambda: rc.mean_prob(LOGP[:5], OFFSETS), ValueError, r"over 5 tokens, wanted bounds"),
    (lambda: rc.mean_prob(LOGP, torch.tensor([0, 4, 2, 6])), ValueError, "never fall"),
    (lambda: rc.mean_prob(LOGP, torch.tensor([1, 6])), ValueError, "start at 0"),
    (lambda: rc.mean_prob(LOGP, torch.tensor([], dtype=torch.long)), ValueError, "start at 0"),
    (lambda: rc.rlpr(LOGP, OFFSETS, torch.zeros(3)), ValueError, r"baseline: got shape \[3\], wanted \[4\]"),
    (lambda: rc.rlpr(LOGP, OFFSETS, [0.0] * 4), TypeError, "baseline: got list"),
    (lambda: rc.rent(VALUES, OFFSETS, answered=torch.ones(2)), ValueError, "answered: got shape"),
    (lambda: rc.intuitor(VALUES[:3], OFFSETS), ValueError, "offsets"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for *_, message in BAD])
def test_wrong_arguments(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
