"""Run one case: every implementation once for its result and its memory, then round robin for its time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases import Call, Case, Errors, Impl, Inputs, Truth, errors, gate
from bench.measure import Cpu, Gpu, rounds, timing
from bench.peers import NotHere, installed

# Seconds of timed calls, and the least number of them, for ours and what it is measured in, and for the rest.
JUDGED, OTHERS = (9.0, 3), (4.0, 1)
Step = Callable[[str, float], None]


@dataclass
class Run:
    """What is known of one implementation."""

    impl: Impl
    call: Call | None = None
    reason: str = ""
    extra: int | None = None
    errors: Errors = field(default_factory=Errors)
    first_s: float = 0.0
    seconds: list[float] = field(default_factory=list)


def run_case(case: Case, machine: Cpu | Gpu, *, quick: bool, step: Step) -> list[dict[str, Any]]:
    """One record for each implementation. step(implementation, share of the case that is done)."""
    step("inputs and their fp64 results", 0.0)
    inputs = case.inputs()
    truth = inputs.truth()
    runs = [Run(impl) for impl in case.impls]
    for k, run in enumerate(runs):
        step(run.impl.name, 0.1 + 0.3 * k / len(runs))
        if quick and run.impl.compiles:
            run.reason = "compiles when it runs; left out by --quick"
        else:
            _first(run, inputs, truth, machine)
    alive = {run.impl.name: run for run in runs if run.call is not None}
    for k, names in enumerate(plan := _plan(alive, case.unit, quick)):
        for name in names:
            step(name, 0.4 + 0.6 * k / len(plan))
            call = alive[name].call
            assert call is not None
            alive[name].seconds.append(machine.seconds(call))
    eager = next((run.errors for run in runs if run.impl.role == "eager" and run.call), None)
    unit = next((run for run in alive.values() if run.impl.name == case.unit), None)
    records = [_record(case, run, unit, truth, eager) for run in runs]
    del inputs, alive, runs
    torch.compiler.reset()
    gc.collect()
    return records


def _plan(alive: Mapping[str, Run], unit: str, quick: bool) -> list[list[str]]:
    if quick:
        return [list(alive)]
    judged = {name for name, run in alive.items() if name == unit or run.impl.role == "ours"}
    return rounds({n: (run.first_s, *(JUDGED if n in judged else OTHERS)) for n, run in alive.items()})


def _first(run: Run, inputs: Inputs, truth: Mapping[str, Truth], machine: Cpu | Gpu) -> None:
    """Warm up on a few rows (on all what compiles for a shape), then one call for result and memory.

    What an implementation keeps for its next call is counted too: this is its first at this size.
    """
    try:
        run.impl.make(inputs if run.impl.compiles else inputs.few())()
        call = run.impl.make(inputs)
        begun = time.perf_counter()
        outputs, peak = machine.peak(call)
        run.first_s = time.perf_counter() - begun
        if peak is not None:
            run.extra = max(peak - sum(x.nbytes for x in outputs.values()), 0)
        run.errors = errors(outputs, truth)
        run.call = call
    except NotHere as missing:
        run.reason = str(missing)
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        run.reason = f"{type(error).__name__}: {line[:160]}"


def _record(
    case: Case, run: Run, unit: Run | None, truth: Mapping[str, Truth], eager: Errors | None
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "case": case.name,
        "dtype": case.dtype,
        "shape": case.shape,
        "implementation": run.impl.name,
        "role": run.impl.role,
        "note": run.impl.note,
        "unit": case.unit,
        "version": installed(run.impl.package) if run.impl.package else "",
    }
    if run.call is None:
        return record | {"status": "failed", "reason": run.reason, "gate": "none"}
    spent = timing(run.seconds)
    green, budget = gate(run.errors, truth, eager)
    compared = run.impl.role in ("ours", "floor")
    return record | {
        "status": "ran",
        "reason": "",
        "median_s": spent.median,
        "low_s": spent.low,
        "high_s": spent.high,
        "samples": spent.samples,
        "extra_bytes": run.extra,
        "gb_per_s": case.bytes / spent.median / 1e9,
        "gflop_per_s": case.flops / spent.median / 1e9,
        "share_of_limit": timing(unit.seconds).median / spent.median if unit and case.is_limit else None,
        "error": run.errors.error,
        "budget": budget,
        "gate": "none" if not compared else "green" if green else "red",
    }
