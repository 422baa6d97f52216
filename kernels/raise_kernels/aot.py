"""Compile every kernel variant for every target on a machine without a GPU, and refuse what would run badly.

    python -m raise_kernels.aot [--target sm_90 ...] [--quick] [--only TEXT] [--json FILE]

Prints a table and exits with 1 when a variant does not compile, spills registers, exceeds the target's shared
memory (LDS), or, where rows of logits are streamed, reads them by less than 128 bits or needs more than 1.15
exponentials a logit for logp alone. Counts are read from PTX and ptxas (NVIDIA) and from the AMDGCN assembly.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from raise_kernels import confidence, scre, token_stats, token_stats_backward
from raise_kernels._layout import WARPS


class Target(NamedTuple):
    """A GPU and what one program may use of it."""

    gpu: GPUTarget
    shared_limit: int  # bytes
    max_threads: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, 1024),
}
EX2_PER_LOGIT = 1.15
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
TYPES = {
    "p_y": "*i64", "p_rows": "*i64", "p_order": "*i64", "p_bounds": "*i64", "p_off": "*i64",
    "p_group": "*i64",
    "p_lo": "*i64", "p_hi": "*i64", "p_bin": "*i64", "p_strict": "*i1", "p_applied": "*i1",
    "stride0": "i64", "stride1": "i64", "stride2": "i64",
}  # fmt: skip
REAL = ("a", "b", "eta", "lam", "log_delta", "tau", "penalty", "min_bonus", "slack", "min_spread")


class Variant(NamedTuple):
    """One specialisation of one kernel."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    warps: int
    streamed: int = 0  # logits that a thread reads from each of its (at most two) tiles
    logp_only: bool = False


@dataclass
class Report:
    """What a compiled variant uses; `faults` is empty when it may be launched."""

    target: str
    variant: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    wide_loads: int = 0
    exponentials: int = 0
    faults: list[str] = field(default_factory=list)


def variants(target: Target, quick: bool) -> Iterator[Variant]:
    """The launch table: every combination of dtype and flags that a launcher can ask for."""
    flags = (False, True)
    threads = WARPS * target.gpu.warp_size
    dtypes = ("bf16",) if quick else tuple(ITEM)
    for dtype, level, capped, rows in itertools.product(dtypes, range(3), flags, flags):
        if quick and (capped or not rows):
            continue
        u, w = token_stats.tile(target.gpu.warp_size, capped, level, ITEM[dtype])
        constants = dict(
            stride_v=1, HAS_ROWS=rows, CAPPED=capped, UNIT=True, ALIGN=16 // ITEM[dtype], LEVEL=level,
            SPLIT=token_stats.SPLIT, U=u, W=w,
        )  # fmt: skip
        name = f"stats {dtype} level {level}{' capped' * capped}{' rows' * rows}"
        streamed = u * w // threads
        kernel = token_stats._stats_kernel
        yield Variant(
            name, kernel, constants, {"p_x": f"*{dtype}"}, WARPS, streamed, level == 0 and not capped
        )
    for dtype, capped, rows in itertools.product(dtypes, flags, flags):
        constants = dict(
            stride_v=1, HAS_ROWS=rows, CAPPED=capped, UNIT=True, ALIGN=16 // ITEM[dtype],
            BLOCK=token_stats_backward.BLOCK,
        )  # fmt: skip
        name = f"gradient {dtype}{' capped' * capped}{' rows' * rows}"
        types = {"p_x": f"*{dtype}", "p_grad": f"*{dtype}"}
        streamed = token_stats_backward.BLOCK // threads
        yield Variant(name, token_stats_backward._grad_kernel, constants, types, WARPS, streamed)
    for level, rows in itertools.product(range(3), flags):
        constants = dict(HAS_ROWS=rows, LEVEL=level, ROWS=token_stats.ROWS)
        yield Variant(f"merge level {level}{' rows' * rows}", token_stats._merge_kernel, constants, {}, 2)
    for normalize in flags:
        constants = dict(stride=1, NORMALIZE=normalize, SPANS=scre.SPANS)
        yield Variant(f"scre{' normalized' * normalize}", scre._scre_kernel, constants, {}, 1)
    sizes = (16, 64) if quick else (16, 32, 64)
    for splits, by_id, normal, balanced, size in itertools.product(flags, flags, flags, flags, sizes):
        if quick and normal:
            continue
        constants = dict(
            FROM_SPLITS=splits, SORTED=by_id, NORMALIZE=normal, BALANCED=balanced, GROUP=size, BLOCK=256
        )
        source = "splits" if splits else "logp"
        flagged = f"{' sorted' * by_id}{' balanced' * balanced}{' normalized' * normal}"
        name = f"groups of {size} from {source}{flagged}"
        yield Variant(name, confidence._group_kernel, constants, {}, confidence.group_warps(size))


def compile_variant(variant: Variant, target: Target) -> Any:
    """The compiled kernel, specialised as a launch with aligned pointers and an even vocabulary would be."""
    names = variant.kernel.arg_names
    signature, aligned = {}, {}
    for i, name in enumerate(names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        default = "*fp32" if name.startswith("p_") else "fp32" if name in REAL else "i32"
        signature[name] = variant.types.get(name, TYPES.get(name, default))
        if name.startswith("p_") or name in ("V", "V_all"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=aligned)
    return triton.compile(source, target=target.gpu, options={"num_warps": variant.warps})


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
        _read_ptx(compiled.asm["ptx"], target, report)
    else:
        _read_amdgcn(compiled.asm["amdgcn"], report)
    report.faults = faults(variant, target, report)
    return report


def faults(variant: Variant, target: Target, report: Report) -> list[str]:
    """What forbids launching a variant with the counts of `report` on `target`; empty when nothing does."""
    found = []
    if report.spills:
        found.append(f"{report.spills} bytes or registers spilled")
    if report.shared > target.shared_limit:
        found.append(f"{report.shared} bytes of shared memory, the limit is {target.shared_limit}")
    if variant.warps * target.gpu.warp_size > target.max_threads:
        found.append(f"{variant.warps} warps exceed {target.max_threads} threads")
    if variant.streamed:
        wanted = variant.streamed * ITEM[variant.types["p_x"][1:]] // 16
        if report.wide_loads < wanted:
            found.append(f"{report.wide_loads} 128-bit loads, a tile has {wanted}")
    if variant.logp_only:
        # Two tiles (the loop's and the tail's) and one rescaling of the lanes at the end.
        allowed = EX2_PER_LOGIT * 2 * variant.streamed + variant.streamed / variant.constants["U"]
        if report.exponentials > allowed:
            found.append(f"{report.exponentials} exponentials for {2 * variant.streamed} logits")
    return found


def _read_ptx(ptx: str, target: Target, report: Report) -> None:
    report.wide_loads = len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
    report.exponentials = len(re.findall(r"ex2\.approx", ptx))
    arch = f"sm_{target.gpu.arch}" + ("a" if int(target.gpu.arch) >= 90 else "")
    blackwell = int(target.gpu.arch) >= 100
    tool = triton.knobs.nvidia.ptxas_blackwell if blackwell else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            tool.path,
            "-v",
            f"--gpu-name={arch}",
            str(source),
            "-o",
            str(Path(folder, "kernel.cubin")),
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    report.registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    report.spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))


def _read_amdgcn(text: str, report: Report) -> None:
    report.wide_loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    report.exponentials = len(re.findall(r"v_exp_f32", text))
    report.registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    report.spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m raise_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="bf16 and the common flags only")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name contains this")
    parser.add_argument("--json", type=Path, help="write the reports to this file, one JSON object a line")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    reports = []
    print(f"{'target':8}{'variant':44}{'regs':>5}{'spill':>6}{'shared':>8}{'128-bit':>8}{'exp2':>6}")
    for name in options.target or TARGETS:
        for variant in variants(TARGETS[name], options.quick):
            if options.only not in variant.name:
                continue
            r = inspect(variant, name)
            reports.append(r)
            numbers = f"{r.registers:5}{r.spills:6}{r.shared:8}{r.wide_loads:8}{r.exponentials:6}"
            print(f"{r.target:8}{r.variant:44}{numbers}  {'; '.join(r.faults)}", flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(r)) + "\n" for r in reports))
    if not reports:
        parser.error(f"no variant is called {options.only!r}; leave --only out to see them all")
    bad = sum(bool(r.faults) for r in reports)
    print(f"{len(reports)} variants, {bad} refused")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
