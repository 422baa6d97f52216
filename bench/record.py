"""Where results go and what every record says about its making."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def provenance() -> dict[str, Any]:
    """Commit, whether the tree was dirty, versions, processor and threads."""
    root = Path(__file__).parent
    dirty = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)bench/results")
    return {
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": bool(dirty),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), platform.machine())
