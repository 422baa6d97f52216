"""A group scored once against the prompt repeated for each completion: time, memory, error against fp64.

    python -m bench scoring             every case and the growth; records go to bench/results/scoring.jsonl
    python -m bench scoring --check     also exit 1 when a figure falls short of bench/scoring_limits.py
    python -m bench scoring --quick     tiny sizes, one call each, nothing recorded: does everything run?

On the CPU. Implementations take turns, so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import scoring_cases, scoring_growth
from bench.measure import Cpu
from bench.peers import PACKAGES, installed
from bench.record import RESULTS, provenance
from bench.run_case import run_case
from bench.scoring_cases import Shape
from bench.scoring_limits import LARGE, collapsed, verdicts
from bench.scoring_models import Size, build
from bench.scoring_report import body
from raise_kernels._compiled import library

FULL = (Shape(frames=16, side=16, group=8, length=128, answer=8), (Size(3, 128, 512), Size(3, 128, LARGE)))
QUICK = (Shape(frames=4, side=4, group=3, length=12, answer=3), (Size(2, 64, 97),))


def run(console: Console, *, quick: bool, growth: bool) -> list[dict[str, Any]]:
    """Records of every case, then of the growth at the first vocabulary."""
    machine = Cpu()
    about = provenance() | {
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": machine.name(),
        "device_kind": machine.kind,
        "load_before": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: installed(name) for name in (*PACKAGES, "transformers")},
        "compiled": library("token_stats") is not None,
        "quick": quick,
    }
    shape, sizes = QUICK if quick else FULL
    made: list[dict[str, Any]] = []
    for case in scoring_cases.cases(shape, sizes):
        begun = time.monotonic()
        rows = run_case(case, machine, quick=quick, step=lambda name, share: None)
        made += [about | collapsed(row) for row in rows]
        console.print(f"{case.name}, {case.dtype}: {time.monotonic() - begun:.0f} s")
    if growth:
        model = build(sizes[0])
        for point in scoring_growth.QUICK if quick else scoring_growth.FULL:
            begun = time.monotonic()
            made += scoring_growth.run_point(point, model, machine, about)
            console.print(f"growth, {point.axis} = {point.x}: {time.monotonic() - begun:.0f} s")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run, record, print; exit status 1 under --check when something falls short."""
    parser = argparse.ArgumentParser(
        prog="python -m bench scoring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure falls short")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one call each, nothing recorded")
    parser.add_argument("--no-growth", action="store_true", help="the cases with limits alone")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="records go here (JSON lines)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="raise_kernels could not compile")
        warnings.filterwarnings("default", message="raise_core.Scorer")
        records = run(Console(stderr=True), quick=options.quick, growth=not options.no_growth)
    whole = not options.quick and not options.no_growth
    out = options.out or (RESULTS / "scoring.jsonl" if whole else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=True) + "\n" for record in records)
    print(body(records))
    return int(options.check and not all(verdict.ok for verdict in verdicts(records)))
