"""Estimate from machine code what share of a GPU's peak a kernel can reach; nothing here is measured.

    python -m raise_kernels.aot_estimate [--only TEXT] [--json FILE]

Instructions on the path of a full program are counted by the unit that executes them and divided by the
published rates: the slowest unit bounds the kernel. See "Estimated share of peak" in docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from raise_kernels import aot
from raise_kernels.aot_table import TARGETS, Variant, variants
from raise_kernels.linear_stats import split_width
from raise_kernels.machine_code import (
    EXP,
    MACHINES,
    Instruction,
    Machine,
    clocks,
    leave,
    loops,
    read_amdgcn,
    read_sass,
    route,
    tour,
)

NOTE = "estimate, not a measurement"
VOCAB, DEPTH = 151936, 4096  # of the linear path
NAMES = (
    "stats bf16 level 0 rows", "stats bf16 level 1 rows", "stats bf16 level 2 rows",
    "stats fp32 level 0 rows", "stats fp32 level 1 rows", "stats fp32 level 2 rows",
    "gradient bf16 rows", "linear bf16 level 0", "linear bf16 gradient",
)  # fmt: skip
WIDE = re.compile(r"(?:LDG|STG|LDGSTS)\S*\.128\b|(?:global|buffer)_(?:load|store)_dwordx4")
PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)|v_mfma_f32_(\d+)x(\d+)x(\d+)")


@dataclass
class Estimate:
    """Share of a peak that a variant can reach, and what the estimate was made from."""

    target: str
    variant: str
    peak: str  # "memory" or "tensor cores"
    share: float  # at most 1
    bound: str  # the slowest unit; of the linear path those of the inner loop and of the rest
    instructions: float  # of a thread, for each logit
    exponentials: float
    bytes: float  # of memory; of the linear path those of the second-level cache
    products: int  # tensor-core instructions in the inner loop
    registers: int
    warps: int  # resident, of a core
    note: str = NOTE


def resident(machine: Machine, registers: int, warps: int, shared: int) -> int:
    """Warps of a core at a time, of programs with `warps` warps and `shared` bytes each."""
    most = min(4 * (machine.registers // (-(-registers // 8) * 8)), machine.warps) // warps
    return warps * min(most, machine.shared // shared if shared else most)


def of_memory(variant: Variant, target: str, code: list[Instruction]) -> Estimate:
    """A stream of logits: a full split (gradient: one block with one token) against the memory's rate."""
    machine, lanes = MACHINES[target], TARGETS[target].gpu.warp_size
    wide = [i for i, x in enumerate(code) if WIDE.match(x.text)]
    c = variant.constants
    if "BLOCK" in c:
        work, rounds = c["BLOCK"] / (variant.warps * lanes), 1
        marks = sorted({*wide, *(i for i, x in enumerate(code) if EXP.match(x.text))})
        path = [code[i] for i in tour(code, marks)]
        body: list[Instruction] = []
    else:
        main = max((s for s in loops(code) if any(i in s for i in wide)), key=len)
        work, rounds = c["SPLIT"] / (variant.warps * lanes), c["SPLIT"] // (c["U"] * c["W"])
        path = [code[i] for i in [0, *route(code, 0, main.start), *route(code, main.stop - 1, None)]]
        body = [code[i] for i in main]
    run = path + body * rounds
    # Programs share a core, so that the units overlap.
    busy = clocks(machine, run)
    read = 16 * sum(bool(WIDE.match(x.text)) for x in run) / work
    busy["memory"] = read * work * lanes * machine.cores * machine.clock / machine.memory
    bound = max(busy, key=lambda unit: busy[unit])
    exps = sum(bool(EXP.match(x.text)) for x in run) / work
    share = busy["memory"] / busy[bound]
    return Estimate(target, variant.name, "memory", share, bound, len(run) / work, exps, read, 0, 0, 0)


def of_tensor(variant: Variant, target: str, code: list[Instruction]) -> Estimate:
    """Products and what is done with them: one split (gradient: one tile) against the tensor cores' rate."""
    machine, lanes = MACHINES[target], TARGETS[target].gpu.warp_size
    c, warps = variant.constants, variant.warps
    nest = [s for s in loops(code) if any(PRODUCT.match(code[i].text) for i in s)]
    inner = min(nest, key=len)
    outer = max(nest, key=len)
    # Once around the outer loop for each tile; the gradient has none, and goes on to the end.
    tiles = 1 if outer is inner else split_width(VOCAB) // c["BV"]
    out = leave(code, inner)
    after = [out, *route(code, out, None if outer is inner else inner.start)]
    rest = [code[i] for i in [0, *route(code, 0, inner.start), *after * tiles]]
    body = [code[i] for i in inner]
    rounds = tiles * DEPTH // c["BD"]
    inside = {unit: busy * rounds * warps for unit, busy in clocks(machine, body).items()}
    outside = {unit: busy * warps for unit, busy in clocks(machine, rest).items()}
    products = [m for x in body if (m := PRODUCT.match(x.text))]
    sizes = [[int(n) for n in m.groups() if n] for m in products]
    groups = warps // (4 if target == "sm_90" else 1)  # 4 warps share an HGMMA
    read = 16 * sum(bool(WIDE.match(x.text)) for x in body) * warps * lanes * rounds
    inside["cache"] = read / (machine.cache / machine.cores)
    inside["tensor cores"] = (
        2 * sum(m * n * k for m, n, k in sizes) * groups * rounds
        / (machine.tensor / machine.cores / machine.clock)
    )  # fmt: skip
    slow, then = (max(busy, key=lambda unit: busy[unit]) for busy in (inside, outside))
    logits = c["BT"] * c["BV"] * tiles / (warps * lanes)
    return Estimate(
        target, variant.name, "tensor cores", inside["tensor cores"] / (inside[slow] + outside[then]),
        f"{slow} + {then}", (len(body) * rounds + len(rest)) / logits,
        sum(bool(EXP.match(x.text)) for x in rest) / logits, read / (c["BT"] * c["BV"] * tiles),
        len(products), 0, 0,
    )  # fmt: skip


def estimate(variant: Variant, target: str) -> Estimate:
    """Compile one variant for "sm_90" or "gfx942" and estimate it."""
    compiled = aot.compile_variant(variant, TARGETS[target])
    if TARGETS[target].gpu.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder, "kernel.cubin")
            binary.write_bytes(compiled.asm["cubin"])
            text = aot._run(triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(binary)).stdout
        read: Callable[[str], list[Instruction]] = read_sass
        registers = re.findall(r"\bREG:(\d+)", text)
    else:
        text, read = compiled.asm["amdgcn"], read_amdgcn
        registers = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    found = (of_tensor if variant.product else of_memory)(variant, target, read(text))
    found.registers = max(map(int, registers))
    found.warps = resident(MACHINES[target], found.registers, variant.warps, int(compiled.metadata.shared))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m raise_kernels.aot_estimate", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name contains this")
    parser.add_argument("--json", type=Path, help="write the estimates to this file, one JSON object a line")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    found = []
    print(f"{NOTE}: {'target':8}{'variant':25}{'share of peak':21}{'bound by':28}", end="")
    print("instr  exp2  bytes  mma regs warps")
    for target in MACHINES:
        for variant in variants(target, False):
            if variant.name in NAMES and options.only in variant.name:
                e = estimate(variant, target)
                found.append(e)
                share = f"{100 * e.share:.0f} % of {e.peak}"
                print(f"{NOTE}: {target:8}{variant.name:25}{share:21}{e.bound:28}", end="")
                print(f"{e.instructions:5.1f}{e.exponentials:6.2f}{e.bytes:7.1f}{e.products:5}", end="")
                print(f"{e.registers:5}{e.warps:6}", flush=True)
    if not found:
        parser.error(f"no estimated variant is called {options.only!r}; leave --only out to see them all")
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(e)) + "\n" for e in found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
