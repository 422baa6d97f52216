"""A step that is not finite is left out whole: weights, optimizer and the counts afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_trainer.checkpoints import StepGuard, TooManyBadSteps
from raise_trainer.checkpoints.files import Reader
from raise_trainer.errors import UserError
from raise_trainer.method import Method
from raise_trainer.passes import Group
from raise_trainer.update import policy_step, sft_step
from tests.budget import assert_exact
from tests.tiny_models import completions, text_model, text_prompt

METHOD = Method(group_size=2, max_new_tokens=4)


def step_on(model: Any, optimizer: Any, advantage: list[float], guard: StepGuard | None) -> dict[str, float]:
    group = Group(text_prompt(5, seed=3), completions([2, 4], seed=0), torch.tensor(advantage), None)
    return policy_step(rc.Scorer(model), optimizer, [group], METHOD, guard=guard, step=7)


def test_a_step_that_is_not_finite_changes_nothing_and_its_batch_is_kept(tmp_path: Path) -> None:
    model, said = text_model("Qwen2").double(), list[str]()
    optimizer, guard = torch.optim.Adam(model.parameters()), StepGuard(tmp_path, say=said.append)
    before = {k: w.clone() for k, w in model.state_dict().items()}
    figures = step_on(model, optimizer, [1.0, float("nan")], guard)
    assert figures["skipped"] == 1.0 and (guard.skipped, guard.in_a_row) == (1, 1) and not optimizer.state
    for key, weight in model.state_dict().items():
        assert_exact(weight, before[key], name=key)
    (kept,) = Reader(tmp_path / "bad-step-7").tree("batch")["batch"]
    assert kept["completions"] == completions([2, 4], seed=0)
    assert_exact(kept["prompt"], text_prompt(5, seed=3)["input_ids"], name="prompt")
    assert "step 7 is skipped" in said[0]
    assert "skipped" not in step_on(model, optimizer, [1.0, -1.0], guard) and guard.in_a_row == 0
    assert max(float((w - before[k]).abs().max()) for k, w in model.state_dict().items()) > 0


def test_the_third_in_a_row_ends_the_run(tmp_path: Path) -> None:
    """Supervised steps too; without a guard the first one does."""
    model = text_model("Qwen2")
    optimizer, guard = torch.optim.Adam(model.parameters()), StepGuard(tmp_path, say=lambda text: None)
    given: Any = (rc.Scorer(model), optimizer, [text_prompt(5, seed=3)], [[2, 3]])
    assert "skipped" not in sft_step(*given, guard=guard)
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    for step in range(2):
        assert sft_step(*given, guard=guard, step=step)["skipped"] == 1.0
    with pytest.raises(TooManyBadSteps, match="number 3 in a row"):
        sft_step(*given, guard=guard, step=2)
    with pytest.raises(UserError, match=r"the weights were left as they were; lower the learning rate"):
        sft_step(*given)
