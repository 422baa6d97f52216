"""A whole GRPO step (sampling, reference log-probabilities, reward, update), ours and TRL's GRPOTrainer.

    python -m bench loop             both prompt lengths; records go to bench/results/loop.jsonl
    python -m bench loop --check     also exit 1 when a figure falls short, or the sides differ in a result
    python -m bench loop --quick     a smaller model, two steps, nothing recorded: does everything run?
    python -m bench loop --report    table and figure of the last recorded run

On the CPU, in fp32, one process, the two in turns, step by step. The same random model, prompts, number of
sampled tokens, learning rate, loss and reward; both score every completion under a frozen reference. The
first steps of each do not count; figures are medians of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.loop_report import FIGURE, Record, draw, last_run, table, verdicts
from bench.loop_sides import PHASES, Shape, Step, build_tokenizer, load_model, save_model, texts
from bench.loop_trl import BUDGETS, Both, alternate, quieten
from bench.measure import timing
from bench.peers import NotHere, installed, load
from bench.record import RESULTS, provenance
from raise_kernels._compiled import library

FULL = (Shape(prompt=512, at_least=2.5), Shape(prompt=64, at_least=1.3))
QUICK = (Shape(24, 0.0, prompts=2, group=3, length=8, width=32, layers=2, vocabulary=400),)
SKIPPED = 3  # first steps of each side
PACKAGES = ("torch", "transformers", "trl", "accelerate")


def measure(shape: Shape, *, skipped: int, steps: int) -> list[Record]:
    """Two records of one shape, ours first; `steps` of each after `skipped` that do not count."""
    tokenizer = build_tokenizer(shape.vocabulary)
    said = texts(tokenizer, shape, shape.prompts * (skipped + steps + 1))
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), tokenizer, shape)
        both = alternate(Path(folder), tokenizer, shape, said, skipped + steps)
        weights = sum(p.numel() for p in load_model(Path(folder)).parameters())
    common = {"case": f"prompt of {shape.prompt} tokens", "shape": vars(shape), "weights": weights}
    return [common | made for made in _rows(both, skipped)]


def _rows(both: Both, skipped: int) -> list[Record]:
    ours, theirs = both.ours[skipped:], both.theirs[skipped:]
    checked = {"error": both.error, "budget": BUDGETS}
    return [_row("raise_core", ours) | checked, _row("TRL", theirs)]


def _row(name: str, steps: Sequence[Step]) -> Record:
    spread = timing([step.seconds for step in steps])
    phases = {name: timing([step.phases[name] for step in steps]).median for name in PHASES}
    return {
        "implementation": name, "median_s": spread.median, "low_s": spread.low, "high_s": spread.high,
        "samples": spread.samples, "steps_s": [step.seconds for step in steps], "phases_s": phases,
    }  # fmt: skip


def about(quick: bool) -> Record:
    """What the records were made with."""
    return provenance() | {
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_before": os.getloadavg()[0],
        "packages": {name: installed(name) for name in PACKAGES},
        "compiled": library("token_stats") is not None,
        "quick": quick,
    }


def append(file: Path, records: Sequence[Record]) -> None:
    """Records at the end of a file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


def main(arguments: Sequence[str]) -> int:
    """Run, record, print; exit status 1 under --check when something falls short, or without TRL."""
    parser = argparse.ArgumentParser(
        prog="python -m bench loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure falls short")
    parser.add_argument("--quick", action="store_true", help="a smaller model, two steps, nothing recorded")
    parser.add_argument("--steps", type=int, default=12, help="steps of each side that count (default 12)")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="records go here (JSON lines)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--report", action="store_true", help="table and figure of the last recorded run")
    options = parser.parse_args(arguments)
    if options.report:
        records = last_run(options.out or RESULTS / "loop.jsonl")
        draw(records, FIGURE)
        print(table(records))
        return 0
    torch.set_num_threads(options.threads)
    common, records = about(options.quick), []
    out = options.out or (None if options.quick else RESULTS / "loop.jsonl")
    counted = {"skipped": 1, "steps": 2} if options.quick else {"skipped": SKIPPED, "steps": options.steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="raise_kernels could not compile")
        warnings.filterwarnings("default", message="raise_core.Scorer")
        try:
            load("trl", "GRPOTrainer")
        except NotHere as error:
            print(f"TRL: {error}")
            return 1
        quieten()
        for shape in QUICK if options.quick else FULL:
            made = [common | record for record in measure(shape, **counted)]
            if out is not None:  # at once: a run that is stopped keeps the shapes it has finished
                append(out, made)
            records += made
    print(table(records))
    return int(options.check and not all(verdict.ok for verdict in verdicts(records)))
