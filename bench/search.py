"""`python -m bench search RUN`: records a finished `raise-core demo-steps` and draws docs/figures/search.svg.

Each line of bench/results/search.jsonl has the command that made the run, the commit, and one figure: a
method's accuracy with N chains, the PRM's own rates, a round's pairs, or a policy on unseen videos.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from raise_trainer.search.figure import draw_curves
from raise_trainer.steps_config import StepsConfig

from .record import RESULTS, provenance

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "search.svg"
KEPT = ("prm", "pairs", "evaluate")


def command_of(config: dict[str, Any]) -> str:
    """The command line of a run, from its config.json."""
    words = ["raise-core", "demo-steps"]
    for field in fields(StepsConfig):
        value = config.get(field.name)
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        if value is not None and value != default and field.name != "threads" and value is not False:
            shown = [str(v) for v in value] if isinstance(value, list) else [str(value)]
            words += [f"--{field.name.replace('_', '-')}", *([] if value is True else shown)]
    return " ".join(words)


def configs_of(run: Path) -> list[dict[str, Any]]:
    """The settings of a run, behind those of the runs that it was started from, the first one first."""
    found = list[dict[str, Any]]()
    at: str | Path | None = run
    while at is not None:
        found.insert(0, json.loads((Path(at) / "config.json").read_text(encoding="utf-8")))
        at = found[0]["start"]
    return found


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def records_of(run: Path) -> list[dict[str, Any]]:
    """What a run found: its curves, then the figures of its PRM, of its rounds and its policies."""
    points = [{"kind": "search", **point} for point in _lines(run / "search.jsonl")]
    metrics = [m for m in _lines(run / "metrics.jsonl") if m["stage"] in KEPT]
    prm = [m for m in metrics if "own_step_accuracy" in m]
    rest = [m for m in metrics if m["stage"] != "prm"]
    return points + [{"kind": m["stage"], **{k: v for k, v in m.items() if k != "stage"}} for m in prm + rest]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench search", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    run = parser.parse_args(argv).run
    made = {"command": "; ".join(map(command_of, configs_of(run))), **provenance()}
    found = records_of(run)
    text = "".join(json.dumps(record | made) + "\n" for record in found)
    (RESULTS / "search.jsonl").write_text(text, encoding="utf-8")
    draw_curves([r for r in found if r["kind"] == "search"], FIGURE)
    print(f"{RESULTS / 'search.jsonl'}: {len(found)} lines; {FIGURE}")
    return 0
