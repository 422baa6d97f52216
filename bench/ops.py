"""The operations against eager PyTorch, torch.compile and other libraries: time, memory, error against fp64.

    python -m bench ops                     every case; records go to bench/results/ops.jsonl
    python -m bench ops --check             also exit 1 when a figure falls short of bench/limits.py
    python -m bench ops --quick             tiny shapes, one call each, nothing recorded: does everything run?
    python -m bench ops --only linear       the cases whose name holds "linear"; recorded with --out FILE only

On a machine with a CUDA or HIP device the same command runs larger shapes there. Implementations take turns,
so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import first_call, linear_cases, logits_cases
from bench.cases import Case
from bench.limits import FIRST_CALLS, judge
from bench.measure import Cpu, Gpu, device, timing
from bench.peers import PACKAGES, installed
from bench.record import RESULTS, provenance
from bench.report import records_table, verdicts_table
from bench.run_case import Step, run_case
from raise_kernels._compiled import library

VOCABULARY = 151936  # of Qwen2.5 and Qwen3
# rows of logits, rows of hidden states, hidden size, vocabulary
SHAPES = {"cpu": (256, 512, 1024, VOCABULARY), "cuda": (8192, 8192, 4096, VOCABULARY)}
QUICK = (8, 16, 32, 1003)
DTYPES = (torch.float32, torch.bfloat16)


def cases(kind: str, *, quick: bool) -> list[Case]:
    """The cases of a device, in the order of the table."""
    t, n, d, v = QUICK if quick else SHAPES[kind]
    return logits_cases.cases(t, v, kind, DTYPES) + linear_cases.cases(n, d, v, kind, DTYPES)


def run(
    chosen: Sequence[Case], machine: Cpu | Gpu, *, quick: bool, first: bool, console: Console
) -> list[dict[str, Any]]:
    """Records of the chosen cases and, when asked for, of the first call."""
    about = provenance() | {
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": machine.name(),
        "device_kind": machine.kind,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: installed(name) for name in PACKAGES},
        "compiled": machine.kind == "cpu" and library("token_stats") is not None,
        "quick": quick,
    }
    made: list[dict[str, Any]] = []
    with _progress(console, sum(case.expected_s for case in chosen)) as advance:
        done = 0.0
        for case in chosen:

            def step(name: str, share: float, case: Case = case, done: float = done) -> None:
                advance(f"{case.name} {case.dtype}: {name}", done + share * case.expected_s)

            begun = time.monotonic()
            made += run_case(case, machine, quick=quick, step=step)
            done += case.expected_s
            console.print(f"{case.name}, {case.dtype}: {time.monotonic() - begun:.0f} s")
        if first:
            advance("first calls", done)
            made += first_records((SHAPES["cpu"][0], *SHAPES["cpu"][2:]))
    return [about | record for record in made]


def first_records(shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Seconds until a fresh process has its first result. shape: (rows, hidden size, vocabulary)."""
    rows, width, vocabulary = shape
    ways = (("raise-core", True, False), ("raise-core, cached library", True, True))
    sizes = ({"T": rows, "V": vocabulary}, {"N": rows, "D": width, "V": vocabulary})
    made = []
    for case, operation, size in zip(FIRST_CALLS, ("token_stats", "linear_token_stats"), sizes, strict=True):
        for name, compiled, cached in (*ways, ("raise-core, no C compiler", False, False)):
            note = (
                "fresh process, library made before" if cached else "fresh process, nothing compiled before"
            )
            record: dict[str, Any] = {
                "case": case, "dtype": "", "shape": size, "implementation": name, "role": "ours",
                "note": note, "unit": name, "version": "", "error": {}, "budget": {}, "gate": "none",
                "extra_bytes": None, "share_of_limit": None,
            }  # fmt: skip
            options = {"name": operation, "compiled": compiled, "cached": cached}
            try:
                spent = timing([first_call.seconds(torch.get_num_threads(), shape, **options)])
            except RuntimeError as error:
                made.append(record | {"status": "failed", "reason": str(error)})
                continue
            found = {"median_s": spent.median, "low_s": spent.low, "high_s": spent.high}
            made.append(record | found | {"samples": spent.samples, "status": "ran", "reason": ""})
    return made


@contextmanager
def _progress(console: Console, seconds: float) -> Iterator[Step]:
    columns = (
        TextColumn("{task.description:<60.60}"),
        BarColumn(20),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=seconds)
        yield lambda text, done: bar.update(task, description=text, completed=done)


def main(arguments: Sequence[str]) -> int:
    """Run, record, print; exit status 1 under --check when something falls short."""
    parser = argparse.ArgumentParser(
        prog="python -m bench ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure falls short")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one call each, nothing recorded")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name or dtype holds TEXT")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="records go here (JSON lines)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(arguments)
    machine, console = device(), Console(stderr=True)
    torch.set_num_threads(options.threads)
    chosen = [c for c in cases(machine.kind, quick=options.quick) if options.only in f"{c.name} {c.dtype}"]
    first = machine.kind == "cpu" and not options.quick and any(options.only in name for name in FIRST_CALLS)
    if not chosen and not first:
        parser.error(f"--only {options.only!r} names no case")
    with warnings.catch_warnings():
        # other libraries warn a lot; that our C code did not compile is to be seen
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="raise_kernels could not compile")
        records = run(chosen, machine, quick=options.quick, first=first, console=console)
    whole = not options.quick and not options.only
    out = options.out or (RESULTS / "ops.jsonl" if whole else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=True) + "\n" for record in records)
    verdicts = judge(records)
    print(records_table(records), verdicts_table(verdicts), sep="\n")
    return int(options.check and not all(verdict.ok for verdict in verdicts))
