"""JSON lines that a run appends to: objects, one a line; a killed process may have torn the last."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

CHUNK = 1 << 16


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and object of each line; blank lines are passed over.

    A last line without its end that is no JSON is what a killed process wrote of it, and is left out.
    UserError, naming file and line, for any other line that is no object, or a file that cannot be read.
    """
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a file of JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            if number == len(lines) and not line.endswith(b"\n"):
                return
            found = None
        if not isinstance(found, dict):
            shown = line[:60].decode("utf-8", "replace").strip()
            raise UserError(f"{file}, line {number}: got {shown!r}, wanted one JSON object a line; mend it")
        yield number, found


def append_json_lines(file: Path, records: list[dict[str, Any]]) -> None:
    """Append an object a line, as one write."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)


def drop_torn_line(file: Path) -> None:
    """Cut off what a killed process wrote of the last line; nothing is done where there is no file."""
    if not file.is_file():
        return
    with file.open("rb+") as stream:
        size = end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - CHUNK, 0)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            stream.truncate(end)
