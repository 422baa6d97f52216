"""The reward part of a step: our reward function against one that runs the model again for each completion.

    python -m bench rewards             every case; records go to bench/results/rewards.jsonl
    python -m bench rewards --check     also exit 1 when ours is wrong, or not 5 times faster
    python -m bench rewards --page      no run: the last recorded one into docs/bench.md
    python -m bench rewards --quick     tiny sizes, one call each, nothing recorded: does everything run?

On the CPU, at the shapes of `python -m bench scoring`. Implementations take turns.
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

from bench.limits import Limit, Record, judge
from bench.measure import Cpu
from bench.peers import installed
from bench.record import RESULTS, provenance
from bench.report import DOCS, heading, records_table, verdicts_table
from bench.rewards_cases import CASE, NAIVE, cases
from bench.run_case import run_case
from bench.scoring import FULL
from bench.scoring_cases import Shape
from bench.scoring_models import Size
from raise_kernels._compiled import library

LIMITS = (Limit(CASE, 0.2, (NAIVE,)),)
TINY = (Shape(4, 4, 3, 14, 3), (Size(2, 64, 512),))
START, STOP = "<!-- rewards -->", "<!-- /rewards -->"


def run(console: Console, *, quick: bool) -> list[dict[str, Any]]:
    """Records of every case."""
    machine = Cpu()
    about = provenance() | {
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": machine.name(),
        "device_kind": machine.kind,
        "load_before": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: installed(name) for name in ("transformers", "tokenizers")},
        "compiled": library("token_stats") is not None,
        "quick": quick,
    }
    shape, sizes = TINY if quick else FULL
    made: list[dict[str, Any]] = []
    for case in cases(shape, sizes):
        begun = time.monotonic()
        made += [about | row for row in run_case(case, machine, quick=quick, step=lambda name, share: None)]
        console.print(f"{case.name}, {case.dtype}: {time.monotonic() - begun:.0f} s")
    return made


def body(records: Sequence[Record]) -> str:
    """What `--check` judges, and a table for each case."""
    return "\n".join([verdicts_table(judge(records, LIMITS)), records_table(records)])


def written(text: str, records: Sequence[Record]) -> str:
    """The document with the last run between its markers."""
    if START not in text or STOP not in text:
        raise ValueError(f"the document has no {START} … {STOP}; add both lines where the tables belong")
    begun = max(r["begun"] for r in records)
    last = [r for r in records if r["begun"] == begun]
    head, _, rest = text.partition(START)
    load = f"Load of the machine before it, from other work: {last[0]['load_before']:.1f}."
    return f"{head}{START}\n{heading(last[0])} {load}\n{body(last)}\n{STOP}{rest.partition(STOP)[2]}"


def main(arguments: Sequence[str]) -> int:
    """Run, record, print; exit status 1 under --check when something falls short."""
    parser = argparse.ArgumentParser(
        prog="python -m bench rewards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure falls short")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one call each, nothing recorded")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="records go here (JSON lines)")
    parser.add_argument("--page", action="store_true", help="write the last recorded run into docs/bench.md")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(arguments)
    if options.page:
        lines = (options.out or RESULTS / "rewards.jsonl").read_text(encoding="utf-8").splitlines()
        page = DOCS / "bench.md"
        page.write_text(
            written(page.read_text(encoding="utf-8"), [json.loads(x) for x in lines]), encoding="utf-8"
        )
        return 0
    torch.set_num_threads(options.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="raise_kernels could not compile")
        warnings.filterwarnings("default", message="raise_core.Scorer")
        records = run(Console(stderr=True), quick=options.quick)
    out = options.out or (None if options.quick else RESULTS / "rewards.jsonl")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=True) + "\n" for record in records)
    print(body(records))
    return int(options.check and not all(verdict.ok for verdict in judge(records, LIMITS)))
