"""Compile every kernel variant for every target on a machine without a GPU, and refuse what would run badly.

    python -m raise_kernels.aot [--target sm_90 ...] [--quick] [--only TEXT] [--set U=8 ...] [--jobs N]
                                [--json FILE]

Prints a table and exits with 1 when a variant does not compile, spills registers, exceeds the target's shared
memory (LDS), reads logits, hidden states or weights by less than 128 bits in its main loop, multiplies 16-bit
operands without tensor cores, or needs more exponentials a logit than `aot_table` allows it (1.15 for logp
alone). Counts are read from machine code: the disassembly (NVIDIA) and the AMDGCN assembly.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from raise_kernels.aot_table import TARGETS, Target, Variant, variants
from raise_kernels.machine_code import (
    EXP,
    LOAD,
    WIDE_LOAD,
    Instruction,
    count,
    main_loop,
    read_amdgcn,
    read_sass,
)

TYPES = {
    "p_y": "*i64", "p_rows": "*i64", "p_order": "*i64", "p_bounds": "*i64", "p_off": "*i64",
    "p_group": "*i64",
    "p_lo": "*i64", "p_hi": "*i64", "p_bin": "*i64", "p_strict": "*i1", "p_applied": "*i1",
    "stride0": "i64", "stride1": "i64", "stride2": "i64",
}  # fmt: skip
HEADER = (
    f"{'target':8}{'variant':44}{'regs':>5}{'spill':>6}{'shared':>8}"
    f"{'128-bit':>8}{'other':>7}{'exp2':>6}{'mma':>5}"
)
EVEN = ("V", "V_all", "D", "w_stride_v", "width")
STREAMED = ("p_x", "p_h", "p_w")
REAL = ("a", "b", "eta", "lam", "log_delta", "tau", "penalty", "min_bonus", "slack", "min_spread")


@dataclass
class Report:
    """What a compiled variant uses; `faults` is empty when it may be launched."""

    target: str
    variant: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    wide_loads: int = 0  # of 128 bits, in the main loop
    narrow_loads: int = 0  # others there
    exponentials: int = 0  # in the loop over tiles
    products: int = 0  # tensor-core instructions, where the variant should have some
    faults: list[str] = field(default_factory=list)


def compile_variant(variant: Variant, target: Target) -> Any:
    """The compiled kernel, specialised as a launch with aligned pointers and multiples of 16 would be."""
    names = variant.kernel.arg_names
    signature, aligned = {}, {}
    for i, name in enumerate(names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        default = "*fp32" if name.startswith("p_") else "fp32" if name in REAL else "i32"
        signature[name] = variant.types.get(name, TYPES.get(name, default))
        if variant.odd and name in STREAMED + EVEN:
            continue
        if name.startswith("p_") or (name in EVEN and not variant.kernel.params[i].do_not_specialize):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=aligned)
    options = {"num_warps": variant.warps}
    if variant.stages is not None:
        options["num_stages"] = variant.stages
    return triton.compile(source, target=target.gpu, options=options)


def inspect(variant: Variant, target_name: str) -> Report:
    """Compile one variant and judge it."""
    target = TARGETS[target_name]
    report = Report(target_name, variant.name)
    try:
        compiled = compile_variant(variant, target)
    except Exception as error:  # any failure of the compiler is the finding
        report.faults.append(f"does not compile: {type(error).__name__}: {str(error).splitlines()[-1][:120]}")
        return report
    report.shared = int(compiled.metadata.shared)
    if target.gpu.backend == "cuda":
        code = _read_cubin(compiled.asm["cubin"], report)
    else:
        code = _read_amdgcn(compiled.asm["amdgcn"], report)
    try:
        tally(variant, target, code, report)
    except ValueError as error:
        report.faults.append(str(error))
    report.faults += faults(variant, target, report)
    return report


def faults(variant: Variant, target: Target, report: Report) -> list[str]:
    """What forbids launching a variant with the counts of `report` on `target`; empty when nothing does."""
    found = []
    if report.spills > variant.spills:
        found.append(f"{report.spills} bytes or registers spilled")
    if report.shared > target.shared_limit:
        found.append(f"{report.shared} bytes of shared memory, the limit is {target.shared_limit}")
    if variant.warps * target.gpu.warp_size > target.max_threads:
        found.append(f"{variant.warps} warps exceed {target.max_threads} threads")
    place = "the main loop" if variant.loop else "the kernel"
    if report.wide_loads < variant.wide:
        found.append(f"{report.wide_loads} 128-bit loads in {place}, a tile has {variant.wide}")
    if variant.narrow is not None and report.narrow_loads > variant.narrow:
        found.append(f"{report.narrow_loads} loads below 128 bits in {place}, allowed are {variant.narrow}")
    if variant.product and not report.products:
        found.append(f"no {target.product}: the product does not run on tensor cores")
    if variant.exponentials and report.exponentials > variant.exponentials * variant.logits:
        limit = f"at most {variant.exponentials} for each"
        found.append(f"{report.exponentials} exponentials for {variant.logits} logits, wanted {limit}")
    return found


def tally(variant: Variant, target: Target, code: list[Instruction], report: Report) -> None:
    """Count what `faults` judges, in the loops of `variant`; ValueError where it lacks its main loop."""
    kernel = [*range(len(code))]
    main, tiles = main_loop(code, variant.loop) if variant.loop else (kernel, kernel)
    report.wide_loads = count(code, main, WIDE_LOAD)
    report.narrow_loads = count(code, main, LOAD) - report.wide_loads
    report.exponentials = count(code, tiles, EXP)
    if variant.product:
        report.products = count(code, main, re.compile(rf"{target.product}\b|{target.product}_f32_\w+_b?f16"))


def _read_cubin(binary: bytes, report: Report) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = _run(triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name).stdout
    report.registers = max(int(n) for n in re.findall(r"\bREG:(\d+)", text))
    # Kernels have no arrays: what is on a stack is what did not fit the registers.
    report.spills = max(int(n) for n in re.findall(r"\bSTACK:(\d+)", text))
    return read_sass(text)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def _read_amdgcn(text: str, report: Report) -> list[Instruction]:
    report.registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    report.spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
    return read_amdgcn(text)


def origin() -> dict[str, str]:
    """What a record is made from: the commit, with + where a kernel is changed, and Triton's version."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        changed = _run(*git, "status", "--porcelain", "--", ".").stdout
        commit = _run(*git, "rev-parse", "--short=7", "HEAD").stdout.strip() + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        commit = ""  # installed without its history
    return {"commit": commit, "triton": triton.__version__}


def row(r: Report) -> str:
    """A report as a line of the table under `HEADER`."""
    loads = f"{r.wide_loads:8}{r.narrow_loads:7}"
    numbers = f"{r.registers:5}{r.spills:6}{r.shared:8}{loads}{r.exponentials:6}{r.products:5}"
    return f"{r.target:8}{r.variant:44}{numbers}  {'; '.join(r.faults)}"


def _inspect_named(target: str, quick: bool, name: str, changed: dict[str, int]) -> Report:
    # Kernels do not travel between processes; their names do.
    variant = next(v for v in variants(target, quick) if v.name == name)
    return inspect(variant._replace(constants=variant.constants | changed), target)


def _constant(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m raise_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="bf16 and the common flags only")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name contains this")
    parser.add_argument(
        "--set", action="append", default=[], type=_constant, metavar="NAME=NUMBER",
        help="another constant in the variants that have it: U (columns of a lane), PIECE, BT, BV, BD, ...",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes that compile (default: 1)"
    )
    parser.add_argument(
        "--json", type=Path, default=os.devnull, help="write the reports to this file, one JSON object a line"
    )
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    changed = dict(options.set)
    jobs = [
        (name, options.quick, variant.name, changed)
        for name in options.target or TARGETS
        for variant in variants(name, options.quick)
        if options.only in variant.name and changed.keys() <= variant.constants.keys()
    ]
    if not jobs:
        also = f" and has the constants {', '.join(changed)}" if changed else ""
        parser.error(f"no variant is called {options.only!r}{also}; leave --only out to see them all")
    print(HEADER)
    made = origin() | ({"set": changed} if changed else {})
    bad = 0
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool, open(options.json, "w") as file:
        every = map if options.jobs == 1 else pool.map
        for r in every(_inspect_named, *zip(*jobs, strict=True)):
            bad += bool(r.faults)
            print(row(r), flush=True)
            print(json.dumps(asdict(r) | made), file=file, flush=True)
    print(f"{len(jobs)} variants, {bad} refused")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
