"""What is recorded of a finished demo in steps: its commands, its curves, its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import search
from raise_trainer.steps_config import StepsConfig


def write(folder: Path, **changed: Any) -> Path:
    folder.mkdir()
    settings = {name: getattr(StepsConfig(), name) for name in StepsConfig.__dataclass_fields__}
    config = {
        k: str(v) if isinstance(v, Path) else v for k, v in (settings | {"out": folder} | changed).items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_is_recorded_with_those_it_began_from(tmp_path: Path, monkeypatch: Any) -> None:
    first = write(tmp_path / "first", seed=3, threads=2)
    second = write(tmp_path / "second", start=str(first), n=(1, 2))
    run = write(tmp_path / "third", start=str(second), smoke=True)
    point = {"method": "pass", "n": 1, "accuracy": 0.5, "standard_error": 0.1, "questions": 4, "tokens": 9.0}
    (run / "search.jsonl").write_text(json.dumps(point) + "\n")
    metrics: list[dict[str, Any]] = [
        {"stage": "look", "step": 0, "loss": 1.0}, {"stage": "prm", "step": 0, "loss": 0.5},
        {"stage": "pairs", "step": 1, "pairs": 7}, {"stage": "prm", "step": 9, "own_step_accuracy": 0.75},
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    monkeypatch.setattr(search, "RESULTS", tmp_path)
    monkeypatch.setattr(search, "FIGURE", tmp_path / "curve.svg")
    assert search.main([str(run)]) == 0
    found = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert [x["kind"] for x in found] == ["search", "prm", "pairs"] and (tmp_path / "curve.svg").is_file()
    assert found[0]["accuracy"] == 0.5 and found[1]["own_step_accuracy"] == 0.75 and found[2]["pairs"] == 7
    assert found[0]["command"].split("; ") == [
        f"raise-core demo-steps --out {first} --seed 3",
        f"raise-core demo-steps --out {second} --start {first} --n 1 2",
        f"raise-core demo-steps --out {run} --start {second} --smoke",
    ]
