"""The soak run: what it judges is judged rightly, and it runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench import soak
from bench.soak_report import (
    BLOCK,
    FLAT,
    WARM,
    Slope,
    draw,
    epoch_faults,
    flat,
    last_run,
    slope,
    step_faults,
    table,
)
from raise_trainer.train_config import check

LEVEL = 700.0


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def life(steps: int, level: float, rise: float, wave: float = 0.0) -> list[float]:
    """Memory [MiB]: a warm-up that must not count, then `rise` a step, with a wave of 33 steps."""
    start = [level - 100.0] * WARM
    return start + [level + rise * s + wave * math.sin(s * math.tau / 33) for s in range(WARM, steps)]


def test_a_slope_is_found_through_the_levels_of_processes() -> None:
    found = slope([life(300, LEVEL, 0.25), life(30, 5000.0, 0.25), life(200, 900.0, 0.25)])
    assert found is not None and found.points == (300 - WARM) // BLOCK + (200 - WARM) // BLOCK
    assert (found.slope, found.low, found.high) == pytest.approx((250.0, 250.0, 250.0))
    wavy = slope([life(800, LEVEL, 0.25, wave=3.0)])
    assert wavy is not None and wavy.low < 250.0 < wavy.high and wavy.low < wavy.slope < wavy.high


def test_the_interval_is_students() -> None:
    """By hand: 11 blocks of values 0 and 1 in turns about a mean of 5/11, x = 0 … 10 blocks; t(9) = 2.262."""
    values = [0.0, 1.0] * 5 + [0.0]
    found = slope([[0.0] * WARM + [v for v in values for _ in range(BLOCK)]])
    assert found is not None and found.slope == pytest.approx(0.0)
    error = math.sqrt((30 / 11) / 9 / (110 * BLOCK**2))  # squares of the values about their mean: 30/11
    assert round(found.high / (1000 * error), 2) == 2.26 and found.low == pytest.approx(-found.high)


def test_few_steps_have_no_slope_and_growth_is_not_flat() -> None:
    assert slope([]) is None and slope([life(WARM + BLOCK * 9, LEVEL, 0.0)]) is None
    assert slope([life(WARM + BLOCK * 10, LEVEL, 0.0)]) == Slope(0.0, 0.0, 0.0, 10)
    assert not flat(None, LEVEL)
    limit = FLAT * LEVEL / 1000  # MiB a step
    for rise, wanted in ((0.0, True), (-limit, True), (0.9 * limit, True), (1.1 * limit, False)):
        assert flat(slope([life(700, LEVEL, rise)]), LEVEL) is wanted
    assert not flat(slope([life(700, LEVEL, 0.0, wave=60.0)]), LEVEL), "an uncertain slope passes as flat"


def lines(*steps: tuple[list[int], list[int]]) -> list[dict[str, Any]]:
    return [{"step": i, "used": used, "left_out": out} for i, (used, out) in enumerate(steps)]


def test_rows_lost_or_used_twice_are_found() -> None:
    """Four rows, row 2 bad, two rows a step: two epochs and a half."""
    sound = [([0, 3], []), ([1], [2]), ([3], [2]), ([0, 1], []), ([1, 3], [])]
    assert epoch_faults(lines(*sound), 4, [2]) == []
    assert epoch_faults(lines(([0, 3], []), ([0], [2])), 4, [2]) == ["epoch 0: 1 rows twice, 1 lost"]
    assert epoch_faults(lines(*sound[:4], ([1, 1], [])), 4, [2]) == ["epoch 2: 1 rows twice, 0 lost"]
    assert epoch_faults(lines(([0, 3], []), ([1, 2], [])), 4, [2]) == [
        "epoch 0: rows [2] used or left out wrongly"
    ]
    assert epoch_faults(lines(([0, 3], []), ([2], [1])), 4, [2]) != []


def test_each_step_is_there_once() -> None:
    found = [{"stage": "train", "step": s} for s in range(3)] + [{"stage": "evaluate", "step": 2}]
    assert step_faults(found, 3, "m") == []
    for wrong in (found[:2], found[1:], [*found, found[0]], [found[1], found[0], found[2]]):
        assert len(step_faults(wrong, 3, "m")) == 1


def test_a_run_that_dies_by_itself_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = check({"model": "m", "data": "d.json", "out": tmp_path / "run"})
    (tmp_path / "run.log").write_text("why it died")
    monkeypatch.setattr(
        soak, "start", lambda config: subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    )
    for kill in (None, (1, 0.0, False)):
        with pytest.raises(RuntimeError, match="ended with 3: why it died"):
            soak.live(config, kill)


def test_the_figure_and_the_table_say_what_was_recorded(tmp_path: Path) -> None:
    common = {"begun": "2026-01-02", "commit": "c"}
    first = {"kind": "process", "killed": True, "in_save": True, "first_step": 0, "memory_mib": [1.0, 2.0]}
    second = first | {"killed": False, "in_save": False, "first_step": 1, "memory_mib": [1.5]}
    whole = {
        "kind": "run", "steps": 2, "finished": True, "seconds": 3.0, "kills": 1, "kills_in_save": 1,
        "rows": 4, "bad_rows": 1, "epochs": 1.0, "memory_mib": 1.5, "flat": True, "learned_share": 0.5,
        "orphans": 0,
        "memory_slope": {"slope": 1.0, "low": -1.0, "high": 3.0, "points": 9}, "tokens_per_s": 9.0,
        "faults": ["epoch 0: 1 rows twice, 0 lost"],
    }  # fmt: skip
    file = tmp_path / "soak.jsonl"
    records = [{"begun": "2026-01-01", "kind": "run"}, *(common | r for r in (first, second, whole))]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    found = last_run(file)
    assert len(found) == 3
    said = table(found)
    assert "+1.00 MiB in 1,000 steps, 95 % -1.00 to +3.00; flat: True" in said
    assert "kills 1, of them during a save 1" in said and "1 rows twice" in said
    draw(found, tmp_path / "soak.svg")
    drawn = (tmp_path / "soak.svg").read_bytes()
    draw(found, tmp_path / "again.svg")
    assert b"<svg" in drawn and (tmp_path / "again.svg").read_bytes() == drawn


def test_a_short_run_is_killed_and_finishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kill while it saves; 12 rows of which one is bad, two epochs."""
    out = tmp_path / "soak.jsonl"
    status = soak.main(["--quick", "--out", str(out)])
    *lives, whole = last_run(out)
    assert status == 0, capsys.readouterr().out
    assert whole["finished"] and whole["faults"] == [] and whole["steps"] == 12 and whole["epochs"] == 2.0
    assert [life["killed"] for life in lives] == [True, False]
    assert (whole["kills"], whole["kills_in_save"], whole["orphans"]) == (1, int(lives[0]["in_save"]), 0)
    assert all(100 < mib < 1 << 14 for life in lives for mib in life["memory_mib"])
