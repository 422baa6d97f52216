"""Seconds a user waits for the first result: a fresh process with an empty cache of compiled code."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.logits_cases import SWITCH

SCRIPT = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
x, y = torch.randn(256, int(sys.argv[2])), torch.zeros(256, dtype=torch.int64)
begun = time.perf_counter()
import raise_core as rc
rc.token_stats(x, y)
print(time.perf_counter() - begun)
"""


def seconds(threads: int, vocabulary: int, compiled: bool) -> float:
    """From `import raise_core` (torch is there already) to the end of the first token_stats of [256, V]."""
    with tempfile.TemporaryDirectory() as empty:
        settings = os.environ | {"XDG_CACHE_HOME": empty} | ({} if compiled else {SWITCH: "0"})
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(threads), str(vocabulary)],
            env=settings, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout.split()[-1])
