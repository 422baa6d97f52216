"""What lies in the folder of a run, read for a report; every part may be missing or half written."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .completions import Completion, read_completions
from .errors import UserError
from .json_lines import read_json_lines

LOGS = ("metrics.jsonl", "timings.jsonl", "completions.jsonl")
TRAINING = ("train", "grpo")  # stages of a training run and of the demo
UNITS = {"_per_s": "rate", "_gib": "memory"}  # of a figure in timings.jsonl, by its end; others are seconds


@dataclass(frozen=True)
class RunFiles:
    """One run. name: how a page calls it. settings: by name. Lines in the order they were written.

    kind: "train", "sft" or "demo". training, evaluations: lines of metrics.jsonl. timings: lines of
    timings.jsonl. left_out: lines of all processes' quarantine lists.
    """

    name: str
    folder: Path
    kind: str
    settings: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    completions: list[Completion]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Finished steps and values of a metric of the training lines; lines without it count for nothing."""
        return _series(self.training, key)

    def evaluation(self, key: str = "text_score_mean") -> tuple[list[int], list[float]]:
        """Finished steps and values of a metric of the evaluations."""
        return _series(self.evaluations, key)

    def cost(self, key: str) -> tuple[list[int], list[float]]:
        """Finished steps and values of a figure of the steps' timings; of a repeated step its last."""
        lines = {line["step"]: line for line in self.timings if line.get("stage") == "step" and key in line}
        return _series([lines[step] for step in sorted(lines)], key)

    def phases(self) -> dict[str, float]:
        """Mean seconds a step in each phase, over the steps recorded; {} without timings."""
        return self._means("seconds")

    def rates(self) -> dict[str, float]:
        """Means of the figures per second, such as tokens_per_s."""
        return self._means("rate")

    def peak_gib(self) -> float | None:
        """Largest memory recorded [GiB]; None when none was."""
        found = [v for line in self.timings for k, v in line.items() if _unit(k) == "memory"]
        return max(found, default=None)

    def _means(self, unit: str) -> dict[str, float]:
        lines = [line for line in self.timings if line.get("stage") == "step"]
        names = dict.fromkeys(k for line in lines for k in line if k not in ("stage", "step"))
        return {
            name: sum(line.get(name, 0.0) for line in lines) / len(lines)
            for name in names
            if _unit(name) == unit
        }


def _unit(name: str) -> str:
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "seconds")


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    having = [line for line in lines if key in line]
    return [int(line["step"]) + 1 for line in having], [float(line[key]) for line in having]


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """The runs in these folders, each with a name of its own. UserError for a folder that holds no run."""
    names = [folder.resolve().name for folder in folders]
    shown = [n if names.count(n) == 1 else str(f) for n, f in zip(names, folders, strict=True)]
    if len(set(shown)) < len(shown):
        twice = next(n for n in shown if shown.count(n) > 1)
        raise UserError(f"{twice}: given twice; name each run once")
    return [_read(folder, name) for folder, name in zip(folders, shown, strict=True)]


def _read(folder: Path, name: str) -> RunFiles:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the `out` folder of a run")
    kind, settings = _settings(folder)
    if not kind and not any((folder / log).is_file() for log in LOGS):
        raise UserError(
            f"{folder}: no run, it has neither config.yaml nor {' nor '.join(LOGS)}; "
            "name the `out` folder of a run"
        )
    metrics, timings = (_lines(folder / log) for log in LOGS[:2])
    quarantine = sorted(folder.glob("quarantine*.jsonl"))
    written = folder / LOGS[2]
    return RunFiles(
        name=name,
        folder=folder,
        kind=kind or "train",
        settings=settings,
        training=[m for m in metrics if m.get("stage") in TRAINING and "step" in m],
        evaluations=[m for m in metrics if m.get("stage") == "evaluate" and "step" in m],
        timings=timings,
        left_out=[entry for file in quarantine for entry in _lines(file)],
        completions=[c for _, c in read_completions(written)] if written.is_file() else [],
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_json_lines(file)] if file.is_file() else []


def _settings(folder: Path) -> tuple[str, dict[str, Any]]:
    """What kind of run it is ("" when nothing says so), and its settings."""
    ours, demo = folder / "config.yaml", folder / "config.json"
    try:
        if ours.is_file():
            text = ours.read_text(encoding="utf-8")
            first = text.partition("\n")[0]
            found = yaml.safe_load(text) or {}
            kind = "sft" if first.split() == ["#", "raise-core", "sft"] else "train"
        elif demo.is_file():
            found, kind = json.loads(demo.read_text(encoding="utf-8")), "demo"
        else:
            return "", {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its settings cannot be read ({reason})") from None
    if not isinstance(found, dict):
        raise UserError(f"{folder}: its settings are {type(found).__name__}, wanted `key: value` lines")
    return kind, found


def differing(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, as text for each run; "–" where a run has none.

    `out` is always another folder and is left out.
    """
    names = dict.fromkeys(key for run in runs for key in run.settings if key != "out")
    every = {key: [_shown(run.settings, key) for run in runs] for key in names}
    return {key: values for key, values in every.items() if len(set(values)) > 1}


def _shown(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "–"
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def finite(values: Sequence[float]) -> list[float]:
    """Those that are neither NaN nor infinite."""
    return [value for value in values if math.isfinite(value)]
