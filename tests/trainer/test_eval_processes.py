"""`raise-core eval` by two processes: each asks its own share, and the results are those of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from raise_trainer import tiny
from raise_trainer.benchmarks.answers import read_answers
from raise_trainer.benchmarks.command import settings_of
from raise_trainer.benchmarks.page import write
from raise_trainer.benchmarks.run import evaluate
from raise_trainer.demo import save_model

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).with_name("benchmark_rows")


WORLD = 2


def arguments(folder: Path, out: Path) -> list[str]:
    return [
        str(folder / "model"), "--bench", "vsibench", "--data", str(folder), "--out", str(out),
        "--dtype", "float32", "--max-new-tokens", "5", "--template", "plain", "--workers", "0",
        "--samples", "2", "--temperature", "1",
    ]  # fmt: skip


def by_two(given: list[str]) -> str:
    """The command in two processes; returns what the first said."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "trainer"))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "raise_trainer.cli", "eval", *given],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    done = [process.communicate(timeout=600) for process in running]
    assert all(process.returncode == 0 for process in running), [error[-2000:] for _, error in done]
    assert not done[1][0].strip()
    return done[0][0]


def by_one(given: list[str]) -> str:
    """The same in this process; returns the results as JSON."""
    settings = settings_of(given)
    write(settings, evaluate(settings))
    return (settings.out / "results.json").read_text()


def test_two_processes_share_the_questions_and_one_goes_on_from_both(tmp_path: Path) -> None:
    processor = tiny.build_processor()
    save_model(tiny.build_model(processor, seed=0), processor, tmp_path / "model")
    rows = [json.loads(line) for line in (ROWS / "vsibench/test.jsonl").read_text().splitlines()]
    (tmp_path / "eval_vsibench.json").write_text(
        json.dumps(
            [
                {"problem_id": row["id"], "problem": row["question"], "data_type": "text",
                 "problem_type": "multiple choice" if row["options"] else "regression",
                 "options": row["options"] or [], "solution": row["ground_truth"]}
                for row in rows
            ]
        )
    )  # fmt: skip
    two, one = tmp_path / "two", tmp_path / "one"
    assert "10 questions, 20 answers to take" in by_two(arguments(tmp_path, two))
    shares = [(two / name).read_bytes() for name in ("answers.jsonl", "answers-1.jsonl")]
    ids = [{json.loads(line)["id"] for line in share.splitlines()} for share in shares]
    assert ids == [{"0", "2", "4", "6", "8"}, {"1", "3", "5", "7", "9"}]
    found, results = read_answers(two), (two / "results.json").read_text()
    assert len(found) == 20 and all(answer.usable for answer in found.values())
    assert by_one(arguments(tmp_path, two)) == results
    assert [(two / name).read_bytes() for name in ("answers.jsonl", "answers-1.jsonl")] == shares
    assert by_one(arguments(tmp_path, one)) == results
    assert {k: a.text for k, a in read_answers(one).items()} == {k: a.text for k, a in found.items()}
