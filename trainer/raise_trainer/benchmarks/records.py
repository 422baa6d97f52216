"""Published annotation files as plain objects: a JSON list, JSON lines, or parquet."""

import hashlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import BadRow, UserError
from ..row_files import RowFile

SUFFIXES = (".json", ".jsonl", ".parquet")
FOLDERS = ("", "json", "data")


def find(root: Path, stem: str) -> list[Path]:
    """The files called `stem` under a folder, in order; none where there are none.

    Looked for in turn, in the folder, its `json/` and its `data/`: stem.json, stem.jsonl, stem.parquet; then
    the shards stem-*.parquet; then all such files in a folder called stem.
    """
    for folder in (root / name for name in FOLDERS):
        for suffix in SUFFIXES:
            if (file := folder / f"{stem}{suffix}").is_file():
                return [file]
        if shards := sorted(folder.glob(f"{stem}-*.parquet")):
            return shards
        if files := sorted(f for s in SUFFIXES for f in (folder / stem).glob(f"*{s}")):
            return files
    return []


def read(file: Path) -> Iterator[dict[str, Any] | BadRow]:
    """Each record of a file, or why it is none. UserError for a file that cannot be read at all."""
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    rows = RowFile(file, file.parent)
    for index in range(len(rows)):
        try:
            found = rows.raw(index)
        except BadRow as error:
            yield error
            continue
        if isinstance(found, dict):
            yield found
        else:
            yield BadRow(f"row {index}: got {type(found).__name__}, expected an object")


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(
            f"{file}: parquet needs the package pyarrow; pip install pyarrow, or write it as JSON lines"
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0][:120]})") from None


def fingerprint(files: Sequence[Path]) -> str:
    """Of the bytes of files, in order; not of where they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
