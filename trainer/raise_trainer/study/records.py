"""The results folder: one small JSON file per arm and seed, the counted operations, what they depend on."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DIGITS = 4  # of every figure that is kept
SETTINGS, COMPUTE = "settings.json", "compute.json"
Record = dict[str, Any]


class Results:
    """A folder of results. Files are written whole or not at all, so that a killed run leaves none torn."""

    def __init__(self, folder: Path, flag: str = "--results") -> None:
        self.folder, self.flag = folder, flag

    def open(self, sizes: "DataclassInstance") -> None:
        """Make the folder, or go on in it. sizes: of its runs; UserError when they have others."""
        wanted, path = asdict(sizes), self.folder / SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                _write(path, wanted)
        except OSError as error:
            raise UserError(f"{self.flag} {self.folder}: {error.strerror}; choose another folder") from None
        there = _read(path)
        if there != wanted:
            names = [k for k in {**there, **wanted} if there.get(k) != wanted.get(k)]
            raise UserError(
                f"{self.flag} {self.folder}: holds runs with other sizes ({', '.join(names)}); "
                "choose another folder, or remove it"
            )

    def path(self, arm: str, seed: int) -> Path:
        """The file of a run."""
        return self.folder / f"{arm}.{seed}.json"

    def has(self, arm: str, seed: int) -> bool:
        """Whether the run is finished."""
        return self.path(arm, seed).exists()

    def write(self, record: Record) -> None:
        """Keep a finished run."""
        _write(self.path(record["arm"], record["seed"]), rounded(record))

    def records(self) -> list[Record]:
        """All finished runs, by arm and seed."""
        return [_read(path) for path in sorted(self.folder.glob("*.[0-9]*.json"))]

    def settings(self) -> Record:
        """The sizes. UserError when there is no study here."""
        if not (self.folder / SETTINGS).exists():
            raise UserError(f"--results {self.folder}: no study is recorded there; run it without --report")
        found: Record = _read(self.folder / SETTINGS)
        return found

    def operations(self) -> dict[str, dict[str, float]]:
        """Operations of a step by arm and phase, as far as they are counted."""
        path = self.folder / COMPUTE
        return _read(path) if path.exists() else {}

    def add_operations(self, arm: str, counted: Mapping[str, float]) -> None:
        """Keep what a step of an arm costs."""
        _write(self.folder / COMPUTE, self.operations() | {arm: dict(counted)})


def rounded(value: Any) -> Any:
    """Every float in nested lists and dicts to DIGITS decimals."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def provenance() -> dict[str, Any]:
    """Commit of the source, whether it was changed, versions, processor; "unknown" outside a repository."""
    here = Path(__file__).parent
    return {
        "commit": _git(here, "rev-parse", "HEAD"),
        "changed": bool(_git(here, "status", "--porcelain", "--untracked-files=no", "--", ":/*.py")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
    }


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), platform.machine())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: is no JSON; remove it, and its run is made anew") from None


def _write(path: Path, value: Any) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(part, path)
