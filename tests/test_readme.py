"""The Python of README.md runs as it stands there, in a folder of its own, without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[str]:
    """The text of every ```python block, in order."""
    return FENCE.findall(text)


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "trainer"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def test_python_blocks_run(tmp_path: Path) -> None:
    """One block may use what an earlier one made, as a reader pasting them in turn would."""
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no ```python block"
    done = run("\n".join(blocks), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("no block", []),
        ("```\nx\n```\n```sh\nmake\n```\n", []),
        ("a\n```python\nx = 1\n```\nb\n```python\nassert x == 2\n```\n", ["x = 1\n", "assert x == 2\n"]),
    ],
)
def test_blocks_are_found(text: str, blocks: list[str]) -> None:
    assert python_blocks(text) == blocks


def test_a_wrong_block_fails(tmp_path: Path) -> None:
    done = run("x = 1\n\nassert x == 2\n", tmp_path)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr


def test_readme_names_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
