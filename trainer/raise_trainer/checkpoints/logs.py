"""A log that goes on where the resumed run does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def truncate_log(path: str | os.PathLike[str], step: int, *, stage: str | None = None) -> int:
    """Cut a JSONL log at its first line with `"step"` >= `step`; return how many lines went.

    Steps count from 0, so `step` finished steps keep the lines 0 to step - 1. stage: only a line with that
    `"stage"` is looked at; the log is in order of time, so all after it goes too. A last line without its end
    goes as well. The file is replaced at once; nothing is done if there is none. ValueError for a line before
    the cut that is no JSON.
    """
    file = Path(path)
    if not file.is_file():
        return 0
    lines = file.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    kept: list[bytes] = []
    for line in whole:
        record = _record(file, len(kept) + 1, line)
        if stage in (None, record.get("stage")) and record.get("step", -1) >= step:
            break
        kept.append(line)
    if len(kept) < len(lines):
        part = file.with_name(file.name + ".part")
        with part.open("wb") as stream:
            stream.writelines(kept)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    return len(lines) - len(kept)


def _record(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{file}, line {number}: got {line[:60]!r}, wanted one JSON object a line")
    return record
