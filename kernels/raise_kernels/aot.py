"""Compile every kernel variant for every target on a machine without a GPU, and refuse what would run badly.

    python -m raise_kernels.aot [--target sm_90 ...] [--quick] [--only TEXT] [--json FILE]

Prints a table and exits with 1 when a variant does not compile, spills registers, exceeds the target's shared
memory (LDS), reads logits, hidden states or weights by less than 128 bits, multiplies 16-bit operands without
tensor cores, or needs more than 1.15 exponentials a logit for logp alone. Counts are read from PTX, ptxas and
the disassembly (NVIDIA) and from the AMDGCN assembly.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from raise_kernels.aot_table import TARGETS, Target, Variant, variants

EX2_PER_LOGIT = 1.15
TYPES = {
    "p_y": "*i64", "p_rows": "*i64", "p_order": "*i64", "p_bounds": "*i64", "p_off": "*i64",
    "p_group": "*i64",
    "p_lo": "*i64", "p_hi": "*i64", "p_bin": "*i64", "p_strict": "*i1", "p_applied": "*i1",
    "stride0": "i64", "stride1": "i64", "stride2": "i64",
}  # fmt: skip
EVEN = ("V", "V_all", "D", "w_stride_v", "width")
REAL = ("a", "b", "eta", "lam", "log_delta", "tau", "penalty", "min_bonus", "slack", "min_spread")


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
        _read_ptx(compiled.asm["ptx"], target, report, variant.product)
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
    if report.wide_loads < variant.wide:
        found.append(f"{report.wide_loads} 128-bit loads, a tile has {variant.wide}")
    if variant.product and not report.products:
        found.append(f"no {target.product}: the product does not run on tensor cores")
    if variant.streamed:
        # Two tiles (the loop's and the tail's) and one rescaling of the lanes at the end.
        allowed = EX2_PER_LOGIT * 2 * variant.streamed + variant.streamed / variant.constants["U"]
        if report.exponentials > allowed:
            found.append(f"{report.exponentials} exponentials for {2 * variant.streamed} logits")
    return found


def _read_ptx(ptx: str, target: Target, report: Report, product: bool) -> None:
    # Copies to shared memory that bypass the first cache are 16 bytes long, and loads as well.
    report.wide_loads = len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared", ptx))
    report.exponentials = len(re.findall(r"ex2\.approx", ptx))
    arch = f"sm_{target.gpu.arch}" + ("a" if int(target.gpu.arch) >= 90 else "")
    blackwell = int(target.gpu.arch) >= 100
    tool = triton.knobs.nvidia.ptxas_blackwell if blackwell else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        log = _run(tool.path, "-v", f"--gpu-name={arch}", str(source), "-o", str(binary)).stderr
        if product:
            sass = _run(triton.knobs.nvidia.cuobjdump.path, "-sass", str(binary)).stdout
            report.products = len(re.findall(rf"\b{target.product}\b", sass))
    report.registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    report.spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def _read_amdgcn(text: str, report: Report) -> None:
    report.wide_loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    report.exponentials = len(re.findall(r"v_exp_f32", text))
    report.products = len(re.findall(r"v_mfma_f32_\w+_(?:bf16|f16)", text))
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
    print(
        f"{'target':8}{'variant':44}{'regs':>5}{'spill':>6}{'shared':>8}{'128-bit':>8}{'exp2':>6}{'mma':>5}"
    )
    for name in options.target or TARGETS:
        for variant in variants(name, options.quick):
            if options.only not in variant.name:
                continue
            r = inspect(variant, name)
            reports.append(r)
            numbers = (
                f"{r.registers:5}{r.spills:6}{r.shared:8}{r.wide_loads:8}{r.exponentials:6}{r.products:5}"
            )
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
