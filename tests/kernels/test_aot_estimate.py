"""The estimate from machine code: parsing, the way through it and the arithmetic, on code counted by hand.

Other processes compile: in this one the kernels belong to the interpreter.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raise_kernels import aot_estimate, machine_code
from raise_kernels.aot import Variant
from raise_kernels.machine_code import MACHINES, Instruction, loops, read_amdgcn, read_sass, route, tour

STREAM = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x000fe20000000800 */
        /*0010*/               @P0 BRA 0x70 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FMUL R1, R4, R5 ;
        /*0040*/                   MUFU.EX2 R1, R1 ;
        /*0050*/                   FMNMX R2, R2, R4, !PT ;
        /*0060*/              @!P1 BRA 0x20 ;
        /*0070*/               @P2 BRA 0xa0 ;
        /*0080*/              @!P3 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/                   MUFU.EX2 R1, R1 ;
        /*00a0*/                   STG.E desc[UR4][R6.64], R0 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""
# A split of 2048 columns in two tiles: 16 logits of a thread. Its way: 2 instructions before the loop, 5 in
# either of its 2 rounds, 3 after it without the masked tile.
SPLIT = Variant("stream", None, {"SPLIT": 2048, "U": 1, "W": 1024}, {}, 4)

PRODUCTS = """
_linear_kernel:
        s_load_dwordx2 s[0:1], s[4:5], 0x0
        s_cbranch_execz .LBB0_1
        v_mov_b32_e32 v0, 0            ; always reached
.LBB0_1:                               ; %outer
        v_mov_b32_e32 v1, 0
.LBB0_2:                               ; =>This Inner Loop Header: Depth=2
        global_load_dwordx4 v[0:3], v[4:5], off
        s_waitcnt vmcnt(0)
        v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
        v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
        ds_read_b64 v[0:1], v9
        s_cbranch_scc0 .LBB0_4
        s_branch .LBB0_2
.LBB0_3:
        s_endpgm
.LBB0_4:
        v_exp_f32_e32 v1, v2
        s_cbranch_scc1 .LBB0_5
        ds_bpermute_b32 v1, v2, v3
.LBB0_5:
        s_cbranch_vccnz .LBB0_3
        s_branch .LBB0_1
"""
TILES = Variant("linear", None, {"BT": 32, "BV": 32, "BD": 16}, {}, 1, product=True)


def test_sass_by_hand() -> None:
    code = read_sass(STREAM)
    assert len(code) == 13
    assert code[1] == Instruction("BRA 0x70", 7, True)
    assert code[8].text.startswith("LDG.E.128") and code[8].falls
    assert code[11] == Instruction("EXIT", None, False) and not code[12].falls
    assert loops(code) == [range(2, 7)]
    assert route(code, 0, 2) == [1] and route(code, 6, None) == [7, 10, 11]
    assert tour(code, [4, 9]) == [*range(12)]
    (jump,) = read_sass("        /*0000*/    BRA !UP0, 0x0 ;")
    assert jump.target == 0 and jump.falls


def test_amdgcn_by_hand() -> None:
    code = read_amdgcn(PRODUCTS)
    assert [x.text.split()[0] for x in code[:3]] == ["s_load_dwordx2", "s_cbranch_execz", "v_mov_b32_e32"]
    # A skip for warps without a live lane is not taken.
    assert code[1].target is None and route(code, 0, 3) == [1, 2]
    assert code[10] == Instruction("s_branch .LBB0_2", 4, False)
    assert loops(code) == [range(3, 17), range(4, 11)]  # the jump back to s_endpgm is none
    assert machine_code.leave(code, range(4, 11)) == 12
    assert route(code, 12, 4) == [13, 15, 16, 3]
    assert route(code, 12, None) == [13, 15, 11]


def test_a_loop_that_is_laid_out_from_its_middle_is_one_loop() -> None:
    halves = [Instruction("s_nop")] * 10
    halves[6] = Instruction("s_cbranch_scc0", 1)
    halves[9] = Instruction("s_branch", 4, False)
    assert loops(halves) == [range(1, 10)]
    with pytest.raises(ValueError, match="no instruction leaves"):
        machine_code.leave([Instruction("a"), Instruction("s_branch", 0, False)], range(0, 2))


def test_clocks_by_hand() -> None:
    code = [
        Instruction(x)
        for x in ("FMUL R1", "FMNMX R1", "MUFU.EX2 R1", "SHFL.BFLY PT", "STS.128 [R1]", "UIADD3")
    ]
    assert machine_code.clocks(MACHINES["sm_90"], code) == {
        "issue": 1.5, "half-rate ALU": 0.5, "MUFU": 2.0, "exchange": 1.0 + 4.0,
    }  # fmt: skip
    code = [
        Instruction(x)
        for x in ("v_pk_mul_f32 v", "v_exp_f32_e32 v", "v_mfma_f32_32x32x8_bf16 a", "s_add_u32 s", "s_nop 0",
                  "ds_write_b128 v", "ds_read2st64_b64 v", "ds_bpermute_b32 v")
    ]  # fmt: skip
    assert machine_code.clocks(MACHINES["gfx942"], code) == {
        "vector": 1.0 + 4.0, "scalar": 1.0, "exchange": 8.0 + 8.0 + 2.0,
    }  # fmt: skip


def test_a_stream_is_bound_by_memory_until_it_has_too_many_instructions() -> None:
    found = aot_estimate.of_memory(SPLIT, "sm_90", read_sass(STREAM))
    assert (found.peak, found.bound, found.share) == ("memory", "memory", 1.0)
    assert (found.instructions, found.exponentials, found.bytes) == (15 / 16, 2 / 16, 2.0)
    more = "".join(f"        /*{0x1000 + i:04x}*/    FADD R1, R1, R2 ;\n" for i in range(300))
    code = read_sass(STREAM.replace("        /*0030*/", more + "        /*0030*/"))
    found = aot_estimate.of_memory(SPLIT, "sm_90", code)
    # 615 instructions at 4 a clock; 1024 bytes a warp at 3.35e12 a second for 132 cores at 1.755e9.
    clocks = 1024 * 132 * 1.755e9 / 3.35e12
    assert found.bound == "issue" and found.share < 1.0
    assert math.isclose(found.share, clocks / (615 / 4))


def test_a_gradient_takes_the_way_through_its_loop_once() -> None:
    block = Variant("gradient", None, {"BLOCK": 1024}, {}, 4)
    text = STREAM.replace("STG.E ", "STG.E.128 ").replace("@!P3 LDG.E.128", "@!P3 FADD")
    found = aot_estimate.of_memory(block, "sm_90", read_sass(text))
    assert found.instructions == 12 / 8 and found.bytes == 2 * 16 / 8 and found.exponentials == 2 / 8


def test_products_and_what_follows_them_do_not_overlap() -> None:
    found = aot_estimate.of_tensor(TILES, "gfx942", read_amdgcn(PRODUCTS))
    # 32 tiles of 256 rounds. A round: two products, 1024 bytes of the cache. A tile: one exponential in 4
    # clocks, two scalar branches and one move beside it; once: the load of an argument, two moves.
    products = 2 * 2 * 32 * 32 * 8 / (1307e12 / 304 / 2.1e9)
    cache = 1024 / (16384 / 304)
    inside, outside = 32 * 256 * cache, 32 * 5 + 2
    assert cache > products and found.bound == "cache + vector"
    assert math.isclose(found.share, 32 * 256 * products / (inside + outside))
    assert found.products == 2 and found.bytes == 1024 * 256 / (32 * 32)
    assert found.exponentials == 1 / 16


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "expected"),
    [
        ("sm_90", 32, 4, 16, 64),
        ("sm_90", 33, 4, 16, 48),  # 40 of them
        ("sm_90", 128, 16, 147_456, 16),
        ("gfx942", 108, 4, 16, 16),
        ("gfx942", 51, 4, 0, 32),
        ("gfx942", 128, 4, 65_536, 4),
    ],
)
def test_resident_warps(target: str, registers: int, warps: int, shared: int, expected: int) -> None:
    assert aot_estimate.resident(MACHINES[target], registers, warps, shared) == expected


def estimating(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "raise_kernels.aot_estimate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_compiled_variant_is_estimated_and_labelled(tmp_path: Path) -> None:
    out = tmp_path / "estimates.jsonl"
    ran = estimating(tmp_path, "--only", "stats fp32 level 0", "--json", str(out))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert all(line.startswith(f"{aot_estimate.NOTE}: ") for line in ran.stdout.splitlines())
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["target"] for r in records] == ["sm_90", "gfx942"]
    for r in records:
        assert r["note"] == aot_estimate.NOTE
        assert 0.0 < r["share"] <= 1.0 and r["bytes"] == 4.0
        assert 1.125 <= r["exponentials"] < 1.25 < r["instructions"]
        assert r["registers"] > 0 and r["warps"] >= 4


def test_a_name_that_is_not_estimated(tmp_path: Path) -> None:
    ran = estimating(tmp_path, "--only", "stats fp8")
    assert ran.returncode == 2 and "no estimated variant is called 'stats fp8'" in ran.stderr


def test_nothing_is_compiled_under_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    if not aot_estimate.triton.knobs.runtime.interpret:
        pytest.skip("the interpreter is off")
    with pytest.raises(SystemExit):
        aot_estimate.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
