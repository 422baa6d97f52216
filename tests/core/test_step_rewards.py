"""Rewards of whole chains and advantages of steps, by hand."""

from __future__ import annotations

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
