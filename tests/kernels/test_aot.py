"""The checker of compiled kernels: what it accepts, and that it refuses what would run badly.

Other processes compile: in this one the kernels belong to the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raise_kernels import aot

SOUND = aot.Report("", "", registers=80, shared=16, wide_loads=8, exponentials=140, products=4)
STREAM = aot.Variant("stream", None, {"U": 8}, {}, 4, wide=8, streamed=64, product=True)


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
    assert report["wide_loads"] >= 8 and report["exponentials"] >= 64


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
    assert "0 128-bit loads, a tile has 8" in narrow
    assert "registers spilled" in spilled
    assert "does not compile" in broken
    for line, instruction in zip(widened, ("HMMA", "HGMMA", "UTCHMMA", "v_mfma"), strict=True):
        assert f"no {instruction}: the product does not run on tensor cores" in line
    assert "registers spilled" in whole


@pytest.mark.parametrize(
    ("target", "variant", "counts", "fault"),
    [
        ("sm_90", {}, {"spills": 3}, "3 bytes or registers spilled"),
        ("sm_90", {}, {"wide_loads": 7}, "7 128-bit loads, a tile has 8"),
        ("sm_90", {}, {"exponentials": 156}, "156 exponentials for 128 logits"),
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


def test_amdgcn_counts_by_hand() -> None:
    report = aot.Report("gfx942", "")
    text = (
        "global_load_dwordx4 v[0:3]\nbuffer_load_dwordx4 v[4:7]\nglobal_load_dwordx2 v[8:9]\n"
        "v_exp_f32_e32 v1, v2\n"
        "v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]\n"
        "v_mfma_f32_32x32x2_f32 v[0:15], v16, v17, v[0:15]\n"
        ".sgpr_spill_count: 5\n.vgpr_count:     96\n.vgpr_spill_count: 2\n"
    )
    aot._read_amdgcn(text, report)
    assert (report.wide_loads, report.exponentials, report.registers, report.spills) == (2, 1, 96, 7)
    assert report.products == 1


def test_every_target_has_the_same_variants_and_no_name_twice() -> None:
    names = [[v.name for v in aot.variants(target, False)] for target in aot.TARGETS]
    assert all(n == names[0] for n in names)
    assert len(set(names[0])) == len(names[0])
    of_statistics = [n for n in names[0] if n.split()[0] in ("stats", "gradient", "merge")]
    assert len(of_statistics) <= 60
    assert len([n for n in names[0] if n.split()[0] == "linear"]) == 30


def test_nothing_is_compiled_under_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    if not aot.triton.knobs.runtime.interpret:
        pytest.skip("the interpreter is off")
    with pytest.raises(SystemExit):
        aot.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_name_that_no_variant_has(tmp_path: Path) -> None:
    ran = compiling(tmp_path, "-m", "raise_kernels.aot", "--target", "sm_90", "--only", "stats fp8")
    assert ran.returncode == 2
    assert "no variant is called 'stats fp8'" in ran.stderr
