"""A GRPO step: one process or two, in micro-batches or whole, with later updates, with nothing to learn."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from transformers import Qwen2_5_VLModel

import raise_core as rc
from raise_trainer import grpo as grpo_module
from raise_trainer import tiny, world
from raise_trainer.clips import write_mp4
from raise_trainer.data import Row
from raise_trainer.engines import Generate
from raise_trainer.grpo import Grpo, Outcome, _groups
from raise_trainer.method import Method
from raise_trainer.passes import Group, micro_batches
from raise_trainer.prompts import Prompt, PromptBuilder
from raise_trainer.rollout import Rollout, draws
from raise_trainer.scoring import Scored, score
from tests.budget import assert_as_exact_as_fp32, assert_equal_but_for_roundings, assert_exact

TASKS = ("colour", "count", "describe", "when", "shape")
G, LONGEST = 3, 10


def write_clips(folder: Path) -> None:
    rng = random.Random(0)
    for i, task in enumerate(TASKS):
        kind = next(kind for kind, tasks in world.TASKS_OF.items() if task in tasks)
        write_mp4(folder / f"{i}.mp4", world.render(world.draw_scene(rng, kind)), world.FPS)


def questions(folder: Path, processor: Any) -> list[Prompt]:
    builder = PromptBuilder(processor, frames=world.FRAMES, max_length=400)
    rows = []
    for i, task in enumerate(TASKS):
        answer = "<answer>a red ring moves up</answer>" if task == "describe" else "<answer>B</answer>"
        if task in ("count", "when"):
            answer = "<answer>1</answer>"
        rows.append(
            Row(i, world.QUESTION[task], "video", world.PROBLEM_TYPE[task], tuple(world.options_of(task)),
                answer, folder / f"{i}.mp4", f"demo/{task}")
        )  # fmt: skip
    return [builder(row) for row in rows]


def parity(rollout: Rollout, scorer: rc.Scorer, tokenizer: Any, method: Method, *, eos: Any) -> Scored:
    """The share of odd token ids for a reward: those of a random model would all be 0."""
    found = score(rollout, scorer, tokenizer, method, eos=eos)
    odd = [sum(i % 2 for i in ids) / len(ids) for ids in rollout.completions]
    return replace(found, reward=torch.tensor(odd))


def run(folder: Path, mine: slice, *, steps: int = 2, **other: Any) -> tuple[Any, list[Outcome]]:
    """Some steps of a random fp64 model on this process's prompts."""
    grpo_module.score = parity
    processor = tiny.build_processor()
    tokenizer = processor.tokenizer
    model = tiny.build_model(processor, seed=0).double()
    model.model.visual.requires_grad_(not other.pop("frozen", False))
    method = Method(**{"group_size": G, "max_new_tokens": LONGEST, **other})
    grpo = Grpo(
        model, rc.EmaReference(model, every=1), torch.optim.SGD(model.parameters(), lr=0.1), tokenizer,
        method, eos=[tokenizer.eos_token_id], suppress=tokenizer.convert_tokens_to_ids(list(tiny.MEDIA)),
    )  # fmt: skip
    every, outcomes = questions(folder, processor), []
    for step in range(steps):
        places = [(step, i) for i in range(len(every))][mine]
        outcomes.append(grpo.step(every[mine], draws(0, places, G, LONGEST), step * method.updates))
    return model, outcomes


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_module, "score", score)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return folder


def work(rank: int, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        for name, options in cases.items():
            mine = slice(rank, None, 2) if name != "one has none" else slice(0, 5 if rank == 0 else 0)
            model, outcomes = run(Path(folder), mine, **options)
            torch.save(
                {"weights": model.state_dict(), "figures": [o.figures for o in outcomes]},
                f"{folder}/{name} {rank}.pt",
            )
        dist.barrier()  # a process that closes while another still connects takes it down
    finally:
        dist.destroy_process_group()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one has none": {"loss": "grpo"},
    "batch, several updates": {"scale": "batch", "updates": 2, "loss": "dapo", "kl": 0.1, "temperature": 0.8},
}


def test_two_processes_are_one(clips: Path) -> None:
    """Weights after two steps, and every figure: prompts shared out, or all with one process."""
    mp.spawn(work, args=(str(clips), CASES), nprocs=2)
    start = tiny.build_model(tiny.build_processor(), seed=0).double().state_dict()
    for name, options in CASES.items():
        model, outcomes = run(clips, slice(None), **options)
        for rank in range(2):
            got = torch.load(clips / f"{name} {rank}.pt", weights_only=True)
            for key, weight in model.state_dict().items():
                assert_equal_but_for_roundings(got["weights"][key], weight, name=f"{name} {rank} {key}")
            for one, both in zip(outcomes, got["figures"], strict=True):
                assert one.figures.keys() == both.keys()
                for key, value in one.figures.items():
                    assert_as_exact_as_fp32(both[key], value, name=f"{name} {key}")
        moved = max(float((w - start[k]).abs().max()) for k, w in model.state_dict().items())
        assert moved > 1e-3, "nothing was learned: the case is not tested"


def test_micro_batches_do_not_change_a_step(clips: Path) -> None:
    whole, first = run(clips, slice(None), steps=1)
    parts, second = run(clips, slice(None), steps=1, micro_tokens=90)
    for key, weight in whole.state_dict().items():
        assert_equal_but_for_roundings(parts.state_dict()[key], weight, name=key)
    assert first[0].figures.keys() == second[0].figures.keys()


def test_micro_batches_hold_whole_groups_in_order() -> None:
    def group(prompt: int, tokens: int) -> Group:
        inputs = {"input_ids": torch.zeros(1, prompt)}
        return Group(inputs, [[1] * tokens], torch.zeros(1), torch.zeros(tokens))

    groups = [group(5, 3), group(5, 3), group(30, 9), group(1, 1)]
    found = list(micro_batches(groups, 16))
    assert [len(some) for some in found] == [2, 1, 1]
    assert [g for some in found for g in some] == groups and list(micro_batches([], 16)) == []


def test_later_updates_take_their_ratio_to_the_policy_that_sampled(clips: Path) -> None:
    _, (once,) = run(clips, slice(None), steps=1)
    assert once.figures["ratio_mean"] == 1.0
    _, (twice,) = run(clips, slice(None), steps=1, updates=2)
    assert twice.figures["ratio_mean"] != 1.0 and twice.figures["ratio_max"] > 1.0


def test_truncated_completions_are_left_out_of_the_loss_and_not_of_the_mean(clips: Path) -> None:
    _, (outcome,) = run(clips, slice(None), steps=1)
    scored = outcome.scored
    assert scored is not None and scored.truncated.any()
    half = replace(scored, truncated=torch.arange(len(scored.truncated)) % 2 == 0)
    groups = _groups(outcome.rollout, half, outcome.advantage, mask_truncated=True)
    kept = [ids for b, ids in enumerate(outcome.rollout.completions) if b % 2]
    assert [ids for g in groups for ids in g.completions] == kept
    assert_exact(torch.cat([g.advantage for g in groups]), outcome.advantage[1::2], name="advantage")
    every = replace(scored, truncated=torch.ones_like(scored.truncated))
    assert _groups(outcome.rollout, every, outcome.advantage, mask_truncated=True) == []


def test_a_step_with_nothing_to_learn_from_moves_nothing(clips: Path) -> None:
    """All truncated, or no prompt at all: the step is taken with gradient 0."""
    model, (outcome,) = run(clips, slice(None), steps=1, mask_truncated=True, max_new_tokens=2)
    start = tiny.build_model(tiny.build_processor(), seed=0).double().state_dict()
    assert outcome.figures["truncated_share"] == 1.0
    for key, weight in model.state_dict().items():
        assert_exact(weight, start[key], name=key)
    _, (nothing,) = run(clips, slice(0, 0), steps=1)
    assert nothing.figures["grad_norm"] == 0.0


def test_a_frozen_tower_runs_once_a_step_and_changes_nothing(
    clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features serve sampling, scoring and the updates; the step is the one that encodes each time."""
    calls = list[int]()
    encode = Qwen2_5_VLModel.get_video_features

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return encode(self, *args, **options)

    monkeypatch.setattr(Qwen2_5_VLModel, "get_video_features", counted)
    once, _ = run(clips, slice(None), steps=1, updates=2, frozen=True)
    first_step = len(calls)  # first-use checks included
    run(clips, slice(None), steps=2, updates=2, frozen=True)
    assert len(calls) - first_step == first_step + 1
    monkeypatch.setattr(Grpo, "_features", lambda self, prompts: None)
    each, _ = run(clips, slice(None), steps=1, updates=2, frozen=True)
    for key, weight in each.state_dict().items():
        assert_equal_but_for_roundings(once.state_dict()[key], weight, name=key)


def test_without_a_kl_only_the_answers_are_scored_and_the_rewards_are_the_same(clips: Path) -> None:
    _, (lean,) = run(clips, slice(None), steps=1)
    _, (full,) = run(clips, slice(None), steps=1, watch_kl=True)
    assert lean.scored is not None and lean.scored.logp_ref is None and "kl" not in lean.figures
    assert full.scored is not None and full.scored.logp_ref is not None and "kl" in full.figures
    assert_equal_but_for_roundings(
        lean.scored.confidence.double(), full.scored.confidence.double(), name="confidence"
    )
    for key in lean.figures.keys() & {"igsr_bonus_share", "answer_missing_share", "scre_differs_share"}:
        assert lean.figures[key] == full.figures[key]


def test_a_sampler_that_is_another_model_is_reported(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a run, on its first group."""
    checked = list[rc.SamplerCheck]()
    check = rc.Scorer.check_sampler
    monkeypatch.setattr(rc.Scorer, "check_sampler", lambda *a, **k: checked.append(check(*a, **k)))
    run(clips, slice(None), steps=2)
    assert [found.agrees for found in checked] == [True]
    inner = Generate.sample

    def warmer(*args: Any, **options: Any) -> Rollout:
        rollout = inner(*args, **options)
        return replace(rollout, logp=[x + 0.3 for x in rollout.logp])

    monkeypatch.setattr(Generate, "sample", warmer)
    with pytest.warns(RuntimeWarning, match="does not sample from the model that is scored"):
        run(clips, slice(None), steps=1)
