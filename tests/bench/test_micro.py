"""The micro-benchmarks still run, once each and untimed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_micro_benchmarks_run() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "bench/micro",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    ]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout
