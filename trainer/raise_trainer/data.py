"""Rows as a list, for data sets that fit in memory; a bad row is refused or counted, never replaced."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .config import OnBad
from .errors import BadMedia, BadRow, UserError
from .row_files import RowFile, RowSource
from .rows import PROBLEM_TYPES, Row

__all__ = ["PROBLEM_TYPES", "Refused", "Row", "RowFile", "RowSource", "keep_good", "load_rows"]


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
    source = RowFile(file, root)
    rows = keep_good(range(len(source)), source.__getitem__, on_bad, refused)
    if not rows:
        raise UserError(f"{file}: no usable row" + (f"; {refused}" if refused.items else ""))
    return rows
