"""The quick profile is right; a wrong or a slow reward fails --check; the page comes from records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench import rewards
from bench.limits import judge
from bench.rewards_cases import CASE, KEPT, NAIVE, OURS
from raise_core.integrations.trl import ConfidenceReward


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_function_runs_and_ours_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.jsonl"
    assert rewards.main(["--quick", "--check", "--threads", "1", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["implementation"] for r in records] == [NAIVE, KEPT, OURS]
    assert {r["status"] for r in records} == {"ran"} and records[-1]["gate"] == "green"
    assert "holds" in capsys.readouterr().out


def test_a_wrong_reward_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ConfidenceReward.__call__

    def wrong(self: Any, *args: Any, **kwargs: Any) -> list[float | None]:
        return [None if r is None else 1.01 * r for r in right(self, *args, **kwargs)]

    monkeypatch.setattr(ConfidenceReward, "__call__", wrong)
    assert rewards.main(["--quick", "--check", "--threads", "1"]) == 1


def record(name: str, **changes: Any) -> dict[str, Any]:
    made = {
        "case": CASE, "dtype": "V = 512", "shape": {"V": 512}, "status": "ran", "reason": "", "version": "",
        "implementation": name, "role": "ours" if name == OURS else "eager", "gate": "green", "unit": NAIVE,
        "error": {"log reward": 0.0}, "budget": {"log reward": 0.0}, "median_s": 8.0, "low_s": 8.0,
        "high_s": 8.0, "samples": 3, "extra_bytes": 1 << 20, "quick": False, "device_kind": "cpu", "note": "",
        "share_of_limit": None, "begun": "2026-01-01", "dirty": False, "compiled": True, "packages": {},
        "commit": "0" * 40, "device": "some CPU", "threads": 2, "memory_bytes": 1 << 30, "python": "3.11",
        "load_before": 2.5,
    }  # fmt: skip
    return made | changes


@pytest.mark.parametrize(("seconds", "ok"), [(1.59, True), (1.61, False)])
def test_five_times_faster_is_wanted(seconds: float, ok: bool) -> None:
    verdicts = judge([record(NAIVE), record(OURS, median_s=seconds)], rewards.LIMITS)
    assert [v.ok for v in verdicts] == [True, ok]


def test_the_page_shows_the_last_run() -> None:
    old = [record(NAIVE, begun="2025-01-01", median_s=77.0), record(OURS, begun="2025-01-01")]
    text = rewards.written(
        "a <!-- rewards -->x<!-- /rewards --> b", [*old, record(NAIVE), record(OURS, median_s=1.0)]
    )
    assert text.startswith("a <!-- rewards -->") and text.endswith("<!-- /rewards --> b")
    assert "0.12" in text and "from other work: 2.5." in text and "77" not in text
    assert rewards.written(text, [record(NAIVE), record(OURS, median_s=1.0)]) == text
    with pytest.raises(ValueError, match="has no <!-- rewards -->"):
        rewards.written("nothing", [record(NAIVE)])
