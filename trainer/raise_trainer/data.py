"""Files of rows; a bad row is refused or counted, never replaced."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .config import OnBad
from .errors import BadMedia, BadRow, UserError
from .rows import PROBLEM_TYPES, Row, parse_row

__all__ = ["PROBLEM_TYPES", "Refused", "Row", "keep_good", "load_rows"]


@dataclass
class Refused:
    """What was left out, and why: every bad item is counted and named."""

    items: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, error: UserError) -> None:
        """Record one refused item."""
        self.items.append(str(error))
        self.kinds[type(error).__name__] += 1

    def __str__(self) -> str:
        shown = "; ".join(self.items[:3]) + (" …" if len(self.items) > 3 else "")
        return f"{len(self.items)} left out ({', '.join(f'{n} {k}' for k, n in self.kinds.items())}): {shown}"


T = TypeVar("T")
U = TypeVar("U")


def keep_good(items: Iterable[T], make: Callable[[T], U], on_bad: OnBad, refused: Refused) -> list[U]:
    """`make` of every item; BadRow or BadMedia stops the run or is recorded, as `on_bad` says."""
    made = []
    for item in items:
        try:
            made.append(make(item))
        except (BadRow, BadMedia) as error:
            if on_bad == "fail":
                raise
            refused.add(error)
    return made


def load_rows(file: Path, root: Path, *, on_bad: OnBad, refused: Refused) -> list[Row]:
    """All rows of a Video-R1 JSON list or a JSON-lines file; media paths are taken under `root`."""
    try:
        text = file.read_text(encoding="utf-8")
        items: list[Any] = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give JSON rows in the Video-R1 schema") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}); give JSON rows in UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not JSON (line {error.lineno}: {error.msg})") from None
    root = root.resolve()
    wanted = ((i, item) for i, item in enumerate(items) if not isinstance(item, str) or item.strip())
    rows = keep_good(wanted, lambda item: _row(*item, root), on_bad, refused)
    if not rows:
        raise UserError(f"{file}: no usable row" + (f"; {refused}" if refused.items else ""))
    return rows


def _row(index: int, raw: Any, root: Path) -> Row:
    if isinstance(raw, str):  # a line of a JSON-lines file
        try:
            raw = json.loads(raw)
        except json.JSONDecodeError as error:
            raise BadRow(f"row {index}: not JSON ({error.msg}); mend the line or drop it") from None
    return parse_row(index, raw, root)
