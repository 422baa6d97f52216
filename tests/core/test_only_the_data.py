"""What only the data shows: a NaN for its own row or span, and an empty result where nothing is scored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_core.spans import Spans

every_impl = pytest.mark.parametrize("impl", ["reference", "native", "triton"])
NAN = float("nan")


def of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


@every_impl
@pytest.mark.parametrize("linear", [False, True])
def test_what_only_the_data_shows_is_nan_for_its_row(impl: str, linear: bool) -> None:
    hidden, weight = torch.randn(6, 3), torch.randn(9, 3)
    hidden[1, 2] = NAN
    y = of(1, 1, 9, -1, 2**40, -100, 4, 4)
    rows = of(0, 1, 2, 3, 4, 5, 6, -1)
    if linear:
        logp = rc.linear_token_stats(hidden, weight, y, rows=rows, impl=impl).logp
    else:
        logp = rc.token_stats(hidden @ weight.T, y, rows=rows, impl=impl).logp
    assert logp is not None
    assert logp.isnan().tolist() == [False, True, True, True, True, False, True, True]
    assert logp[5] == 0


@every_impl
def test_nothing_to_score_is_no_error(impl: str) -> None:
    none = torch.zeros(0, dtype=torch.long)
    empty = rc.token_stats(torch.randn(3, 9), none, rows=none, impl=impl).logp
    assert empty is not None and empty.shape == (0,)
    hidden = rc.linear_token_stats(torch.randn(3, 4), torch.randn(9, 4), none, rows=none, impl=impl).logp
    assert hidden is not None and hidden.shape == (0,)
    offsets = of(0, 0, 0)
    assert rc.scre(empty, offsets, impl=impl).tolist() == [0, 0]
    assert rc.span_logp(empty, offsets, impl=impl).tolist() == [0, 0]
    assert rc.scre(empty, of(0), impl=impl).shape == (0,)
    assert rc.igsr(empty, offsets, torch.tensor([0.5, 1.0]), of(0, 0), impl=impl).tolist() == [0, 0]
    loss = rc.linear_policy_loss(
        torch.randn(3, 4), torch.randn(9, 4), none, None, torch.ones(2), offsets,
        rows=none, num_tokens=0, num_sequences=0, impl=impl,
    ).loss  # fmt: skip
    assert loss == 0


@every_impl
@pytest.mark.parametrize("score", [NAN, -0.1, 1.5])
def test_a_score_outside_the_unit_interval_is_nan_for_its_span(impl: str, score: float) -> None:
    spans = Spans(of(0, 1, 2, 3), of(1, 2, 3, 4), of(0, 2, 4), of(0, 0), of(0, 1))
    scores, logits = torch.tensor([score, 0.5]), torch.randn(4, 9)
    for strict in (torch.tensor([True, False]), torch.tensor([False, False])):
        reward = rc.confidence_rewards(spans, scores, strict, logits=logits, impl=impl).reward
        assert reward.isnan().tolist() == [True, False]
    alone = rc.igsr(-torch.ones(4), of(0, 2, 4), scores, of(0, 0), impl=impl)
    assert alone.isnan().tolist() == [True, False]


class _OnlyOnTheDevice(Tensor):
    """A CPU tensor that counts as one whose values the host cannot read for free."""


def test_bounds_that_only_the_device_knows_cost_only_their_tokens() -> None:
    bounds = of(0, 2, 3).as_subclass(_OnlyOnTheDevice)
    loss = rc.policy_loss(
        torch.zeros(4), torch.zeros(4), torch.ones(2), bounds, kind="dapo", num_tokens=4, num_sequences=2
    )
    assert loss.loss.isnan()
    logp = -torch.ones(4)
    got = rc.scre(logp, of(0, 2, 9).as_subclass(_OnlyOnTheDevice), impl="triton")
    assert got.isnan().tolist() == [False, True]
