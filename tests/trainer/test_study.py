"""The study end to end at the size of seconds: equal compute, resumption after a kill, the page."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_trainer import tiny
from raise_trainer.cli import COMMANDS
from raise_trainer.errors import UserError
from raise_trainer.method import Method
from raise_trainer.study import arms, one, run
from raise_trainer.study.arms import ARMS, EXPLORATORY, MAIN
from raise_trainer.study.command import run_command
from raise_trainer.study.compute import CountedPhases, equal_steps, operations
from raise_trainer.study.learning import reference_of
from raise_trainer.study.page import HEADINGS, PART, write_page
from raise_trainer.study.records import Results, rounded
from raise_trainer.study.run import Plan, run_study
from raise_trainer.study.sizes import FULL, SMOKE
from raise_trainer.study.world_shift import TEST_SETS

SMALL = replace(SMOKE, test_questions=4, shifted_questions=2)


def plan(root: Path, *names: str, **other: Any) -> Plan:
    given = {"results": root / "results", "work": root / "work", "seeds": 1, "sizes": SMALL} | other
    return Plan(arms=[ARMS[name] for name in names], **given)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of three arms, with one seed."""
    root, threads = tmp_path_factory.mktemp("study"), torch.get_num_threads()
    run_study(plan(root, "warm-start", "sft", "rlpr"), lambda line: None)
    torch.set_num_threads(threads)
    return root


def test_what_a_run_leaves(done: Path) -> None:
    results = Results(done / "results")
    records = {record["arm"]: record for record in results.records()}
    assert set(records) == {"warm-start", "sft", "rlpr"}
    counted = results.operations()
    assert set(counted) == {"warm-start", "sft", "rlpr", "scre-igsr"}  # the budget is the base's
    for name, record in records.items():
        assert set(record["figures"]) == set(TEST_SETS) == set(record["questions"])
        assert all(0 <= v <= 1 for figures in record["figures"].values() for v in figures.values())
        assert record["settings"]["steps"] == equal_steps(counted, ARMS[name], SMALL.grpo_steps)
        assert len(record["curve"].get("loss", [])) == record["settings"]["steps"]
        assert record["made_from"]["command"] == "raise-core study" and record["made_from"]["commit"]
    assert {"match", "confidence_mean", "kl"} <= set(records["rlpr"]["curve"])
    assert sum(f.stat().st_size for f in (done / "results").iterdir()) < 20_000
    assert not ARMS["rlpr"].reads_own_answers  # its pass over them is for the log
    assert counted["rlpr"]["score"] > 0  # the pass over the gold answers alone


def test_finished_runs_are_not_done_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "do", lambda *_: pytest.fail("a finished run was done again"))
    said: list[str] = []
    run_study(plan(done, "warm-start", "sft", "rlpr"), said.append)
    assert said == ["0 of 3 runs to do, 1 process(es)"]


def test_a_missing_run_alone_is_done_and_comes_out_the_same(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm start is the kept one; a run that was lost gives the same figures again."""
    results = Results(done / "results")
    before, jobs, do = json.loads(results.path("sft", 0).read_text()), [], one.do

    def kept(job: one.Job, *rest: Any) -> Any:
        jobs.append(job)
        return do(job, *rest)

    results.path("sft", 0).unlink()
    monkeypatch.setattr(run, "do", kept)
    threads = torch.get_num_threads()
    run_study(plan(done, "warm-start", "sft", "rlpr"), lambda line: None)
    torch.set_num_threads(threads)
    after = json.loads(results.path("sft", 0).read_text())
    assert [(job.kind, job.arm) for job in jobs] == [("run", "sft")]
    assert (after["figures"], after["curve"]) == (before["figures"], before["curve"])


def test_other_sizes_are_refused_in_the_same_folders(done: Path, tmp_path: Path) -> None:
    other = replace(SMALL, grpo_steps=3)
    with pytest.raises(UserError, match=r"--results .* other sizes \(grpo_steps\); choose another folder"):
        run_study(plan(done, "sft", sizes=other))
    with pytest.raises(UserError, match=r"--work .* other sizes \(grpo_steps\)"):
        run_study(plan(done, "sft", sizes=other, results=tmp_path / "r"))


def running(where: Path) -> list[str]:
    """Processes that work in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"multiprocessing" in (process / "cmdline").read_bytes() and str(where) in os.readlink(
                process / "cwd"
            ):
                found.append(process.name)
    return found


def test_killed_it_goes_on(done: Path, tmp_path: Path) -> None:
    """SIGKILL after the first result: the workers end, and the next call does the rest and no more."""
    folders = ["--results", str(tmp_path / "r"), "--work", str(done / "work")]
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "compute.json").write_text((done / "results" / "compute.json").read_text())
    code = (
        "import sys; from raise_trainer.study import command, sizes; "
        f"command.SMOKE = sizes.Sizes(**{vars(SMALL)}); sys.exit(command.run_command(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", code, "--smoke", "--seeds", "1", "--arms", "warm-start,sft,rlpr", *folders]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen([*call, "--processes", "2"], env=env, cwd=tmp_path, stdout=subprocess.DEVNULL)
    results = Results(tmp_path / "r")
    until = time.monotonic() + 300
    while not results.records() and begun.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    begun.send_signal(signal.SIGKILL)
    assert begun.wait() == -signal.SIGKILL
    while running(tmp_path) and time.monotonic() < until:
        time.sleep(0.02)
    assert not running(tmp_path)  # its workers end with it
    first = {
        (r["arm"], r["seed"]): results.path(r["arm"], r["seed"]).stat().st_mtime_ns for r in results.records()
    }
    assert 1 <= len(first) < 3
    said, threads = list[str](), torch.get_num_threads()
    run_study(plan(done, "warm-start", "sft", "rlpr", results=tmp_path / "r"), said.append)
    torch.set_num_threads(threads)
    assert said[0] == f"{3 - len(first)} of 3 runs to do, 1 process(es)"
    assert {(r["arm"], r["seed"]) for r in results.records()} == {("warm-start", 0), ("sft", 0), ("rlpr", 0)}
    assert all(results.path(*key).stat().st_mtime_ns == when for key, when in first.items())
    for record in results.records():  # as in the run that nobody killed
        whole = json.loads((done / "results" / f"{record['arm']}.0.json").read_text())
        assert record["figures"] == whole["figures"]


def test_the_page_is_filled_in_and_its_prose_left_alone(done: Path, tmp_path: Path) -> None:
    page = write_page(done / "results", tmp_path / "study.md")
    text = page.read_text()
    assert all(
        f"## {title}\n" in text and f"<!-- results: {name} -->" in text for name, title in HEADINGS.items()
    )
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "study-accuracy-match.svg",
        "study-training.svg",
    }
    assert write_page(done / "results", page).read_text() == text
    accuracy = json.loads(Results(done / "results").path("sft", 0).read_text())["figures"]["held_out"][
        "accuracy"
    ]
    (tmp_path / "mine.md").write_text("Before.\n<!-- results: consistency -->\nold\n<!-- end -->\nAfter.\n")
    mine = write_page(done / "results", tmp_path / "mine.md").read_text()
    assert mine.startswith("Before.\n") and mine.endswith("<!-- end -->\nAfter.\n") and "old" not in mine
    assert f"| continued SFT | {accuracy:.3f} |" in mine and "GRPO 0/1" not in mine  # what has not run
    for text, message in (
        ("prose", "has no `<!-- results"),
        ("<!-- results: x -->\n<!-- end -->", "part 'x'"),
    ):
        (tmp_path / "bad.md").write_text(text)
        with pytest.raises(UserError, match=message):
            write_page(done / "results", tmp_path / "bad.md")
        assert (tmp_path / "bad.md").read_text() == text


def test_the_project_s_page_has_every_part_once() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/study.md"
    named = [name for _, name, _ in PART.findall(page.read_text(encoding="utf-8"))]
    assert sorted(named) == sorted(HEADINGS)


def test_steps_cost_the_base_s_budget() -> None:
    per_step = {"scre-igsr": {"rollout": 6.0, "score": 1.0, "update": 3.0}, "sft": {"update": 4.0}}
    per_step |= {"rlpr": {"rollout": 6.0, "score": 3.0, "update": 3.0}, "warm-start": {}}
    want = {"scre-igsr": 60, "sft": 150, "rlpr": 50, "warm-start": 0}
    assert {name: equal_steps(per_step, ARMS[name], 60) for name in want} == want
    assert equal_steps({**per_step, "sft": {"update": 1e6}}, ARMS["sft"], 60) == 1


def test_attention_is_counted() -> None:
    q = torch.ones(1, 2, 4, 8)
    products = 2 * (2 * 2 * 4 * 4 * 8)  # two heads, two products of [4, 8] x [8, 4] and [4, 4] x [4, 8]
    assert operations(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == products


def test_operations_of_a_matrix_product_are_counted_by_phase() -> None:
    a, b, phases = torch.ones(3, 5), torch.ones(5, 7), CountedPhases()
    assert operations(lambda: a @ b) == 2 * 3 * 5 * 7
    for name, times in (("score", 1), ("update", 3), ("score", 1)):
        with phases(name):
            [a @ b for _ in range(times)]
    assert phases.operations == {"score": 2 * 210, "update": 3 * 210}


def test_who_needs_the_pass_under_the_reference() -> None:
    free = {a.name for a in ARMS.values() if a.kind == "grpo" and not a.reads_reference}
    assert free == {"grpo", "t-grpo"}


def test_the_arms_are_those_of_the_paper_and_their_settings_can_be_had() -> None:
    assert [a.title for a in MAIN] == [
        "warm start", "continued SFT", "GRPO 0/1", "GRPO-CARE", "RLPR", "Video-RAISE, SCRE only",
        "Video-RAISE, IGSR paper", "Video-RAISE, IGSR balanced",
    ]  # fmt: skip
    assert len(ARMS) == len(MAIN) + len(EXPLORATORY) and all(re.fullmatch(r"[a-z0-9.-]+", n) for n in ARMS)
    assert {a.seeds for a in MAIN} == {8} and {a.seeds for a in EXPLORATORY} == {3}
    for a in ARMS.values():
        assert Method(group_size=FULL.group_size, max_new_tokens=28, **a.method)
    changed = [dict(a.method) | {"reference": a.reference} for a in ARMS.values() if a.kind == "grpo"]
    assert all(changed.count(one) == 1 for one in changed)
    with pytest.raises(UserError, match="--arms grop: unknown; known are warm-start, sft, grpo"):
        arms.arm("grop")


def test_references_by_name() -> None:
    model = tiny.build_model(tiny.build_processor(), seed=0)
    kinds = {
        "reference-policy": rc.PolicyReference,
        "reference-frozen": rc.FrozenReference,
        "grpo": rc.EmaReference,
    }
    for name, kind in kinds.items():
        assert type(reference_of(ARMS[name], model)) is kind


def test_figures_are_kept_short() -> None:
    assert rounded({"a": [0.123456, 3], "b": {"c": (1e-9,)}, "d": "x"}) == {
        "a": [0.1235, 3],
        "b": {"c": [0.0]},
        "d": "x",
    }


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "study" in COMMANDS
    with pytest.raises(UserError, match="no study is recorded there; run it without --report"):
        run_command(["--report", "--results", str(tmp_path / "none"), "--page", str(tmp_path / "p.md")])
    with pytest.raises(UserError, match="got '0', expected a whole number, 1 or more"):
        run_command(["--seeds", "0"])
