"""The quick profile is right; a wrong, slow or greedy scorer fails --check; reports come from records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench import report, scoring, scoring_cases
from bench.cases import Call
from bench.scoring_cases import GROWTH, OURS, REPEATED, REWARDS, STATS, UPDATE, Group
from bench.scoring_limits import LARGE, collapsed, verdicts


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and records of the quick profile."""
    out = tmp_path_factory.mktemp("scoring") / "records.jsonl"
    status = scoring.main(["--quick", "--check", "--threads", "1", "--out", str(out)])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_every_case_runs_and_is_right(quick: tuple[int, list[dict[str, Any]]]) -> None:
    status, records = quick
    assert status == 0
    assert list(dict.fromkeys(r["case"] for r in records)) == [REWARDS, STATS, UPDATE, GROWTH]
    ours = [r for r in records if r["role"] == "ours"]
    assert len(ours) == 6 and {r["gate"] for r in ours} == {"green"}
    update = next(r for r in ours if r["case"] == UPDATE)
    assert set(update["error"]) == {"logp", "gradients, relative"}
    assert {r["chosen"] for r in records if r["case"] == GROWTH} == {"packed"}


@pytest.mark.slow
def test_a_wrong_scorer_has_a_red_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = scoring_cases.our_stats

    def wrong(x: Group) -> Call:
        call = right(x)
        return lambda: {"logp": call()["logp"] + 1e-3}

    monkeypatch.setattr(scoring_cases, "OUR_CALLS", {STATS: wrong})
    assert scoring.main(["--quick", "--check", "--no-growth", "--threads", "1"]) == 1
    row = next(s for s in capsys.readouterr().out.splitlines() if s.startswith(f"| {OURS} |"))
    cells = [cell.strip() for cell in row.split("|")]
    assert "wrong: no ratio is given" in row and cells[4] == cells[6] == ""


def record(name: str, **changes: Any) -> dict[str, Any]:
    made = {
        "case": REWARDS, "dtype": f"V = {LARGE}", "shape": {"V": LARGE}, "status": "ran", "reason": "",
        "implementation": name, "role": "ours" if name == OURS else "eager", "gate": "green",
        "error": {"logp": 0.0}, "budget": {"logp": 0.0}, "median_s": 8.0, "low_s": 8.0, "high_s": 8.0,
        "samples": 3, "extra_bytes": 10 << 20, "version": "", "quick": False,
    }  # fmt: skip
    return made | changes


@pytest.mark.parametrize(
    ("ours", "short"),
    [
        ({}, []),
        ({"median_s": 1.01}, ["time"]),
        ({"extra_bytes": (1 << 20) + 9}, ["extra memory"]),
        ({"extra_bytes": None}, ["extra memory"]),
        ({"gate": "red"}, [f"{OURS}: error against fp64", "time", "extra memory"]),
        ({"status": "failed", "reason": "no"}, [f"{OURS}: error against fp64", "time", "extra memory"]),
    ],
)
def test_limits(ours: dict[str, Any], short: list[str]) -> None:
    best = {"median_s": 1.0, "extra_bytes": 1 << 20}
    rows = [record(REPEATED), record(OURS, **(best | ours))]
    assert [v.what for v in verdicts(rows) if not v.ok] == short


def test_gradients_are_judged_by_the_worst_weight() -> None:
    made = collapsed(
        record(OURS, error={"logp": 1e-6, "gradient of a": 2e-5, "gradient of b": 3.0},
               budget={"logp": 1e-4, "gradient of a": 1e-4, "gradient of b": 1.0})
    )  # fmt: skip
    assert made["error"] == {"logp": 1e-6, "gradients, relative": pytest.approx(3e-4)}


@pytest.mark.slow
def test_the_section_is_made_of_the_records(quick: tuple[int, list[dict[str, Any]]], tmp_path: Path) -> None:
    (tmp_path / "bench.md").write_text("a\n<!-- scoring -->\nstale\n<!-- /scoring -->\nb\n")
    (tmp_path / "scoring.jsonl").write_text("\n".join(json.dumps(r) for r in quick[1]) + "\n")
    (tmp_path / "ops.jsonl").write_text("")
    options = ["--results", str(tmp_path / "ops.jsonl"), "--docs", str(tmp_path)]
    assert report.main(options) == 0
    text = (tmp_path / "bench.md").read_text()
    figure = (tmp_path / "figures" / "scoring-growth.svg").read_bytes()
    assert text.startswith("a\n<!-- scoring -->\nRun of ") and text.endswith("<!-- /scoring -->\nb\n")
    assert "stale" not in text and "| completions = 2 | 8 |" in text
    assert report.main(options) == 0
    assert (tmp_path / "bench.md").read_text() == text
    assert (tmp_path / "figures" / "scoring-growth.svg").read_bytes() == figure
