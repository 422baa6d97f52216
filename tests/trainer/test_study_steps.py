"""The study of chains of steps: what its arms learn from, its measures by hand, resumption, its page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_trainer.errors import UserError
from raise_trainer.method import Method
from raise_trainer.rollout import Rollout
from raise_trainer.rows import Row
from raise_trainer.step_world import answer_of, steps_of, supervised, true_word, truth_of
from raise_trainer.steps_config import StepsConfig
from raise_trainer.study import steps_page, steps_run
from raise_trainer.study.arms import EXPLORATORY_SEEDS, OUTCOME, STEP_ARMS
from raise_trainer.study.command import run_command
from raise_trainer.study.page import write_page, write_steps
from raise_trainer.study.records import Results
from raise_trainer.study.run import Plan
from raise_trainer.study.steps_seed import SMOKE_STEPS, Described, StepSizes, open_seed
from raise_trainer.train_fields import ChainOfStep

TRUTH = ("red", "ring", "left")
WRONG = ("blue", "ring", "left")
ROW = Row(1, "?", "video", "free-form", (), f"<answer>{answer_of(TRUTH)}</answer>", None, "demo/describe")
ARMS = ("warm-start", OUTCOME, "share-0.2", "per-step")


def plan(root: Path) -> Plan[StepSizes]:
    return Plan(
        arms=[STEP_ARMS[name] for name in ARMS], sizes=SMOKE_STEPS, results=root / "study-steps",
        work=root / "work", seeds=1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A run leaves one thread; the other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four arms of one seed."""
    root = tmp_path_factory.mktemp("steps")
    steps_run.run_steps(plan(root), lambda line: None)
    return root


def written(words: tuple[str, ...]) -> str:
    row = supervised(words)
    return row["process"] + row["solution"]


def test_what_a_run_leaves(done: Path) -> None:
    records = {record["arm"]: record for record in Results(done / "study-steps").records()}
    assert set(records) == set(ARMS)
    for name, record in records.items():
        steps = 0 if name == "warm-start" else SMOKE_STEPS.grpo_steps
        assert record["settings"] == {
            "kind": STEP_ARMS[name].kind,
            "method": STEP_ARMS[name].method,
            "steps": steps,
        }
        assert {len(curve) for curve in record["curve"].values()} == ({steps} if steps else set())
        assert record["made_from"]["command"] and record["processor_seconds"] > 0
        assert 0 < record["figures"]["held_out"]["tokens"] <= steps_run.ROOM
        assert record["figures"]["prm"] == records["warm-start"]["figures"]["prm"]
    one, other = records[OUTCOME]["curve"], records["share-0.2"]["curve"]
    assert one["reward_mean"] == one["accuracy"] != other["reward_mean"]  # the PRM only watches
    shared = set(steps_run.CURVE) - {"reward_mean", "equal_groups_share"}
    first = {n: [records[n]["curve"][key][0] for key in sorted(shared)] for n in ARMS[1:]}
    assert first[OUTCOME] == first["share-0.2"] == first["per-step"]  # the same prompts and draws
    assert records["per-step"]["curve"] != records["share-0.2"]["curve"]


def test_a_lost_run_alone_is_done_again_and_comes_out_the_same(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, jobs, do = done / "study-steps" / "share-0.2.0.json", [], steps_run.do

    def kept(job: Any, *rest: Any) -> Any:
        jobs.append((job.kind, job.arm))
        return do(job, *rest)

    before = json.loads(path.read_text())
    path.unlink()
    monkeypatch.setattr(steps_run, "do", kept)
    open_seed.cache_clear()
    said: list[str] = []
    steps_run.run_steps(plan(done), said.append)
    after = json.loads(path.read_text())
    assert jobs == [("run", "share-0.2")] and said[0] == "1 of 4 runs to do, 1 process(es)"
    assert (after["figures"], after["curve"]) == (before["figures"], before["curve"])
    steps_run.run_steps(plan(done), said.append)
    assert said[-1] == "0 of 4 runs to do, 1 process(es)" and len(jobs) == 1
    with pytest.raises(UserError, match=r"other sizes \(grpo_steps\)"):
        steps_run.run_steps(replace(plan(done), sizes=replace(SMOKE_STEPS, grpo_steps=3)))


def test_measures_by_hand(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two chains one is right and one says a wrong colour, and its true direction twice."""
    seed = open_seed(done / "work", 0, SMOKE_STEPS)
    tokenizer = seed.processor.tokenizer
    prompt = replace(seed.test[0], row=Described(**vars(ROW)))
    again = [*steps_of(WRONG), steps_of(WRONG)[-1]]
    text = rc.format_chain(again, answer_of(WRONG), open="<answer>", close="</answer>")
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (written(TRUTH), text)]

    def sampled(model: Any, seed: Any, samples: int, temperature: float, number: int) -> Iterator[Rollout]:
        some = ids if temperature else ids[:1]
        yield Rollout([prompt], some, [], [], [0] * len(some))

    monkeypatch.setattr(steps_run, "_sampled", sampled)
    found = steps_run.measure(seed.policy, seed, SMOKE_STEPS, 0)
    assert (found["accuracy"], found["accuracy_greedy"]) == (0.5, 1.0)
    assert found["steps"] == 3.5 and found["true_steps"] == 6 / 7
    assert abs(found["words_found"] - (3 + 2) / 6) < 1e-12
    assert found["tokens"] == sum(map(len, ids)) / 2
    judged = steps_run.ChainJudge(seed.prm, tokenizer)([prompt.inputs], [ids])[0]
    scores = [x for one in judged for x in one.scores.steps]
    assert found["step_score"] == pytest.approx(sum(scores) / 7)
    means = [sum(one.scores.steps) / len(one.scores.steps) for one in judged]
    rewards = [0.2 * m + 0.8 * one.scores.answer for m, one in zip(means, judged, strict=True)]
    assert found["prm_reward"] == pytest.approx(sum(rewards) / 2)


def test_the_outcome_is_0_or_1() -> None:
    row = Described(**vars(ROW))
    assert (row.text_score(written(TRUTH)), row.text_score(written(WRONG))) == (1.0, 0.0)
    assert 0 < ROW.text_score(written(WRONG)) < 1 and row.text_score("") == 0.0


def test_true_words() -> None:
    assert truth_of(ROW) == TRUTH
    assert [true_word(step, TRUTH) for step in steps_of(WRONG)] == [None, "ring", "left"]
    assert true_word(rc.Step("", "it is red", ""), TRUTH) is None
    with pytest.raises(ValueError, match="wanted a description"):
        truth_of(replace(ROW, solution="<answer>3</answer>"))


def test_the_arms() -> None:
    assert list(STEP_ARMS)[:2] == ["warm-start", OUTCOME]
    assert {a.seeds for a in STEP_ARMS.values()} == {EXPLORATORY_SEEDS}
    methods = [dict(a.method) for a in STEP_ARMS.values()]
    assert all(methods.count(one) == 1 for one in methods)
    for one in methods:
        chain = ChainOfStep(prm="p", **one)
        Method(group_size=8, max_new_tokens=4, reward="chain-of-step", chain=chain)


def test_sizes_have_every_setting_of_what_a_seed_shares() -> None:
    """Else a changed default would go unnoticed, and runs of both would be in one folder."""
    elsewhere = {"out", "start", "seed", "device", "threads", "smoke"}
    dpo = {"rounds", "paths", "questions", "min_gap", "beta", "nll_weight", "dpo_lr", "dpo_batch", "epochs"}
    later = {"n", "keep", "samples"} | dpo
    assert {f.name for f in fields(StepsConfig)} - elsewhere - later <= {f.name for f in fields(StepSizes)}
    made = StepSizes(prm_steps=7, lr=0.5).shared(3, Path("x"))
    assert (made.prm_steps, made.lr, made.seed, made.out) == (7, 0.5, 3, Path("x"))
    assert StepSizes(prompts=3).grpo(1, Path("x")).prompts == 3


def record(arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    metrics = dict.fromkeys([*steps_page.RESULTS, *steps_page.SCORES], 0.25) | {"accuracy": accuracy}
    curve = {key: [0.5, 0.5] for key in steps_run.CURVE} | {"completion_tokens_mean": [80.0, 60.0]}
    made = {n: "x" for n in ("commit", "python", "torch", "transformers", "processor", "command")}
    return {
        "arm": arm, "seed": seed, "figures": {"held_out": metrics, "prm": dict.fromkeys(steps_page.PRM, 0.5)},
        "curve": curve if arm != "warm-start" else {}, "made_from": made | {"changed": False},
    }  # fmt: skip


def test_page(tmp_path: Path, done: Path) -> None:
    page, folder = tmp_path / "p.md", tmp_path / "study-steps"
    page.write_text(
        "A.\n<!-- results: chain-of-step -->\n<!-- end -->\n<!-- results: tasks -->\nB\n<!-- end -->"
    )
    assert steps_page.NONE in write_steps(folder, page).read_text() and not list(tmp_path.rglob("*.svg"))
    results = Results(folder)
    results.open(SMOKE_STEPS)
    for seed, accuracy in enumerate((0.25, 0.5, 0.75)):
        results.write(record(OUTCOME, seed, accuracy))
        results.write(record("share-1", seed, accuracy + 0.125))
        results.write(record("warm-start", seed, accuracy - 0.25))
    text = write_steps(folder, page).read_text()
    assert text.startswith("A.\n") and "\nB\n" in text and steps_page.NONE not in text
    assert "| outcome 0/1 | 0.500 | 0.250 |" in text
    assert "| steps only | 0.625 (**+0.125; +0.125 to +0.125**) | 0.250 (+0.000; " in text
    assert "| steps only | 70.0 · 0.50 |" in text  # a mean over five steps, of which there are two
    assert (tmp_path / "figures" / "study-steps.svg").is_file() and "](figures/study-steps.svg)" in text
    assert write_steps(folder, page).read_text() == text
    with pytest.raises(UserError, match="no study is recorded"):  # the main table's folder is not there
        write_page(tmp_path / "study", page)
    assert page.read_text() == text


def test_the_main_page_has_this_part_too(tmp_path: Path) -> None:
    from raise_trainer.study.page import steps_part

    made, drawings = steps_part(tmp_path / "study-steps")
    assert made == {"chain-of-step": steps_page.NONE} and not drawings


def test_command(done: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folders = ["--results", str(done / "study-steps"), "--work", str(done / "work")]
    page = tmp_path / "page.md"
    call = ["--steps", "--smoke", "--arms", ",".join(ARMS), "--processes", "1", "--page", str(page), *folders]
    assert run_command(call) == 0
    assert "0 of 4 runs to do" in capsys.readouterr().out and "outcome 0/1" in page.read_text()
    assert run_command(["--steps", "--report", "--page", str(page), *folders]) == 0
    with pytest.raises(UserError, match="--steps: goes with --smoke"):
        run_command(["--steps", "--quick"])
    with pytest.raises(UserError, match="--arms grpo: unknown; known are warm-start, outcome"):
        run_command(["--steps", "--smoke", "--arms", "grpo", *folders])
