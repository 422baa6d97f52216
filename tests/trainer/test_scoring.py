"""Rewards of completions written by hand: right, wrong, unanswered; strict and open; both kinds of reward."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_trainer import tiny, world
from raise_trainer.clips import write_mp4
from raise_trainer.data import Row
from raise_trainer.evaluate import judge, summary
from raise_trainer.grpo import _groups, _own_figures
from raise_trainer.method import Method
from raise_trainer.prompts import PromptBuilder
from raise_trainer.rollout import Rollout
from raise_trainer.scoring import Scored, score
from raise_trainer.update import policy_step, sft_step
from tests.budget import assert_exact

GREEN, RED = "<think>the colour is green</think>", "<think>the colour is red</think>"
STRICT = (
    f"{GREEN}<answer>B. green</answer>",
    f"{RED}<answer>A. red</answer>",
    f"{RED}<answer>B. green</answer>",
    GREEN,
)
SEEN = "<think>i see a red ring moving up</think>"
OPEN = (
    f"{SEEN}<answer>a red ring moves up</answer>",
    f"{SEEN}<answer>the red ring goes up</answer>",
    f"{SEEN}<answer>the blue ring goes down</answer>",
    "<answer></answer>",
)
G = 4


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny.build_processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return tiny.build_model(processor, seed=0).eval()


@pytest.fixture(scope="module")
def rolled(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Rollout:
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    write_mp4(path, world.render(world.draw_scene(random.Random(0), "move")), world.FPS)
    builder = PromptBuilder(processor, frames=8, max_length=400)
    options = tuple(world.options_of("colour"))
    answer, seen = "<answer>B</answer>", ("a red ring moves up", "one red ring slides up")
    rows = [
        Row(0, "What colour?", "video", "multiple choice", options, answer, path, "demo/colour"),
        Row(1, "Describe.", "video", "free-form", (), f"<answer>{seen[0]}</answer>", path, "demo/describe",
            references=seen),
    ]  # fmt: skip
    completions = [processor.tokenizer(t)["input_ids"] for t in (*STRICT, *OPEN)]
    none = [torch.zeros(len(c)) for c in completions]
    return Rollout([builder(row) for row in rows], completions, none, none, [0] * G + [1] * G)


def method(**other: Any) -> Method:
    return Method(group_size=G, max_new_tokens=28, watch_kl=True, **other)


def scored(rolled: Rollout, model: Any, processor: Any, kind: Any) -> Scored:
    return score(
        rolled,
        rc.Scorer(model),
        processor.tokenizer,
        method(reward=kind),
        eos=[processor.tokenizer.eos_token_id],
    )


def test_accuracy_rewards_are_the_text_scores(rolled: Rollout, model: Any, processor: Any) -> None:
    got = scored(rolled, model, processor, "accuracy")
    assert got.text == [*STRICT, *OPEN]
    assert got.score[:G].tolist() == [1.0, 0.0, 1.0, 0.0] and got.score[7] == 0
    assert 0 < got.score[6] < got.score[5] < got.score[4] < 1
    assert_exact(got.reward, got.score, name="reward")


def test_confidence_rewards_come_from_the_reference(rolled: Rollout, model: Any, processor: Any) -> None:
    got = scored(rolled, model, processor, "scre-igsr")
    stats = [s for group in rc.Scorer(model).token_stats(rolled.inputs, rolled.groups) for s in group]
    for b in (0, 2):  # the right answers: SCRE of the span's tokens alone
        span = got.found[b]
        logp = stats[b].logp.detach()[span.start : span.stop]
        assert span.text == "B. green" and len(logp) == 3
        assert_exact(got.reward[b], rc.scre(logp, torch.tensor([0, 3]))[0], name="SCRE")
        assert got.confidence[b] == got.reward[b] > 0
    assert got.reward[[1, 3, 7]].tolist() == [0, 0, 0] and got.confidence[1] > 0 == got.confidence[3]
    assert (got.reward[4:7] > 0).all()


def test_scre_alone_leaves_open_rows_their_text_score(rolled: Rollout, model: Any, processor: Any) -> None:
    got, whole = (scored(rolled, model, processor, kind) for kind in ("scre", "scre-igsr"))
    assert_exact(got.reward[:G], whole.reward[:G], name="strict rows")
    assert_exact(got.reward[G:], got.score[G:], name="open rows")


def test_the_options_of_scre_and_igsr_are_those_of_the_library(
    rolled: Rollout, model: Any, processor: Any
) -> None:
    """Each number given to `Method` is the one of `raise_core.scre` and `raise_core.igsr`."""
    given = {"eta": 0.5, "lam": 5.0, "tau": 0.3, "penalty": 0.01}
    got = score(
        rolled, rc.Scorer(model), processor.tokenizer, method(**given),
        eos=[processor.tokenizer.eos_token_id],
    )  # fmt: skip
    want = rc.Scorer(model).rewards(
        rolled.inputs, rolled.groups, got.score, [True] * G + [False] * G, processor.tokenizer,
        group_size=G, **given,
    )  # fmt: skip
    plain = scored(rolled, model, processor, "scre-igsr")
    assert_exact(got.reward, want.reward, name="reward")
    assert (got.reward != plain.reward)[[0, 2]].all() and (got.reward != plain.reward)[G:].any()


def test_both_kinds_log_the_same_figures(rolled: Rollout, model: Any, processor: Any) -> None:
    a, b = (scored(rolled, model, processor, kind) for kind in ("accuracy", "scre-igsr"))
    differing = {key for key in a.metrics if a.metrics[key] != b.metrics[key]}
    assert a.metrics.keys() == b.metrics.keys() and differing == {"reward_mean"}
    assert a.metrics["answer_missing_share"] == 0.25 and a.metrics["text_score_mean"] == float(a.score.mean())
    assert_exact(a.logp_ref, b.logp_ref, name="logp_ref")


def test_groups_of_one_reward_are_counted(rolled: Rollout, model: Any, processor: Any) -> None:
    got = scored(rolled, model, processor, "accuracy")
    same = replace(got, reward=torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 1]))
    assert _own_figures(rolled, same)["equal_groups_share"] == 0.5


def test_right_and_match_are_judged_apart(rolled: Rollout) -> None:
    verdicts = [judge(rolled.prompts[p].row, t) for p, t in zip(rolled.owner, (*STRICT, *OPEN), strict=True)]
    assert verdicts[:G] == [(True, True), (False, True), (True, False), (False, False)]
    assert verdicts[G:] == [(True, True), (True, True), (False, False), (False, False)]


def test_the_judged_answer_is_the_scored_one(rolled: Rollout) -> None:
    row = rolled.prompts[0].row
    assert judge(row, f"{GREEN}<answer>B. green</answer></answer>") == (True, True)
    assert judge(row, f"<answer>B. green</answer>{GREEN}") == (
        True,
        False,
    )  # a chain after the answer is none
    assert judge(row, f"{RED}<answer>A. red</answer>{GREEN}<answer>B</answer>") == (True, True)


def test_an_empty_evaluation_has_no_nan() -> None:
    assert set(summary([]).values()) == {0.0}


def test_grpo_raises_what_has_advantage_and_sft_its_targets(rolled: Rollout, processor: Any) -> None:
    model = tiny.build_model(processor, seed=0)
    before = scored(rolled, model, processor, "accuracy")
    optimizer, policy = torch.optim.SGD(model.parameters(), lr=0.05), rc.Scorer(model)
    advantage = rc.group_advantages(before.reward, torch.tensor(rolled.owner))
    groups = _groups(rolled, before, advantage, mask_truncated=False)
    figures = policy_step(policy, optimizer, groups, method())
    assert figures["kl"] == 0.0 and figures["ratio_mean"] == 1.0
    lengths = [len(c) for c in rolled.completions]
    change = scored(rolled, model, processor, "accuracy").logp_ref - before.logp_ref
    by_completion = torch.stack([c.sum() for c in change.split(lengths)])
    assert (by_completion * advantage).sum() > 0
    losses = [
        sft_step(policy, optimizer, rolled.inputs, [rolled.completions[0], rolled.completions[4]])["loss"]
        for _ in range(3)
    ]
    assert losses[2] < losses[1] < losses[0]


def test_a_step_that_is_not_finite_leaves_the_weights_alone(rolled: Rollout, processor: Any) -> None:
    from raise_trainer.errors import UserError

    model = tiny.build_model(processor, seed=0)
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    bad = torch.full((2 * G,), float("nan"))
    groups = _groups(rolled, scored(rolled, model, processor, "accuracy"), bad, mask_truncated=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(UserError, match="the loss is nan"):
        policy_step(rc.Scorer(model), optimizer, groups, method(loss="grpo"))
    for name, weight in model.state_dict().items():
        assert_exact(weight, kept[name], name=name)
