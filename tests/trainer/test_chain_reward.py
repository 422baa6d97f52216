"""The reward of a process reward model in GRPO: its settings, values, advantages of steps, a whole step."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_core.chain import GOOD, STEP_TAG
from raise_trainer import tiny
from raise_trainer.chain_judge import ChainJudge, check_same_tokens
from raise_trainer.chain_reward import with_chain_reward
from raise_trainer.chain_tokens import add_chain_tokens
from raise_trainer.errors import UserError
from raise_trainer.grpo import Grpo
from raise_trainer.method import Method
from raise_trainer.passes import Group
from raise_trainer.prompts import Prompt, PromptBuilder
from raise_trainer.rescore import score_file
from raise_trainer.rollout import Rollout, draws
from raise_trainer.rows import parse_row
from raise_trainer.scoring import score
from raise_trainer.train import run_train
from raise_trainer.train_config import as_yaml, check
from raise_trainer.train_fields import ChainOfStep
from raise_trainer.update import policy_step
from tests.budget import assert_exact, assert_within_error_budget, close_to
from tests.trainer import chain_world

RIGHT = rc.format_chain(
    [rc.Step("a", "red", "it"), rc.Step("b", "up", "it")], "B", open="<answer>", close="</answer>"
)
SHORT = rc.format_chain([rc.Step("a", "red", "it")], "A", open="<answer>", close="</answer>")
NONE = "no step at all"


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any, Any, Prompt]:
    torch.set_num_threads(1)
    processor = tiny.build_processor()
    model, prm = (tiny.build_model(processor, seed=seed) for seed in (0, 1))
    for one in (model, prm):
        add_chain_tokens(one, processor.tokenizer)
    row = {
        "problem_id": 1, "problem": "Which?", "data_type": "text", "problem_type": "multiple choice",
        "options": ["A. red", "B. blue"], "solution": "<answer>B</answer>",
    }  # fmt: skip
    prompt = PromptBuilder(processor, frames=2, max_length=300)(parse_row(0, row, Path(".")))
    return model.eval(), prm.eval(), processor.tokenizer, prompt


def method(**chain: Any) -> Method:
    of = ChainOfStep(prm="prm", **chain)
    return Method(group_size=3, max_new_tokens=120, reward="chain-of-step", chain=of, micro_tokens=4096)


def rollout_of(tokenizer: Any, prompt: Prompt, texts: list[str]) -> Rollout:
    ids = [[*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for t in texts]
    zeros = [torch.zeros(len(i)) for i in ids]
    return Rollout([prompt], ids, zeros, zeros, [0] * len(ids))


def test_settings() -> None:
    given = {"model": "m", "data": "d.json", "out": "o"}
    plain = check(given | {"reward": {"chain-of-step": "folder"}})
    of = Method.of(plain)
    assert of.reward == "chain-of-step" and of.chain == ChainOfStep(prm="folder", share=0.2, answer="prm")
    full = check(given | {"reward": {"chain-of-step": {"prm": "f", "share": 0.5, "per_step": True}}})
    chain = Method.of(full).chain
    assert chain is not None and (chain.share, chain.per_step) == (0.5, 1.0)
    assert "chain-of-step" in as_yaml(full)
    for wrong in (
        "chain-of-step",
        {"chain-of-step": {"share": 0.2}},
        {"chain-of-step": {"prm": "f", "share": 2}},
    ):
        with pytest.raises(UserError, match="reward: got"):
            check(given | {"reward": wrong})
    with pytest.raises(UserError, match="needs its PRM"):
        Method(group_size=2, max_new_tokens=4, reward="chain-of-step")


def test_rewards_and_advantages_of_steps(world: Any) -> None:
    model, prm, tokenizer, prompt = world
    judge = ChainJudge(prm, tokenizer)
    made = rollout_of(tokenizer, prompt, [RIGHT, SHORT, NONE])
    of = method(per_step=0.5)
    before = score(made, rc.Scorer(model), tokenizer, of, eos=[tokenizer.eos_token_id])
    after = with_chain_reward(before, made, judge, of, tokenizer)
    ((one, two, three),) = rc.StepScorer(rc.Scorer(prm), tokenizer).scores(made.inputs, made.groups)
    assert one.answer is not None and two.answer is not None
    want = [0.2 * one.mean + 0.8 * one.answer, 0.2 * two.mean + 0.8 * two.answer, 0.0]
    oracle = torch.tensor(want, dtype=torch.float64)
    assert_within_error_budget(after.reward, oracle, close_to(oracle, 4), name="0.2 / 0.8")
    assert three.steps == () and after.metrics["steps_mean"] == 1.0
    assert after.step_advantage is not None and len(after.step_advantage) == sum(map(len, made.completions))
    steps = torch.tensor([*one.steps, *two.steps])
    each = 0.5 * rc.group_advantages(steps, torch.zeros(3, dtype=torch.long))
    held = [x for x in after.step_advantage.tolist() if x]
    assert {round(x, 6) for x in held} == {round(x, 6) for x in each.tolist()}
    by_text = with_chain_reward(before, made, judge, method(answer="text", share=0.0), tokenizer)
    assert by_text.reward.tolist() == before.score.tolist() and by_text.step_advantage is None


def test_a_chain_cannot_score_itself_or_outgrow_the_context(world: Any) -> None:
    _, prm, tokenizer, prompt = world
    judge = ChainJudge(prm, tokenizer)
    claims = f"{STEP_TAG} {GOOD} {STEP_TAG}{GOOD}"
    honest, boast, endless = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (RIGHT, RIGHT + claims, RIGHT * 20)
    )
    ((plain, boasting, too_long),) = judge([prompt.inputs], [[honest, boast, endless]])
    assert boasting.scores.steps == plain.scores.steps and boasting.reward == plain.reward
    assert not too_long.fits and too_long.reward == 0.0 and plain.fits


def test_tokenizers_must_agree(world: Any) -> None:
    other = tiny.build_tokenizer()
    with pytest.raises(UserError, match=r"prm there: its tokenizer differs .*answer_end"):
        check_same_tokens(other, world[2], "there")


def test_advantages_of_tokens_reach_the_gradient(world: Any) -> None:
    """A token's own advantage moves as the same advantage of its completion does."""
    model, _, tokenizer, prompt = world
    ids = rollout_of(tokenizer, prompt, [RIGHT, SHORT]).completions
    lengths = [len(i) for i in ids]
    of = Method(group_size=2, max_new_tokens=120)

    def gradient(group: Group) -> torch.Tensor:
        frozen = torch.optim.SGD(model.parameters(), lr=0.0)
        policy_step(rc.Scorer(model), frozen, [group], of)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    per_token = torch.cat([torch.full((n,), a) for n, a in zip(lengths, (1.0, -0.5), strict=True)])
    whole = gradient(Group(prompt.inputs, ids, torch.tensor([1.0, -0.5]), None))
    split = gradient(Group(prompt.inputs, ids, torch.zeros(2), None, token_advantage=per_token))
    assert_exact(split, whole, name="gradient")
    pieces = Group(prompt.inputs, ids, torch.zeros(2), None, token_advantage=per_token).cut(1)
    assert [p.token_advantage.tolist() for p in pieces if p.token_advantage is not None] == [
        [1.0] * lengths[0], [-0.5] * lengths[1]
    ]  # fmt: skip


def test_a_grpo_step(world: Any) -> None:
    model, prm, tokenizer, prompt = world
    of = Method(
        group_size=3, max_new_tokens=12, reward="chain-of-step", chain=ChainOfStep(prm="prm", per_step=1.0)
    )
    grpo = Grpo(
        model, rc.PolicyReference(model), torch.optim.SGD(model.parameters(), lr=0.0), tokenizer, of,
        eos=[tokenizer.eos_token_id], suppress=[], judge=ChainJudge(prm, tokenizer),
    )  # fmt: skip
    made = grpo.step([prompt], draws(0, [(0, 0)], 3, 12), 0)
    assert made.scored is not None and made.scored.step_advantage is not None
    named = {"step_score_mean", "answer_score_mean", "steps_mean", "prm_too_long_share"}
    assert named <= set(made.figures) and grpo.phases.seconds["judge"] > 0


def test_a_run_and_its_completions_scored_again(tmp_path: Path) -> None:
    chain_world.make(tmp_path, questions=2, steps=1)
    config = check(
        {
            "model": str(tmp_path / "model"), "data": str(tmp_path / "data.json"), "out": tmp_path / "run",
            "reward": {"chain-of-step": {"prm": str(tmp_path / "prm"), "per_step": 0.5}}, "steps": 1,
            "prompts": 2, "group_size": 2, "max_new_tokens": 8, "dtype": "float32", "template": "plain",
            "workers": 0, "gradient_checkpointing": False, "mask_truncated": False, "lr": 1e-3,
        }
    )  # fmt: skip
    run_train(config)
    (line,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert line["steps_mean"] == 0.0 and line["prm_too_long_share"] == 0.0
    again = score_file(tmp_path / "run/completions.jsonl", config, out=tmp_path / "again.jsonl")
    scored = [json.loads(text) for text in again.read_text().splitlines()]
    assert scored and all(one["reward"] == one["old_reward"] == 0.0 for one in scored)


def test_a_prm_that_is_not_finite_is_named(world: tuple[Any, Any, Any, Prompt], monkeypatch: Any) -> None:
    _, prm, tokenizer, prompt = world
    ids = rollout_of(tokenizer, prompt, [RIGHT]).groups
    judge = ChainJudge(prm, tokenizer, name="folder")
    overflown = rc.StepScores((0.5, float("nan")), 0.5, (9, 20))
    monkeypatch.setattr(judge.scorer, "scores", lambda *given, **other: [[overflown]])
    with pytest.raises(UserError, match="prm folder: its score of a step is not finite; take an earlier"):
        judge([prompt.inputs], ids)
    broken = copy.deepcopy(prm)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5, 3] = float("nan")
    with pytest.raises(UserError, match=r"prm folder: its weight .* is not finite; take an earlier"):
        ChainJudge(broken, tokenizer, name="folder")
