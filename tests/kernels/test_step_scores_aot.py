"""The kernels of step scores, compiled for every target on a machine without a GPU.

They are not in the launch table of `raise_kernels.aot`, whose record is of full runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
from raise_kernels import aot, step_scores as s
half = {name: "*bf16" for name in ("p_h", "p_plus", "p_minus", "p_up", "p_down")}
kernels = [
    ("margins", s._margin_kernel, {"CAPPED": c, "BIASED": b, "BLOCK": s.BLOCK}, half)
    for c in (False, True) for b in (False, True)
] + [
    ("hidden", s._hidden_grad_kernel, {"CAPPED": c, "TAGS": s.TAGS, "BLOCK": s.BLOCK},
     half | {"p_grad": "*bf16"})
    for c in (False, True)
] + [("pair", s._pair_grad_kernel, {"COLUMNS": s.COLUMNS}, half)]
for target in aot.TARGETS:
    for name, kernel, constants, types in kernels:
        print(target, name, aot.inspect(aot.Variant(name, kernel, constants, types, 4), target).faults)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_without_a_fault(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 4 * 7 and all(line.endswith(" []") for line in lines), ran.stdout
