"""The confidence family in the trainer: each reward against its own pieces, and a GRPO step of each."""

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from torch import Tensor

import raise_core as rc
from raise_trainer import tiny, world
from raise_trainer.clips import write_mp4
from raise_trainer.config import RewardKind
from raise_trainer.demo import save_model
from raise_trainer.errors import UserError
from raise_trainer.grpo import Grpo
from raise_trainer.method import Method
from raise_trainer.prompts import PromptBuilder
from raise_trainer.rescore import score_file
from raise_trainer.rewards import FAMILY, family_reward, gold_text, reads_all_rows
from raise_trainer.rollout import Rollout, draws
from raise_trainer.rows import Row
from raise_trainer.scoring import Scored, score
from raise_trainer.train_config import check
from tests.budget import assert_exact, assert_within_error_budget, close_to

TEXTS = (
    "<think>the colour is green</think><answer>B. green</answer>",
    "<think>the colour is red</think><answer>A. red</answer>",
    "<think>the colour is red and not green at all</think>",
    "<answer>a red ring moves up</answer>",
    "<think>i see a red ring moving up</think><answer>the red ring goes up</answer>",
    "<answer></answer>",
)
G = 3
OPTIONS = ("A. red", "B. green")
ROWS = [
    Row(0, "What colour?", "text", "multiple choice", OPTIONS, "<answer>B. green</answer>", None, ""),
    Row("open", "Describe.", "text", "free-form", (), "<answer>a red ring moves up</answer>", None, ""),
]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny.build_processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return tiny.build_model(processor, seed=0).double().eval()


@pytest.fixture(scope="module")
def rolled(processor: Any) -> Rollout:
    builder = PromptBuilder(processor, frames=8, max_length=400)
    ids = [[*processor.tokenizer(t)["input_ids"], processor.tokenizer.eos_token_id] for t in TEXTS]
    none = [torch.zeros(len(c)) for c in ids]
    return Rollout([builder(row) for row in ROWS], ids, none, none, [0] * G + [1] * G)


def scored(rolled: Rollout, model: Any, processor: Any, name: Any, **other: Any) -> Scored:
    method = Method(group_size=G, max_new_tokens=28, reward=name, **other)
    eos = [processor.tokenizer.eos_token_id]
    return score(rolled, rc.Scorer(model), processor.tokenizer, method, eos=eos)


def alone(model: Any, prompt: Any, ids: list[int], names: tuple[str, ...]) -> rc.TokenStats:
    """Statistics of one completion from the logits of its own pass."""
    whole = torch.cat([prompt["input_ids"], torch.tensor([ids])], 1)
    with torch.no_grad():
        logits = model(input_ids=whole).logits[0, prompt["input_ids"].shape[1] - 1 : -1]
    return rc.token_stats(logits, torch.tensor(ids), want=names)


def gold_logp(rolled: Rollout, model: Any, processor: Any) -> tuple[list[Tensor], list[float], list[int]]:
    """Of each gold answer; without reasoning; tokens before it."""
    logp, prior, before = [], [], []
    for b, ids in enumerate(rolled.completions):
        prompt = rolled.prompts[rolled.owner[b]]
        (one,) = rc.splice_gold([ids], [gold_text(prompt.row)], processor.tokenizer)
        (bare,) = rc.splice_gold([[]], [gold_text(prompt.row)], processor.tokenizer)
        for splice in (one, bare):
            whole = alone(model, prompt.inputs, [*splice.before, *splice.answer], ("logp",)).logp
            assert whole is not None
            values = whole[len(splice.before) :]
            if splice is one:
                logp.append(values)
            else:
                prior.append(float(values.exp().mean()))
        before.append(len(one.before))
    return logp, prior, before


def by_pieces(name: str, rolled: Rollout, model: Any, processor: Any) -> Tensor:
    """What a reward is, from one pass for each completion, in fp64."""
    names = FAMILY[name].want
    if FAMILY[name].target == "whole response":
        own = [
            getattr(alone(model, rolled.inputs[p], ids, names), names[0])
            for p, ids in zip(rolled.owner, rolled.completions, strict=True)
        ]
        sums = {"intuitor": lambda x: x.mean(), "deepconf": lambda x: -x.mean(), "em-rl": lambda x: x.sum()}
        if name != "rent":
            return torch.stack([sums[name](x) for x in own])
        answered = [f.reason is None for f in rc.find_answer_spans(rolled.completions, processor.tokenizer)]
        return torch.stack(
            [-x.mean() if a else x.new_tensor(-7.0) for x, a in zip(own, answered, strict=True)]
        )
    logp, prior, before = gold_logp(rolled, model, processor)
    whole, offsets = torch.cat(logp), torch.tensor([0, *map(len, logp)]).cumsum(0)
    group = torch.tensor(rolled.owner)
    if name == "rlpr":
        mean = torch.stack([x.exp().mean() for x in logp])
        return (mean - torch.tensor(prior, dtype=torch.float64)).clamp(0, 1)
    if name == "nover":
        valid = torch.tensor([True, True, False, True, True, False])
        return rc.nover(whole, offsets, group, torch.tensor(before), valid=valid)
    if name == "jepo":
        return rc.jepo(whole, offsets, group)
    return torch.stack([x.sum().exp() if name == "likelihood" else x.mean() for x in logp])


@pytest.mark.parametrize("name", [n for n in FAMILY if n != "min-prob"])
def test_each_reward_is_what_its_pieces_give(name: str, rolled: Rollout, model: Any, processor: Any) -> None:
    got = scored(rolled, model, processor, name)
    want = by_pieces(name, rolled, model, processor)
    assert_within_error_budget(got.reward.float(), want, close_to(want, 4), name=name)
    assert len(set(got.reward.tolist())) > 1 and got.reward.isfinite().all()


def test_the_least_certain_token_of_right_answers(rolled: Rollout, model: Any, processor: Any) -> None:
    got = scored(rolled, model, processor, "min-prob")
    assert got.reward[1] == got.reward[2] == got.reward[5] == 0 < got.score[4]
    for b in (0, 3, 4):
        span, prompt = got.found[b], rolled.prompts[rolled.owner[b]]
        logp = alone(model, prompt.inputs, rolled.completions[b], ("logp",)).logp
        assert logp is not None
        want = got.score[b].double() * logp[span.start : span.stop].exp().min()
        assert_within_error_budget(got.reward[b].float(), want, close_to(want, 4), name="min-prob")


def test_a_share_of_the_text_score_and_the_same_figures(rolled: Rollout, model: Any, processor: Any) -> None:
    whole, half = (scored(rolled, model, processor, "rlpr", confidence_share=k) for k in (1.0, 0.5))
    assert_exact(half.reward, whole.score * 0.5 + 0.5 * whole.reward, name="half")
    plain = scored(rolled, model, processor, "accuracy")
    assert plain.metrics.keys() == whole.metrics.keys()
    assert {k for k in plain.metrics if plain.metrics[k] != whole.metrics[k]} == {"reward_mean"}


def test_every_name_that_can_be_configured_is_known() -> None:
    assert set(get_args(RewardKind)) == {"scre", "scre-igsr", "scre-igsr-balanced", "accuracy", *FAMILY}
    assert {n for n in FAMILY if reads_all_rows(n)} == {"intuitor", "rent", "em-rl", "deepconf"}
    assert not reads_all_rows("accuracy")
    with pytest.raises(UserError, match="reward: got 'rlprr'; input should be 'scre-igsr'"):
        check({"model": "m", "data": "d.json", "out": "o", "reward": "rlprr"})


@pytest.mark.parametrize("name", ["rlpr", "intuitor"])
def test_after_a_video_as_in_a_pass_for_each(name: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    """The video runs once, for the group and for the gold answers; with its features made before or not."""
    clip = tmp_path / "a.mp4"
    write_mp4(clip, world.render(world.draw_scene(random.Random(0), "move")), world.FPS)
    builder = PromptBuilder(processor, frames=8, max_length=400)
    prompt = builder(replace(ROWS[0], data_type="video", path=clip))
    ids = [processor.tokenizer(t)["input_ids"] for t in TEXTS[:G]]
    none = [torch.zeros(len(c)) for c in ids]
    scorer = rc.Scorer(model)
    method = Method(group_size=G, max_new_tokens=28, reward=name)
    rollouts = [
        Rollout([prompt], ids, none, none, [0] * G, features)
        for features in (None, scorer.vision_features([prompt.inputs]))
    ]
    alone = score(rollouts[0], rc.Scorer(model, packing="plain"), processor.tokenizer, method, eos=[]).reward
    assert len(set(alone.tolist())) == G
    for rollout in rollouts:
        got = score(rollout, scorer, processor.tokenizer, method, eos=[]).reward
        assert_within_error_budget(got.float(), alone.double(), close_to(alone.double(), 4), name=name)


@pytest.mark.parametrize("name, kl", [*((name, 0.0) for name in FAMILY), ("rent", 0.04), ("rlpr", 0.04)])
def test_a_step_of_each(name: Any, kl: float, rolled: Rollout, processor: Any) -> None:
    """Sampled by a random model, which writes no answers: rewards are finite and the step is taken."""
    tokenizer, model = processor.tokenizer, tiny.build_model(processor, seed=0)
    before = model.lm_head.weight.detach().clone()
    method = Method(group_size=2, max_new_tokens=6, reward=name, kl=kl)
    grpo = Grpo(
        model, rc.EmaReference(model, every=1), torch.optim.SGD(model.parameters(), lr=0.1), tokenizer,
        method, eos=[tokenizer.eos_token_id], suppress=tokenizer.convert_tokens_to_ids(list(tiny.MEDIA)),
    )  # fmt: skip
    outcome = grpo.step(rolled.prompts, draws(0, [(0, 0), (0, 1)], 2, 6), 0)
    assert outcome.scored is not None and outcome.scored.reward.isfinite().all()
    assert outcome.advantage.shape == (4,) and (outcome.scored.logp_ref is None) == (kl == 0)
    differs = outcome.scored.reward.view(2, 2).diff() != 0
    assert differs.any() == (outcome.advantage != 0).any()
    assert bool((model.lm_head.weight != before).any()) == bool((outcome.advantage != 0).any())


def test_one_completion_is_not_compared() -> None:
    for name in ("jepo", "nover"):
        with pytest.raises(UserError, match=f"reward {name}: compares the completions of a prompt"):
            Method(group_size=1, max_new_tokens=6, reward=name)
    assert Method(group_size=1, max_new_tokens=6, reward="rlpr").reward == "rlpr"


def test_a_reward_that_is_not_finite_names_its_row(rolled: Rollout, model: Any, processor: Any) -> None:
    found = rc.find_answer_spans(rolled.completions, processor.tokenizer)
    logp = torch.zeros(sum(map(len, found)))
    logp[-1] = float("nan")
    with pytest.raises(UserError, match="row open: reward min-prob of one of its completions is nan"):
        family_reward(
            "min-prob", rolled, rc.Scorer(model), processor.tokenizer, found=found,
            text_score=torch.ones(6), own_logp=logp, states=None,
        )  # fmt: skip
    with pytest.raises(ValueError, match="states: got None"):
        family_reward(
            "rent", rolled, rc.Scorer(model), processor.tokenizer, found=found, text_score=torch.ones(6),
            own_logp=logp, states=None,
        )  # fmt: skip


def test_the_gold_answer_of_a_row() -> None:
    assert gold_text(ROWS[0]) == "B. green"
    assert gold_text(replace(ROWS[0], solution=" B ")) == "B"
    with pytest.raises(UserError, match="row 0: no answer in its solution"):
        gold_text(replace(ROWS[0], solution="<answer> </answer>"))


PAGE = (Path(__file__).resolve().parents[2] / "docs/rewards.md").read_text(encoding="utf-8")


def test_documented_with_what_they_need() -> None:
    """docs/rewards.md has a row for each name, with its target and statistics."""
    for name in get_args(RewardKind):
        rows = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
        assert len(rows) == 1, name
        if name in FAMILY:
            assert FAMILY[name].target in rows[0] and all(f"`{w}`" in rows[0] for w in FAMILY[name].want), (
                name
            )


def test_every_function_on_the_page_exists() -> None:
    named = set(re.findall(r"`rc\.(\w+)", PAGE))
    assert {"jepo", "splice_gold", "EarlyStop"} <= named
    assert [name for name in named if not hasattr(rc, name)] == []


def test_the_raw_path_of_the_page(rolled: Rollout, model: Any, processor: Any) -> None:
    """Padded log-probabilities of another trainer give the rewards of the run."""
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(code.splitlines()) <= 15
    length = max(map(len, rolled.completions))
    logp, ids, mask = torch.zeros(6, length), torch.zeros(6, length, dtype=torch.long), torch.zeros(6, length)
    for b, own in enumerate(rolled.completions):
        values = alone(model, rolled.inputs[rolled.owner[b]], own, ("logp",)).logp
        assert values is not None
        logp[b, : len(own)], ids[b, : len(own)], mask[b, : len(own)] = values.float(), torch.tensor(own), 1
    want = scored(rolled, model, processor, "scre-igsr")
    strict = torch.tensor([True] * G + [False] * G)
    got = names["rewards"](logp, ids, mask, processor.tokenizer, want.score, strict, rolled.owner)
    assert_within_error_budget(got, want.reward.double(), close_to(want.reward.double(), 4), name="raw")


def test_stored_completions(processor: Any, rolled: Rollout, model: Any, tmp_path: Path) -> None:
    save_model(tiny.build_model(processor, seed=0), processor, tmp_path / "model")
    rows = [
        {"problem_id": row.problem_id, "problem": row.problem, "data_type": "text", "solution": row.solution,
         "problem_type": row.problem_type, "options": list(row.options)}
        for row in ROWS
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    stored = tmp_path / "c.jsonl"
    lines = [
        {"id": ROWS[p].problem_id, "token_ids": ids}
        for p, ids in zip(rolled.owner, rolled.completions, strict=True)
    ]
    settings = {
        "model": str(tmp_path / "model"), "data": tmp_path / "rows.json", "out": tmp_path / "run",
        "dtype": "float32", "template": "think", "max_new_tokens": 28, "workers": 0,
    }  # fmt: skip
    console = Console(file=io.StringIO())
    for name in ("rlpr", "rent"):
        stored.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out = score_file(stored, check(settings | {"reward": name}), console=console)
        rewards = [json.loads(line)["reward"] for line in out.read_text().splitlines()]
        assert len(rewards) == 6 and len(set(rewards)) > 2, name
    stored.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match="reward nover: compares the completions of a prompt, and there is 1"):
        score_file(stored, check(settings | {"reward": "nover"}), console=console)
