"""The comparison's table says means and paired changes, and its counter counts."""

import subprocess
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench_main
from bench import arms, record


def records() -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for seed, (start, end) in enumerate([(0.40, 0.55), (0.50, 0.60)]):
        for arm, value in (("warm start", start), ("grpo scre-igsr", end)):
            made.append({"seed": seed, "arm": arm, **dict.fromkeys(arms.SHOWN, value)})
        made[-1] |= dict.fromkeys((*arms.TRAINING, "seconds"), 0.5)
    return made


def test_the_table_pairs_seeds() -> None:
    lines = arms.table(records()).splitlines()
    assert lines[0] == "| 2 seeds | warm start | grpo scre-igsr |"
    assert lines[2] == "| accuracy | 0.450 | 0.575 (+0.125; +0.100 to +0.150) |"
    assert lines[-5] == "| scre differs share (training) |  | 0.500 |"


def test_the_figure_is_drawn_from_records_and_repeats(tmp_path: Path) -> None:
    arms.draw(records(), tmp_path / "a.svg")
    arms.draw(records(), tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes() and drawn.count(b"<path") > 5


def test_every_arm_has_a_colour_and_an_end_point() -> None:
    assert [line.split("|")[1].strip() for line in arms.table(records()).splitlines()[2:9]] == [
        key.replace("_", " ") for key in arms.SHOWN
    ]
    assert {"warm start", "more sft", "grpo accuracy", "grpo scre-igsr"} == set(arms.COLOURS)


def test_a_record_names_its_commit() -> None:
    made = record.provenance()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=record.RESULTS.parent
    )
    assert made["commit"] == (head.stdout.strip() or "unknown")
    assert made["torch"] == torch.__version__ and isinstance(made["dirty"], bool)


def test_an_unknown_benchmark_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "nothing"])
    assert bench_main.main() == 2 and "arms" in capsys.readouterr().out
