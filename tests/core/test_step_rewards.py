"""Rewards of whole chains and advantages of steps, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from tests.budget import assert_exact, assert_within_error_budget, close_to


def test_trajectory_reward_by_hand() -> None:
    scores = torch.tensor([0.5, 1.0, 0.25, 0.0])
    offsets = torch.tensor([0, 2, 2, 4])
    answer = torch.tensor([1.0, 0.5, 0.0])
    want = torch.tensor([0.2 * 0.75 + 0.8, 0.8 * 0.5, 0.2 * 0.125], dtype=torch.float64)
    got = rc.trajectory_reward(scores, offsets, answer)
    assert_within_error_budget(got, want, close_to(want), name="shares 0.2 and 0.8")
    assert rc.trajectory_reward(scores, offsets, answer, 0.0).tolist() == answer.tolist()
    assert rc.trajectory_reward(scores, offsets, answer, 1.0).tolist() == [0.75, 0.0, 0.125]
    none = torch.zeros(0)
    assert rc.trajectory_reward(none, torch.tensor([0]), none).shape == (0,)
    assert rc.trajectory_reward(scores.double(), offsets, answer.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"step_share": 1.5}, "step_share: got 1.5"),
        ({"step_scores": torch.tensor([0.5, 1.2])}, r"step_scores\[1\]"),
        ({"answer_score": torch.tensor([float("nan")])}, r"answer_score\[0\]: got nan"),
        ({"offsets": torch.tensor([0, 1])}, "rise from 0 to 2"),
        ({"offsets": torch.tensor([0, 2, 2])}, "wanted 2 integers"),
    ],
)
def test_wrong_rewards_are_named(changed: dict[str, Tensor], match: str) -> None:
    given = {
        "step_scores": torch.tensor([0.5, 1.0]), "offsets": torch.tensor([0, 2]),
        "answer_score": torch.tensor([1.0]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        rc.trajectory_reward(**(given | changed))
    with pytest.raises(TypeError, match="answer_score: got 1"):
        rc.trajectory_reward(**(given | {"answer_score": 1}))


def spans() -> rc.Spans:
    """Two prompts: completions of 4 and 3 tokens with a step each, one of 5 with two and one without."""
    found = [
        [rc.Found(0, 2)], [rc.Found(1, 3)],
        [rc.Found(0, 2), rc.Found(3, 5)], [],
    ]  # fmt: skip
    ids = [[1] * 4, [1] * 3, [1] * 5, [1] * 2]
    return rc.build_spans(found, ids, [0, 4, 7, 12], [0, 0, 1, 1])


def test_step_advantages_by_hand() -> None:
    scores = torch.tensor([0.75, 0.25, 1.0, 0.0])
    got = rc.step_advantages(scores, spans(), 14, scale="none")
    first, second = [0.25, 0.25, 0, 0, 0, -0.25, -0.25], [0.5, 0.5, 0, -0.5, -0.5, 0, 0]
    assert got.tolist() == [*first, *second]
    by_group = rc.step_advantages(scores, spans(), 14)
    each = rc.group_advantages(scores, torch.tensor([0, 0, 1, 1]))
    assert by_group[[0, 5, 7, 10]].tolist() == each.tolist()


def test_equal_steps_and_no_steps_have_advantage_0() -> None:
    assert (rc.step_advantages(torch.full((4,), 0.7), spans(), 14) == 0).all()
    none = rc.build_spans([[], []], [[1, 2], [3]], [0, 2], [0, 0])
    assert_exact(rc.step_advantages(torch.zeros(0), none, 3), torch.zeros(3), name="no steps")


def test_wrong_steps_are_named() -> None:
    with pytest.raises(ValueError, match="wanted one for each of 4 steps"):
        rc.step_advantages(torch.zeros(3), spans(), 14)
    with pytest.raises(ValueError, match="num_tokens: got 11, but a step holds token 11"):
        rc.step_advantages(torch.zeros(4), spans(), 11)
    with pytest.raises(ValueError, match="finite"):
        rc.step_advantages(torch.tensor([0.0, float("nan"), 0.0, 0.0]), spans(), 14)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "gspo", "cispo", "sapo"])
def test_step_advantages_in_a_policy_loss(kind: Any) -> None:
    """On-policy the gradient of every kind is -A_t up to its normaliser: outcome and step advantages add."""
    offsets, outcome = torch.tensor([0, 4, 7, 12, 14]), torch.tensor([1.0, -1.0, 0.5, 0.0])
    step = rc.step_advantages(torch.tensor([0.75, 0.25, 1.0, 0.0]), spans(), 14, scale="none")
    each = outcome.repeat_interleave(offsets.diff()) + 0.5 * step
    logp = (-torch.rand(14)).requires_grad_()
    options = {"kind": kind, "num_tokens": 14, "num_sequences": 4, "token_advantage": 0.5 * step}
    (slope,) = torch.autograd.grad(rc.policy_loss(logp, None, outcome, offsets, **options).loss, logp)
    size = 14.0 if kind in ("dapo", "cispo") else 4 * offsets.diff().repeat_interleave(offsets.diff())
    want = (-each / size).double()
    assert_within_error_budget(slope, want, close_to(want), name=kind)
    hidden, weight = torch.randn(14, 6), torch.randn(9, 6, requires_grad=True)
    targets = torch.arange(14) % 9
    made = rc.linear_policy_loss(hidden, weight, targets, None, outcome, offsets, **options)
    own = rc.linear_token_stats(hidden, weight, targets).logp
    apart = rc.policy_loss(own, None, outcome, offsets, **options)
    pair = [torch.autograd.grad(loss, weight)[0] for loss in (made.loss, apart.loss)]
    assert_within_error_budget(pair[0], pair[1].double(), close_to(pair[1].double(), 8), name="linear")


def test_a_token_advantage_of_another_length_is_named() -> None:
    given = (torch.zeros(3), None, torch.zeros(1), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="token_advantage: got shape"):
        rc.policy_loss(*given, num_tokens=3, num_sequences=1, token_advantage=torch.zeros(2))
