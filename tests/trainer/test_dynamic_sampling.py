"""Groups without a difference are replaced by the next rows: on one process, on two, after a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp

import raise_core as rc
from raise_trainer import grpo as grpo_module
from raise_trainer import ranks, tiny
from raise_trainer.dataset import write_dataset
from raise_trainer.demo import save_model
from raise_trainer.feed import Feed
from raise_trainer.grpo import Grpo, Outcome
from raise_trainer.method import Method
from raise_trainer.prompts import Prompt
from raise_trainer.rollout import Rollout, draws
from raise_trainer.rounds import Round, joined
from raise_trainer.rows import Row
from raise_trainer.sampler import RowSampler
from raise_trainer.scoring import Scored
from raise_trainer.train import run_train
from raise_trainer.train_config import check
from raise_trainer.update import Group, policy_step
from tests.budget import assert_as_exact_as_fp32, assert_equal_but_for_roundings, assert_exact
from tests.tiny_models import completions, text_model, text_prompt

G, LONGEST, ROWS = 3, 4, 20
EQUAL = {4, 5, 9, 12}  # rows whose completions all get one reward


def question(number: int) -> Prompt:
    row = Row(number, "?", "text", "free-form", (), "<answer>a</answer>", None, "")
    return Prompt(row, {"input_ids": text_prompt(5, seed=number)["input_ids"]}, None)


def made_up(rollout: Rollout, scorer: Any, tokenizer: Any, method: Any, *, eos: Any) -> Scored:
    """Rewards by row and place in the group."""
    rows = [int(rollout.prompts[p].row.problem_id) for p in rollout.owner]
    rewards = [0.5 if row in EQUAL else float((b + row) % G) for b, row in enumerate(rows)]
    n, reward = len(rewards), torch.tensor(rewards)
    found = [rc.Found(0, 0, "", "missing")] * n
    return Scored(
        [""] * n, reward, found, reward, reward, torch.zeros(n, dtype=torch.bool), None,
        {"reward_mean": float(reward.mean())},
    )  # fmt: skip


def numbers(outcome: Outcome) -> list[Any]:
    return [p.row.problem_id for p in outcome.rollout.prompts]


class Course:
    """A random fp64 model trained on rows 0, 1, 2, … in order, shared out over the processes."""

    def __init__(self, per_step: int, **other: Any) -> None:
        self.model = text_model("Qwen2").double()
        self.sampler = RowSampler(ROWS, per_step=per_step, seed=0, rank=ranks.rank(), world=ranks.size())
        self.sampler._orders = {epoch: torch.arange(ROWS).numpy() for epoch in range(5)}
        self.grpo = Grpo(
            self.model, rc.PolicyReference(self.model),
            torch.optim.SGD(self.model.parameters(), lr=0.1), None,
            Method(**{"group_size": G, "max_new_tokens": LONGEST, "reward": "accuracy", **other}),
            eos=[1], suppress=[],
        )  # fmt: skip

    def ask(self, step: int, begun: int, count: int | None = None) -> tuple[list[Prompt], Tensor]:
        first = self.sampler.position - begun
        rows = self.sampler.take(count)
        places = [(step, first + i * ranks.size() + ranks.rank()) for i in range(len(rows))]
        return [question(number) for number in rows], draws(0, places, G, LONGEST)

    def step(self, step: int) -> Outcome:
        ask = partial(self.ask, step, self.sampler.position)
        return self.grpo.step(*ask(), step, more=ask)


@pytest.fixture(autouse=True)
def _made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_module, "score", made_up)


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[list[Group]]:
    """The groups of each update."""
    seen, inner = list[list[Group]](), policy_step

    def kept(scorer: Any, optimizer: Any, groups: Sequence[Group], *args: Any, **options: Any) -> Any:
        seen.append(list(groups))
        return inner(scorer, optimizer, groups, *args, **options)

    monkeypatch.setattr(grpo_module, "policy_step", kept)
    return seen


def ids_of(group: Group) -> list[int]:
    ids: list[int] = group.inputs["input_ids"][0].tolist()
    return ids


def test_equal_groups_are_replaced_by_the_next_rows(learned: list[list[Group]]) -> None:
    """Rows 0..5 are drawn, 4 and 5 say nothing, 6 and 7 come instead; the next step goes on with row 8."""
    course = Course(6, resample=2)
    first, second = course.step(0), course.step(1)
    assert numbers(first) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [ids_of(g) for g in learned[0]] == [question(n).ids.tolist() for n in (0, 1, 2, 3, 6, 7)]
    advantage = first.advantage.view(-1, G)
    assert (advantage[[4, 5]] == 0).all() and (advantage[[0, 1, 2, 3, 6, 7]].abs().amax(1) > 0).all()
    figures = {k: first.figures[k] for k in ("rounds", "resampled_groups", "learned_groups", "idle_groups")}
    assert figures == {"rounds": 2, "resampled_groups": 2, "learned_groups": 6, "idle_groups": 0}
    assert first.figures["equal_groups_share"] == 2 / 8
    assert_as_exact_as_fp32(first.figures["reward_mean"], (2 * 0.5 + 6 * 1.0) / 8, name="reward_mean")
    # 8..13 with 9 and 12 equal, then 14 and 15
    assert numbers(second) == [8, 9, 10, 11, 12, 13, 14, 15] and course.sampler.position == 16


def test_rounds_end_and_what_there_is_is_learned_from(learned: list[list[Group]]) -> None:
    """One further round of as many rows as the first had equal groups; a group still missing stays so."""
    course = Course(2, resample=1)
    course.sampler.position = 8
    outcome = course.step(0)
    assert numbers(outcome) == [8, 9, 10] and outcome.figures["learned_groups"] == 2
    course.sampler.position = 4
    both = course.step(1)
    assert numbers(both) == [4, 5, 6, 7] and both.figures["rounds"] == 2
    course.sampler.position = 3  # 3, 4 | 5 and no round left
    short = course.step(2)
    assert numbers(short) == [3, 4, 5] and short.figures["learned_groups"] == 1
    assert [ids_of(g) for g in learned[-1]] == [question(3).ids.tolist()]


def test_without_any_difference_the_gradient_is_zero() -> None:
    course = Course(1, resample=1)
    course.sampler.position = 4
    start = {k: w.clone() for k, w in course.model.state_dict().items()}
    outcome = course.step(0)
    assert numbers(outcome) == [4, 5] and course.sampler.position == 6
    assert outcome.figures["learned_groups"] == outcome.figures["grad_norm"] == 0.0
    for key, weight in course.model.state_dict().items():
        assert_exact(weight, start[key], name=key)


def test_nothing_is_drawn_without_need() -> None:
    course = Course(4, resample=3)
    assert course.step(0).figures["rounds"] == 1 and course.sampler.position == 4
    off = Course(6)
    assert numbers(off.step(0)) == [0, 1, 2, 3, 4, 5] and off.sampler.position == 6


def test_where_more_come_from_has_to_be_said() -> None:
    course = Course(6, resample=1)
    with pytest.raises(ValueError, match="more: got None with resample=1"):
        course.grpo.step(*course.ask(0, 0), 0)


@pytest.mark.parametrize("loss, scale", [("dapo", "batch"), ("grpo", "group")])
def test_the_step_is_that_of_the_kept_groups(loss: Any, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also its normalisers, and a batch-wide deviation: as if the equal groups had never been drawn."""
    course, other = Course(6, resample=1, loss=loss, scale=scale), Course(6, loss=loss, scale=scale)
    course.step(0)
    kept = [0, 1, 2, 3, 6, 7]
    monkeypatch.setattr(other, "ask", lambda *_: (
        [question(n) for n in kept], draws(0, [(0, n) for n in kept], G, LONGEST)
    ))  # fmt: skip
    other.step(0)
    start = text_model("Qwen2").double().state_dict()
    assert max(float((w - start[k]).abs().max()) for k, w in other.model.state_dict().items()) > 1e-4
    for key, weight in other.model.state_dict().items():
        assert_equal_but_for_roundings(course.model.state_dict()[key], weight, name=key)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    grpo_module.score = made_up
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        course = Course(6, resample=2, scale="batch")
        outcomes = [course.step(step) for step in range(2)]
        torch.save(
            {
                "weights": course.model.state_dict(),
                "figures": [o.figures for o in outcomes],
                "rows": [numbers(o) for o in outcomes],
                "position": course.sampler.position,
            },
            f"{folder}/{rank}.pt",
        )
        dist.barrier()  # a process that closes while another still connects takes it down
    finally:
        dist.destroy_process_group()


def test_two_processes_draw_and_learn_as_one(tmp_path: Path) -> None:
    """They agree on the rounds though each sees its own groups, and take every row once."""
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    course = Course(6, resample=2, scale="batch")
    outcomes = [course.step(step) for step in range(2)]
    got = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for step, outcome in enumerate(outcomes):
        assert sorted(got[0]["rows"][step] + got[1]["rows"][step]) == numbers(outcome)
        for one in got:
            assert one["figures"][step].keys() == outcome.figures.keys()
            for key, value in outcome.figures.items():
                assert_as_exact_as_fp32(one["figures"][step][key], value, name=key)
    for one in got:
        assert one["position"] == course.sampler.position
        for key, weight in course.model.state_dict().items():
            assert_equal_but_for_roundings(one["weights"][key], weight, name=key)


@given(
    rows=st.integers(1, 30),
    per_step=st.integers(1, 8),
    world=st.integers(1, 3),
    rounds=st.lists(st.integers(0, 8), max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_rounds_of_any_size_take_the_rows_in_order(
    rows: int, per_step: int, world: int, rounds: list[int], seed: int
) -> None:
    """No row is lost or used twice in an epoch, and a state taken between two steps goes on from there."""
    per_step = max(per_step, world)
    given = {"per_step": per_step, "seed": seed}
    everyone = [RowSampler(rows, rank=r, world=world, **given) for r in range(world)]
    used = list[int]()
    for count in [per_step, *(min(n, per_step) for n in rounds), per_step]:
        shares = [s.take(count) for s in everyone]
        used += [shares[i % world][i // world] for i in range(sum(map(len, shares)))]
    straight = RowSampler(rows, per_step=1, seed=seed)
    assert used == [straight.take()[0] for _ in used]
    assert everyone[0].state_dict() == straight.state_dict()


def test_groups_without_advantage_are_not_run_and_change_no_gradient() -> None:
    """One group of three: against a step that runs it, because a reference's log-probabilities are given."""
    lengths, model = [3, 4, 5], text_model("Qwen2").double()
    advantages = (torch.tensor([1.0, -1, 0]), torch.zeros(3), torch.tensor([0.0, 0, 0.5]))

    def gradient(reference: bool, method: Method) -> tuple[dict[str, Tensor], dict[str, float]]:
        logp_ref = torch.zeros(sum(lengths), dtype=torch.float64) if reference else None
        groups = [
            Group(text_prompt(6, seed=i), completions(lengths, seed=i), a.double(), logp_ref)
            for i, a in enumerate(advantages)
        ]
        figures = policy_step(rc.Scorer(model), torch.optim.SGD(model.parameters(), lr=0.0), groups, method)
        return {k: w.grad.clone() for k, w in model.named_parameters() if w.grad is not None}, figures

    for loss in ("grpo", "dapo", "dr_grpo"):
        method = Method(group_size=3, max_new_tokens=5, loss=loss)
        run, all_figures = gradient(True, method)
        skipped, figures = gradient(False, method)
        assert figures["idle_groups"] == 1 and all_figures["idle_groups"] == 0
        assert_as_exact_as_fp32(figures["ratio_mean"], 1.0, name="ratio_mean")
        for key, expected in run.items():
            assert_equal_but_for_roundings(skipped[key], expected, name=f"{loss} {key}")
        for key in figures.keys() - {"idle_groups"}:
            assert_as_exact_as_fp32(figures[key], all_figures[key], name=key)


def test_joined_rounds_are_one_rollout() -> None:
    """A process without prompts in a round adds nothing; media features of equal groups are given up."""

    def made(*which: int) -> Round:
        asked = [question(n) for n in which]
        owner = [p for p in range(len(asked)) for _ in range(G)]
        told = [torch.zeros(2)] * len(owner)
        features: Any = [f"features of {n}" for n in which]
        rollout = Rollout(asked, completions([2] * len(owner)), told, told, owner, features)
        return Round(rollout, made_up(rollout, None, None, None, eos=None)).without_features()

    none = Round(Rollout([], [], [], [], []), None)
    whole = joined([made(3, 4), none, made(6)])
    assert whole.differs == [True, False, True] and whole.rollout.owner == [0] * G + [1] * G + [2] * G
    assert whole.rollout.features == ["features of 3", None, "features of 6"]
    assert whole.scored is not None and len(whole.scored.text) == len(whole.rollout.completions) == 3 * G
    assert joined([none]).scored is None and joined([none, none]).differs == []


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


def test_a_run_killed_between_two_rounds_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of the epoch is used once, also of replaced groups, and every prompt has its own draws."""
    write_dataset(tmp_path / "data", train_videos=6, test_questions=1, seed=0, advance=lambda n=1: None)
    processor = tiny.build_processor()
    save_model(tiny.build_model(processor, seed=0), processor, tmp_path / "model")
    rows = len(json.loads((tmp_path / "data/train.json").read_text()))
    calls, last = list[int](), 10**9

    def parity(rollout: Rollout, *args: Any, **options: Any) -> Scored:
        """A random model's groups: some equal, some not."""
        calls.append(len(rollout.prompts))
        if len(calls) > last:
            raise Killed
        scored = made_up(rollout, *args, **options)
        odd = torch.tensor([float(sum(ids) % 2) for ids in rollout.completions])
        scored.reward.copy_(odd)
        return scored

    places, take = list[tuple[int, int]](), Feed.take

    def noted(self: Feed, *args: Any, **options: Any) -> Any:
        taken = take(self, *args, **options)
        places.extend(taken[0])
        return taken

    monkeypatch.setattr(Feed, "take", noted)
    monkeypatch.setattr(grpo_module, "score", parity)
    settings = {
        "model": str(tmp_path / "model"), "data": tmp_path / "data/train.json", "template": "plain",
        "dtype": "float32", "prompts": 3, "group_size": 3, "max_new_tokens": 4, "frames": 8,
        "pixels": 56 * 56, "gradient_checkpointing": False, "workers": 0, "save_every": 1, "lr": 1e-3,
        "steps": 4, "resample": 2, "reward": "accuracy", "mask_truncated": False,
    }  # fmt: skip
    run_train(check(settings | {"out": tmp_path / "whole"}))
    whole = (tmp_path / "whole/metrics.jsonl").read_bytes()
    counts = [sum(step == s for s, _ in places) for step in range(4)]
    assert places == [(step, i) for step, count in enumerate(counts) for i in range(count)]
    lines = [json.loads(line) for line in whole.splitlines()]
    assert any(line["resampled_groups"] > 0 for line in lines) and any(
        line["learned_groups"] for line in lines
    )
    rounds = [int(line["rounds"]) for line in lines]
    late = next(step for step in range(1, 4) if rounds[step] > 1)
    calls.clear()
    last = sum(rounds[:late]) + 1  # the step's first round is done
    with pytest.raises(Killed):
        run_train(check(settings | {"out": tmp_path / "killed"}))
    last = 10**9
    run_train(check(settings | {"out": tmp_path / "killed"}))
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == whole
    used = [
        number
        for line in (tmp_path / "killed/rows.jsonl").read_text().splitlines()
        for number in json.loads(line)["used"]
    ]
    assert len(used) == round(lines[-1]["epoch"] * rows) > 4 * 3
    order = RowSampler(rows, per_step=1, seed=0)
    assert sorted(used) == sorted(order.take()[0] for _ in used)
