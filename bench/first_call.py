"""Seconds a user waits for the first result: a fresh process, with and without compiled code in the cache."""

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
name, *shape = sys.argv[2:]
rows, width, vocabulary = (int(size) for size in shape)
y = torch.zeros(rows, dtype=torch.int64)
if name == "linear_token_stats":
    given = torch.randn(rows, width), torch.randn(vocabulary, width), y
else:
    given = torch.randn(rows, vocabulary), y
begun = time.perf_counter()
import raise_core as rc
getattr(rc, name)(*given)
print(time.perf_counter() - begun)
"""


def seconds(
    threads: int,
    shape: tuple[int, int, int],
    *,
    name: str = "token_stats",
    compiled: bool = True,
    cached: bool = False,
) -> float:
    """From `import raise_core` (torch is there already) to the end of the first call of `name`.

    shape: (rows, hidden size, vocabulary); the hidden size is that of linear_token_stats. compiled=False: no
    C compiler is used. cached: another process made the call before and left its library.
    """
    with tempfile.TemporaryDirectory() as empty:
        settings = os.environ | {"XDG_CACHE_HOME": empty} | ({} if compiled else {SWITCH: "0"})
        for _ in range(1 + cached):
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, str(threads), name, *(str(size) for size in shape)],
                env=settings, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout.split()[-1])
