"""1,200 GRPO steps with bad media, killed again and again: is anything lost, used twice, or leaking?

    python -m bench soak             records go to bench/results/soak.jsonl
    python -m bench soak --quick     12 steps and a kill, nothing recorded: does everything run?
    python -m bench soak --report    what the last recorded run found, and its figure

A supervisor starts `raise-core train` on the CPU, kills it by SIGKILL at random moments (some while it saves)
and starts it again, until it has finished. Exit status 1 when something was lost, used twice or grew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from bench.record import RESULTS, provenance
from bench.soak_report import FIGURE, Record, draw, epoch_faults, flat, last_run, slope, step_faults, table
from bench.soak_world import write_model, write_rows
from raise_trainer.train import run_sft
from raise_trainer.train_config import TrainConfig, as_yaml, check

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """steps: of the run. rows, bad: of the data. longest: most steps to a kill. warm: supervised steps."""

    steps: int = 1200
    kills: int = 24
    rows: int = 120
    bad: int = 6
    longest: int = 40
    warm: int = 80
    save_every: int = 10
    seed: int = 0


QUICK = Plan(steps=12, kills=1, rows=12, bad=1, longest=4, warm=4, save_every=3)
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "template": "plain", "prompts": 2, "group_size": 4, "max_new_tokens": 12,
    "frames": 4, "pixels": 56 * 56, "gradient_checkpointing": False, "workers": 1, "on_bad_media": "skip",
    "lr": 1e-3,
}  # fmt: skip


def prepare(folder: Path, plan: Plan) -> tuple[TrainConfig, list[int]]:
    """Data, and a model after a short supervised warm start; the run's settings and the bad rows' numbers."""
    write_model(folder / "random")
    bad = write_rows(folder / "data", plan.rows, plan.bad, plan.seed)
    given = SETTINGS | {"data": folder / "data/rows.json", "seed": plan.seed}
    warm = {"steps": plan.warm, "prompts": 8, "lr": 5e-3, "save_every": plan.warm, "workers": 0}
    run_sft(check(given | warm | {"model": str(folder / "random"), "out": folder / "sft"}))
    (model,) = folder.glob("sft/checkpoints/*/model")
    own = {"model": str(model), "out": folder / "run", "steps": plan.steps}
    return check(given | own | {"save_every": plan.save_every}), bad


def start(config: TrainConfig) -> subprocess.Popen[bytes]:
    """A process that trains; what it says goes to `run.log` beside its folder."""
    file = config.out.with_suffix(".yaml")
    file.write_text(as_yaml(config), encoding="utf-8")
    places = os.pathsep.join(str(ROOT / place) for place in (".", "kernels", "trainer"))
    with config.out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "raise_trainer.cli", "train", str(file)],
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )


@dataclass
class Life:
    """One process of the run. memory: GiB, by step. seconds: from its start to its end."""

    killed: bool
    in_save: bool
    first_step: int
    memory: list[float]
    seconds: float
    decoders: list[psutil.Process]

    def record(self) -> Record:
        return {
            "kind": "process", "killed": self.killed, "in_save": self.in_save, "first_step": self.first_step,
            "seconds": self.seconds, "memory_mib": [round(1024 * gib, 2) for gib in self.memory],
        }  # fmt: skip


def live(config: TrainConfig, kill: tuple[int, float, bool] | None) -> Life:
    """Start the run and let it end, or kill it.

    kill: after how many steps of this process, how many seconds later, and whether it waits for a save to
    begin first. RuntimeError, with the end of its log, for a process that ends in another way.
    """
    log, saves = config.out / "timings.jsonl", config.out / "checkpoints"
    before, begun = _lines(log), time.monotonic()
    child = start(config)
    killed = False
    if kill is not None:
        steps, late, saving = kill
        killed = _wait(child, lambda: _lines(log) >= before + steps)
        if saving:
            killed = killed and _wait(child, lambda: any(saves.glob(".saving-*")))
        time.sleep(late)
    decoders = psutil.Process(child.pid).children() if child.poll() is None else []
    if killed:
        child.kill()
    status = child.wait()
    if status != (-9 if killed else 0):
        said = config.out.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the run ended with {status}: {said[-2000:]}")
    in_save = killed and any(saves.glob(".*-*"))
    steps_of = [
        r for r in map(json.loads, log.read_bytes().splitlines()[before : _lines(log)]) if "step" in r
    ]
    first = steps_of[0]["step"] if steps_of else 0
    memory = [r["peak_gib"] for r in steps_of]
    return Life(killed, in_save, first, memory, time.monotonic() - begun, decoders)


def _lines(file: Path) -> int:
    """Whole lines."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _wait(child: subprocess.Popen[bytes], until: Any) -> bool:
    """False when the process ended before."""
    while not until():
        if child.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def run(folder: Path, plan: Plan) -> list[Record]:
    """The whole: a record of each process, and one of the run."""
    begun = time.monotonic()
    config, bad = prepare(folder, plan)
    rng = random.Random(plan.seed)
    lives = list[Life]()
    for number in range(plan.kills):
        saving = number % 2 == 0
        kill = (rng.randint(1, plan.longest), rng.random() * (0.02 if saving else 0.1), saving)
        lives.append(live(config, kill))
        print(f"process {number + 1}: {len(lives[-1].memory)} steps from {lives[-1].first_step}", flush=True)
    lives.append(live(config, None))
    records = [life.record() for life in lives]
    return [*records, judged(config, plan, bad, lives) | {"seconds": time.monotonic() - begun}]


def judged(config: TrainConfig, plan: Plan, bad: Sequence[int], lives: Sequence[Life]) -> Record:
    """What the folder of a finished run and its processes show."""
    metrics, rows, times = (_read(config.out / f"{name}.jsonl") for name in ("metrics", "rows", "timings"))
    memory = [[1024 * gib for gib in life.memory] for life in lives]
    level = median(mib for some in memory for mib in some)
    fitted = slope(memory)
    finished = bool(metrics) and metrics[-1]["step"] == plan.steps - 1
    faults = [
        *step_faults(metrics, plan.steps, "metrics.jsonl"),
        *step_faults(rows, plan.steps, "rows.jsonl"),
        *epoch_faults(rows, plan.rows, bad),
    ]
    kills = sum(life.killed for life in lives)
    if kills < plan.kills:
        faults.append(f"{kills} kills of {plan.kills}: the run had ended before")
    return {
        "kind": "run", "steps": len(metrics), "finished": finished, "kills": kills,
        "kills_in_save": sum(life.in_save for life in lives), "rows": plan.rows, "bad_rows": plan.bad,
        "epochs": metrics[-1]["epoch"] if metrics else 0.0, "memory_mib": level,
        "memory_slope": fitted and asdict(fitted), "flat": flat(fitted, level), "faults": faults,
        "orphans": sum(process.is_running() for life in lives for process in life.decoders),
        "learned_share": sum(m.get("grad_norm", 0) > 0 for m in metrics) / max(len(metrics), 1),
        "tokens_per_s": median(t["tokens_per_s"] for t in times if "tokens_per_s" in t),
        "settings": SETTINGS, "plan": asdict(plan),
    }  # fmt: skip


def _read(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str]) -> int:
    """Run, record, print; exit status 1 when something falls short."""
    parser = argparse.ArgumentParser(
        prog="python -m bench soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="12 steps and a kill, nothing recorded")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of the whole run (default 1200)")
    parser.add_argument("--kills", type=int, default=Plan.kills, help="default 24")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="records go here (JSON lines)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--report", action="store_true", help="of the last recorded run")
    options = parser.parse_args(arguments)
    if options.report:
        records = last_run(options.out or RESULTS / "soak.jsonl")
        draw(records, FIGURE)
        print(table(records))
        return 0
    torch.set_num_threads(options.threads)
    plan = QUICK if options.quick else Plan(steps=options.steps, kills=options.kills)
    common = provenance() | {
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": options.quick,
    }
    with tempfile.TemporaryDirectory() as folder:
        records = [common | record for record in run(Path(folder), plan)]
    out = options.out or (None if options.quick else RESULTS / "soak.jsonl")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)
    print(table(records))
    whole = records[-1]
    short = whole["faults"] or not whole["finished"] or whole["orphans"]
    return int(bool(short) or not (options.quick or (whole["flat"] and whole["learned_share"])))
