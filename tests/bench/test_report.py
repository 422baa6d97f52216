"""Documents and figures come from the records alone, and repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report

ABOUT = {
    "commit": "0123456789abcdef", "dirty": True, "python": "3.11", "torch": "2.14", "threads": 2,
    "begun": "2026-01-02T00:00:00Z", "device": "a processor", "device_kind": "cpu",
    "processor": "x", "memory_bytes": 2**34, "packages": {"torch": "2.14", "trl": ""}, "compiled": True,
    "quick": False,
}  # fmt: skip


def records() -> list[dict[str, Any]]:
    made = []
    for dtype in ("float32", "bfloat16"):
        for name, role, seconds in (
            ("amax", "unit", 0.004), ("raise-core", "ours", 0.008), ("eager, reused memory", "eager", 0.012),
            ("a peer", "peer", 0.006),
        ):  # fmt: skip
            made.append(
                ABOUT
                | {
                    "case": "logp", "dtype": dtype, "shape": {"T": 2, "V": 64}, "role": role,
                    "implementation": name, "note": "", "unit": "amax", "version": "", "status": "ran",
                    "reason": "", "median_s": seconds, "low_s": seconds, "high_s": 1.1 * seconds,
                    "samples": 9, "extra_bytes": 64, "gb_per_s": 3.0,
                    "gflop_per_s": 0.0, "share_of_limit": 0.004 / seconds, "error": {"logp": 1e-7},
                    "budget": {"logp": 2e-7}, "gate": "green" if role == "ours" else "none",
                }
            )  # fmt: skip
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bench.md").write_text("before\n<!-- ops:cpu -->\nstale\n<!-- /ops:cpu -->\nafter\n")
    older = [r | {"begun": "2026-01-01T00:00:00Z", "implementation": "left behind"} for r in records()]
    lines = [json.dumps(r) for r in [*records(), *older]]
    (tmp_path / "ops.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_last_run_goes_between_the_markers(folder: Path) -> None:
    options = ["--results", str(folder / "ops.jsonl"), "--docs", str(folder)]
    assert report.main(options) == 0
    text = (folder / "bench.md").read_text()
    assert text.startswith("before\n<!-- ops:cpu -->\nRun of 2026-01-02") and text.endswith(
        "<!-- /ops:cpu -->\nafter\n"
    )
    assert "stale" not in text and "left behind" not in text
    assert "`0123456789ab`, with changes that are not committed" in text
    assert (
        "| raise-core | 8.0 ms (n = 9) | 8.0 ms to 8.8 ms | 2.00 | 3.0 (50 %) | 0.0 MiB | logp 1.0e-07 |  |"
        in text
    )
    assert "Faster than raise-core here: a peer (0.75 of our time)." in text
    figures = {f.name: f.read_bytes() for f in (folder / "figures").iterdir()}
    assert set(figures) == {"ops-time-cpu.svg", "ops-memory-cpu.svg"}
    assert report.main(options) == 0
    assert (folder / "bench.md").read_text() == text
    assert figures == {f.name: f.read_bytes() for f in (folder / "figures").iterdir()}


def test_numbers_of_a_figure_have_no_exponent() -> None:
    values = (1380.4, 99.96, 12.345, 0.0512, 6e-05, 0.0)
    assert [report.plain(v) for v in values] == ["1380", "100", "12.3", "0.0512", "0", "0"]


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- ops:cuda -->"):
        report.written("nothing", "cuda", "body")


def test_no_records_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "none.jsonl")])
    assert "run python -m bench ops first" in capsys.readouterr().err


def test_a_wrong_result_has_no_bar(tmp_path: Path) -> None:
    right = records()
    wrong = [r | {"gate": "red"} if r["role"] == "ours" else r for r in right]
    sizes = []
    for k, rows in enumerate((right, wrong)):
        report.draw(rows, tmp_path / f"{k}.svg", "median_s")
        sizes.append((tmp_path / f"{k}.svg").read_text().count("#2a7f62"))
    assert sizes[0] > 0 and sizes[1] == 0
