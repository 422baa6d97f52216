"""The checker of compiled kernels: what it accepts, and that it refuses what would run badly.

Other processes compile: in this one the kernels belong to the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raise_kernels import aot, aot_table, machine_code

SOUND = aot.Report("", "", registers=80, shared=16, wide_loads=8, exponentials=73, products=4)
STREAM = aot.Variant(
    "stream",
    None,
    {},
    {},
    4,
    loop=machine_code.EXP,
    wide=8,
    narrow=0,
    logits=64,
    exponentials=1.15,
    product=True,
)

# Two logits of a thread in a tile: what is before and after the loop has narrow loads and more exponentials.
LISTING = """
        /*0000*/    LDG.E.U16 R1, desc[UR4][R2.64] ;
        /*0010*/    LDG.E.64 R8, desc[UR4][R2.64] ;
        /*0020*/    MUFU.EX2 R9, R8 ;
        /*0030*/    LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/    MUFU.EX2 R4, R4 ;
        /*0050*/    MUFU.EX2 R5, R5 ;
        /*0060*/    FMNMX R6, R4, R5, !PT ;
        /*0070*/    LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0080*/    LDGDEPBAR ;
        /*0090*/    @P0 BRA 0x30 ;
        /*00a0*/    MUFU.EX2 R4, R4 ;
        /*00b0*/    EXIT ;
"""
AMDGCN = """
        global_load_ushort v1, v[2:3], off
        v_exp_f32_e32 v9, v8
.LBB0_1:
        global_load_dwordx4 v[4:7], v[2:3], off
        buffer_load_dwordx4 v[4:7], v2, s[0:3], 0 offen
        s_load_dword s0, s[4:5], 0x0
        v_exp_f32_e32 v4, v4
        v_exp_f32_e32 v5, v5
        v_max_f32_e32 v6, v4, v5
        s_cbranch_scc0 .LBB0_1
        s_endpgm
.sgpr_spill_count: 5
.vgpr_count:     96
.vgpr_spill_count: 2
"""
OTHER_FORM = re.compile(r"uneven|unaligned|strided|by \w+")
TWO = STREAM._replace(wide=2, logits=2, product=False)


def compiling(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_a_sound_variant_is_accepted_and_recorded(tmp_path: Path) -> None:
    out = tmp_path / "reports.jsonl"
    ran = compiling(
        tmp_path, "-m", "raise_kernels.aot", "--target", "sm_90", "--quick",
        "--only", "stats bf16 level 0", "--json", str(out),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "1 variants, 0 refused"
    (report,) = map(json.loads, out.read_text().splitlines())
    assert report["target"] == "sm_90" and report["faults"] == []
    assert report["registers"] > 0 and report["spills"] == 0
    assert report["wide_loads"] == 8 and report["narrow_loads"] == 0
    assert 64 <= report["exponentials"] <= 1.15 * 64
    assert report["triton"] == aot.triton.__version__ and "commit" in report


def test_kernels_that_would_run_badly_are_refused(tmp_path: Path) -> None:
    """Unaligned rows lose their wide loads; 64 columns tested for a mask exceed gfx9's scalar registers."""
    code = (
        "from raise_kernels import aot\n"
        "def faults(target, name, **changed):\n"
        "    v = next(v for v in aot.variants(target, True) if v.name == name)\n"
        "    print(aot.inspect(v._replace(constants=v.constants | changed), target).faults)\n"
        "faults('sm_90', 'stats bf16 level 0 rows', ALIGN=1)\n"
        "faults('gfx942', 'stats bf16 level 2 rows', U=8)\n"
        "faults('sm_90', 'merge level 0', ROWS=48)\n"
        "for target in aot.TARGETS:\n"
        "    faults(target, 'linear bf16 level 0', BT=16, BV=32, BD=32, PIECE=32, WIDE=True)\n"
        "faults('sm_90', 'linear bf16 level 0', PIECE=256)\n"
    )
    ran = compiling(tmp_path, "-c", code)
    assert ran.returncode == 0, ran.stderr
    narrow, spilled, broken, *widened, whole = ran.stdout.splitlines()
    assert "0 128-bit loads in the main loop, a tile has 8" in narrow
    assert "loads below 128 bits in the main loop, allowed are 0" in narrow
    assert "registers spilled" in spilled
    assert "does not compile" in broken
    for line, instruction in zip(widened, ("HMMA", "HGMMA", "UTCHMMA", "v_mfma"), strict=True):
        assert f"no {instruction}: the product does not run on tensor cores" in line
    assert "registers spilled" in whole


@pytest.mark.parametrize(
    ("target", "variant", "counts", "fault"),
    [
        ("sm_90", {}, {"spills": 3}, "3 bytes or registers spilled"),
        ("sm_90", {}, {"wide_loads": 7}, "7 128-bit loads in the main loop, a tile has 8"),
        ("sm_90", {"loop": None}, {"wide_loads": 7}, "7 128-bit loads in the kernel, a tile has 8"),
        ("sm_90", {}, {"narrow_loads": 1}, "1 loads below 128 bits in the main loop, allowed are 0"),
        ("sm_90", {}, {"exponentials": 74}, "74 exponentials for 64 logits, wanted at most 1.15 for each"),
        ("gfx942", {}, {"shared": 65_537}, "65537 bytes of shared memory, the limit is 65536"),
        ("gfx942", {"warps": 32}, {}, "32 warps exceed 1024 threads"),
        ("sm_100", {}, {"products": 0}, "no UTCHMMA: the product does not run on tensor cores"),
    ],
)
def test_each_limit(target: str, variant: dict[str, int], counts: dict[str, int], fault: str) -> None:
    how = aot.TARGETS[target]
    assert aot.faults(STREAM, how, SOUND) == []
    report = aot.Report(**(vars(SOUND) | counts))
    assert aot.faults(STREAM._replace(**variant), how, report) == [fault]


def tallied(target: str, listing: str, variant: aot.Variant = TWO) -> tuple[list[int], list[str]]:
    report = aot.Report(target, "")
    read = aot._read_amdgcn(listing, report) if target == "gfx942" else machine_code.read_sass(listing)
    aot.tally(variant, aot.TARGETS[target], read, report)
    report.spills = 0
    counts = [report.wide_loads, report.narrow_loads, report.exponentials, report.products]
    return counts, aot.faults(variant, aot.TARGETS[target], report)


@pytest.mark.parametrize(
    ("target", "listing", "wide", "narrow"),
    [
        ("sm_90", LISTING, "LDG.E.128", "LDG.E.64"),
        ("gfx942", AMDGCN, "global_load_dwordx4", "global_load_dwordx2"),
    ],
)
def test_only_the_main_loop_is_counted(target: str, listing: str, wide: str, narrow: str) -> None:
    assert tallied(target, listing) == ([2, 0, 2, 0], [])
    counts, found = tallied(target, listing.replace(wide, narrow))
    assert counts == [1, 1, 2, 0]
    assert found == [
        "1 128-bit loads in the main loop, a tile has 2",
        "1 loads below 128 bits in the main loop, allowed are 0",
    ]
    # One more exponential in the loop.
    counts, found = tallied(target, listing.replace("FMNMX", "MUFU.EX2").replace("v_max_f32", "v_exp_f32"))
    assert counts == [2, 0, 3, 0]
    assert found == ["3 exponentials for 2 logits, wanted at most 1.15 for each"]


def test_a_wait_that_is_laid_out_of_line_makes_no_longer_loop() -> None:
    """As on sm_100: the loop jumps to a wait behind the kernel's end, which jumps back into it."""
    out_of_line = LISTING.replace("FMNMX R6, R4, R5, !PT ;", "@P1 BRA 0xc0 ;") + (
        "        /*00c0*/    SYNCS R1 ;\n        /*00d0*/    @!P1 BRA 0xc0 ;\n"
        "        /*00e0*/    BRA 0x70 ;\n"
    )
    later = out_of_line.replace(
        "MUFU.EX2 R4, R4 ;\n        /*00b0*/", "LDG.E R4, desc[UR4][R2.64] ;\n        /*00b0*/"
    )
    assert later != out_of_line and later.count("LDG.E ") == 1
    assert machine_code.loops(machine_code.read_sass(later))[0] == range(3, 15)
    assert tallied("sm_90", later) == ([2, 0, 2, 0], [])


def test_a_program_without_a_loop_is_counted_whole() -> None:
    counts, found = tallied("sm_90", LISTING, TWO._replace(loop=None, narrow=None, exponentials=2.0))
    assert counts == [2, 2, 4, 0] and found == []
    with pytest.raises(ValueError, match="no loop has an instruction like 'HGMMA'"):
        tallied("sm_90", LISTING, TWO._replace(loop=re.compile("HGMMA")))


def test_products_are_those_of_16_bits() -> None:
    listing = AMDGCN.replace(
        "v_max_f32_e32 v6, v4, v5",
        "v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]\n"
        "        v_mfma_f32_32x32x2_f32 v[0:15], v16, v17, v[0:15]",
    )
    variant = TWO._replace(product=True, loop=aot_table.PRODUCT)
    assert tallied("gfx942", listing, variant) == ([2, 0, 2, 1], [])
    assert tallied("gfx942", AMDGCN, TWO._replace(product=True))[1] == [
        "no v_mfma: the product does not run on tensor cores"
    ]


def test_registers_and_spills_of_amdgcn() -> None:
    report = aot.Report("gfx942", "")
    aot._read_amdgcn(AMDGCN, report)
    assert (report.registers, report.spills) == (96, 7)


def test_a_softcap_has_a_limit_of_its_own() -> None:
    for target in aot.TARGETS:
        for variant in aot.variants(target, False):
            words = variant.name.split()
            forward = words[0] == "stats" or (words[0] == "linear" and "level" in words)
            assert (variant.exponentials > 0.0) >= forward, variant.name
            if forward and "capped" in words:
                assert 2.0 < variant.exponentials <= 2.55, variant.name
            elif forward:
                assert variant.exponentials <= 1.55, variant.name
            if variant.name.startswith("stats") and "level 0" in variant.name and "capped" not in words:
                assert variant.exponentials == 1.15 and (variant.narrow == 0) != variant.odd


def test_every_target_has_the_same_variants_and_no_name_twice() -> None:
    names = [[v.name for v in aot.variants(target, False)] for target in aot.TARGETS]
    assert all(n == names[0] for n in names)
    assert len(set(names[0])) == len(names[0])
    regular = [n for n in names[0] if not OTHER_FORM.search(n)]
    of_statistics = [n for n in regular if n.split()[0] in ("stats", "gradient", "merge", "topk")]
    assert len(of_statistics) <= 60
    assert len([n for n in regular if n.split()[0] == "linear"]) == 30
    for operation in ("stats", "gradient", "linear"):
        assert 0 < len([n for n in names[0] if n.split()[0] == operation]) <= 60
    assert not any(OTHER_FORM.search(v.name) for v in aot.variants("sm_90", True))


@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_other_forms_are_what_launchers_ask_for(target: str) -> None:
    """A sample of what is not regular, each under a limit that its name states."""
    found = {v.name: v for v in aot.variants(target, False) if OTHER_FORM.search(v.name)}
    assert len(found) == 29
    for name, v in found.items():
        form = OTHER_FORM.findall(name)[-1].split()[0]
        assert (v.constants["UNIT"] is False) == (form == "strided"), name
        assert v.odd == (form in ("unaligned", "strided")), name
        if form == "strided":
            assert not any(key.startswith(aot_table.STRIDES) for key in v.constants), name
        if v.odd:
            assert v.constants.get("ALIGN", 1) == 1 and v.constants.get("EVEN", False) is False, name
            # A load for each number, and no more; an ordinary form's are 128 bits.
            assert v.wide == 0 and (v.narrow is None) == name.startswith("gradient"), name
        if form == "uneven":
            assert v.constants["EVEN"] is False and v.narrow == 0 and v.wide > 0, name
        if form == "by" and "target" not in name:
            assert v.constants["WIDE"] is True and v.types["p_h"] != v.types["p_w"], name
            assert not v.product and v.types["p_dz"] == "*fp32", name
    loads = {name: v.narrow for name, v in found.items() if name.startswith("stats bf16 level 0")}
    assert loads == dict.fromkeys(loads, 64) and len(loads) == 2
    assert found["linear bf16 by fp32 level 0"].wide == 3  # 1 of hidden, 2 of the weight


def test_nothing_is_compiled_under_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    if not aot.triton.knobs.runtime.interpret:
        pytest.skip("the interpreter is off")
    with pytest.raises(SystemExit):
        aot.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_constant_can_be_tried(tmp_path: Path) -> None:
    """What a tile was chosen against: 8 columns of a lane at level 2 exceed gfx942's scalar registers."""
    out = tmp_path / "reports.jsonl"
    ran = compiling(
        tmp_path, "-m", "raise_kernels.aot", "--target", "gfx942", "--quick", "--only", "stats bf16 level 2",
        "--set", "U=8", "--json", str(out), "--jobs", "2",
    )  # fmt: skip
    assert ran.returncode == 1 and ran.stdout.splitlines()[-1] == "1 variants, 1 refused"
    (report,) = map(json.loads, out.read_text().splitlines())
    assert report["set"] == {"U": 8} and report["spills"] > 0
    ran = compiling(tmp_path, "-m", "raise_kernels.aot", "--only", "merge", "--set", "BT=8")
    assert ran.returncode == 2 and "no variant is called 'merge' and has the constants BT" in ran.stderr


def test_a_name_that_no_variant_has(tmp_path: Path) -> None:
    ran = compiling(tmp_path, "-m", "raise_kernels.aot", "--target", "sm_90", "--only", "stats fp8")
    assert ran.returncode == 2
    assert "no variant is called 'stats fp8'" in ran.stderr
