"""The benches' records and their list."""

from __future__ import annotations

import subprocess

import pytest
import torch

from bench import __main__ as bench_main
from bench import record


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
    assert bench_main.main() == 2 and "soak" in capsys.readouterr().out
