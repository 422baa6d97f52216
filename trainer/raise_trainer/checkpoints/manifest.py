"""The list of a checkpoint's files, written last: a folder without it, or unlike it, is no checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import DamagedCheckpoint

NAME = "manifest.json"
CHUNK = 1 << 22


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Put every file on the disk itself, then the manifest: `about`, and each file's bytes and SHA-256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        sync(file)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(_sum, files))
    table = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": total}
        for file, total in zip(files, sums, strict=True)
    }
    manifest: dict[str, Any] = {**about, "files": table}
    manifest["sha256"] = _own_sum(manifest)
    with (folder / NAME).open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(manifest, indent=1))
    sync(folder / NAME)
    for place in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(place)


def read(folder: Path) -> dict[str, Any]:
    """The manifest. DamagedCheckpoint if there is none, or it is not what was written."""
    try:
        manifest: Any = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder / NAME}: {_reason(error)}") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _own_sum(manifest):
        raise DamagedCheckpoint(f"{folder / NAME}: its contents are not those that were written")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after reading every file of it. DamagedCheckpoint names the first that differs."""
    manifest = read(folder)
    for name, wanted in manifest["files"].items():
        try:
            got = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name}: {_reason(error)}") from None
        if got != wanted["bytes"]:
            raise DamagedCheckpoint(f"{folder / name}: has {got} bytes, {wanted['bytes']} were written")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for fault in pool.map(lambda item: _fault(folder, *item), manifest["files"].items()):
            if fault:
                raise DamagedCheckpoint(fault)
    return manifest


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fault(folder: Path, name: str, wanted: dict[str, Any]) -> str | None:
    try:
        total = _sum(folder / name)
    except OSError as error:
        return f"{folder / name}: {_reason(error)}"
    return (
        None if total == wanted["sha256"] else f"{folder / name}: its SHA-256 is not that of what was written"
    )


def _sum(file: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _own_sum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else f"is no JSON ({error})"
