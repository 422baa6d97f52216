"""The preference loss by hand, against fp64, in micro-batches, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from tests.budget import (
    assert_as_exact_as_a_double,
    assert_equal_but_for_roundings,
    assert_within_error_budget,
    close_to,
)


def pairs(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [(-20 * torch.rand(n, generator=source, dtype=torch.float64)).to(dtype) for _ in range(4)]


def reference(c: Tensor, r: Tensor, rc_: Tensor, rr: Tensor, beta: float) -> Tensor:
    d = beta * ((c.double() - rc_.double()) - (r.double() - rr.double()))
    return torch.log1p(torch.exp(-d)).mean()


def test_values_by_hand() -> None:
    # log ratios 2 and -2 nats at beta 0.5: margin 2, and equal ones: margin 0
    c, r = torch.tensor([-3.0, -5.0]).double(), torch.tensor([-6.0, -7.0]).double()
    ref_c, ref_r = torch.tensor([-5.0, -4.0]).double(), torch.tensor([-4.0, -6.0]).double()
    made = rc.dpo_loss(c, r, ref_c, ref_r, beta=0.5, chosen_tokens=torch.tensor([3, 5]), nll_weight=2.0)
    want = (math.log1p(math.exp(-2.0)) + math.log(2.0)) / 2 + 2.0 * (3 / 3 + 5 / 5) / 2
    assert_as_exact_as_a_double(float(made.loss), want, name="loss")
    got = {name: float(value) for name, value in made.metrics.items()}
    assert got == {
        "margin": 1.0, "accuracy": 0.5, "chosen_reward": 0.25, "rejected_reward": -0.75, "nll": 1.0,
    }  # fmt: skip


def test_no_pairs_and_equal_models() -> None:
    none = torch.zeros(0, requires_grad=True)
    made = rc.dpo_loss(none, none, none, none)
    assert made.loss.item() == 0.0 and all(float(x) == 0.0 for x in made.metrics.values())
    made.loss.backward()
    c, r, *_ = pairs(5)
    assert_as_exact_as_a_double(float(rc.dpo_loss(c, r, c, r).loss), math.log(2.0), name="start")


def test_fp32_against_fp64() -> None:
    given = pairs(64, torch.float32)
    made = rc.dpo_loss(*given, beta=0.3)
    want = reference(*given, beta=0.3)
    c, r, a, b = given
    peer = -torch.nn.functional.logsigmoid(0.3 * (c - a) - 0.3 * (r - b)).mean()
    assert made.loss.dtype == torch.float32
    assert_within_error_budget(made.loss, want, peer + close_to(want) - want.float(), name="loss")


def test_far_margins_stay_finite() -> None:
    far = torch.tensor([-1e4, 0.0])
    made = rc.dpo_loss(far, far.flip(0), torch.zeros(2), torch.zeros(2), beta=1.0)
    assert float(made.loss) == 1e4 / 2


def test_gradient() -> None:
    c, r, ref_c, ref_r = pairs(4)
    c.requires_grad_()
    r.requires_grad_()

    def loss(c: Tensor, r: Tensor) -> Tensor:
        made = rc.dpo_loss(
            c, r, ref_c, ref_r, beta=0.2, nll_weight=0.7, chosen_tokens=torch.tensor([1, 2, 3, 4])
        )
        return made.loss

    assert torch.autograd.gradcheck(loss, (c, r))
    plain = rc.dpo_loss(c, r, ref_c, ref_r, beta=0.2).loss
    up, down = torch.autograd.grad(plain, (c, r))
    d = 0.2 * ((c - ref_c) - (r - ref_r)).detach()
    assert_equal_but_for_roundings(up, -0.2 * torch.sigmoid(-d) / 4, name="chosen")
    assert_equal_but_for_roundings(down, -up, name="rejected")


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 12), cut=st.integers(0, 12), beta=st.floats(0.01, 2.0))
def test_micro_batches_add_up(n: int, cut: int, beta: float) -> None:
    every = pairs(n, seed=n)
    whole = rc.dpo_loss(*every, beta=beta)
    parts = [
        rc.dpo_loss(*(x[piece] for x in every), beta=beta, num_pairs=n)
        for piece in (slice(0, cut), slice(cut, n))
    ]
    assert_equal_but_for_roundings(sum(p.loss for p in parts), whole.loss, name="loss")
    for name in whole.metrics:
        total = sum(p.metrics[name] for p in parts)
        assert_equal_but_for_roundings(total, whole.metrics[name], name=name)


def test_packed_completions() -> None:
    logp = torch.tensor([-1.0, -2.0, -0.5, -4.0, -1.0], requires_grad=True)
    sums = rc.span_logp(logp, torch.tensor([0, 2, 5]), reduce="sum")
    made = rc.dpo_loss(sums[0::2], sums[1::2], torch.tensor([-3.0]), torch.tensor([-5.5]))
    made.loss.backward()
    assert logp.grad is not None
    want = torch.tensor([-0.05, -0.05, 0.05, 0.05, 0.05], dtype=torch.float64)
    assert_within_error_budget(logp.grad, want, close_to(want), name="one slope a completion")


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"beta": 0.0}, ValueError, "beta: got 0.0"),
        ({"beta": math.inf}, ValueError, "beta: got inf"),
        ({"nll_weight": -1.0}, ValueError, "nll_weight: got -1.0"),
        ({"nll_weight": 1.0}, ValueError, "chosen_tokens: got None"),
        ({"num_pairs": -1}, ValueError, "num_pairs: got -1"),
        ({"ref_chosen": torch.zeros(3)}, ValueError, r"ref_chosen: got shape \[3\]"),
        ({"logp_rejected": torch.zeros(2, dtype=torch.long)}, TypeError, "logp_rejected: got torch.int64"),
        ({"logp_chosen": -1.0}, TypeError, "logp_chosen: got -1.0"),
        ({"chosen_tokens": [3, 5]}, TypeError, r"chosen_tokens: got \[3, 5\]"),
        ({"chosen_tokens": torch.ones(3)}, ValueError, r"chosen_tokens: got shape \[3\]"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], error: type[Exception], match: str) -> None:
    names = ("logp_chosen", "logp_rejected", "ref_chosen", "ref_rejected")
    given = dict.fromkeys(names, torch.zeros(2)) | changed
    with pytest.raises(error, match=match):
        rc.dpo_loss(**given)
