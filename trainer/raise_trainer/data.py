"""Rows in the Video-R1 JSON schema, checked one by one; a bad row is refused or counted, never replaced.

problem_id, problem, data_type, problem_type, options, solution "<answer>X</answer>", path "./folder/file"
process "<think>…</think>"      supervised rows only: the chain; the target is process + solution
references [str, …]             optional, free-form: several accepted phrasings
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import raise_core as rc

from .config import OnBad
from .errors import BadMedia, BadRow, UserError

PROBLEM_TYPES = ("multiple choice", "numerical", "regression", "OCR", "free-form")
_STRICT = {"multiple choice", "numerical"}


@dataclass(frozen=True)
class Row:
    """One question about one medium."""

    problem_id: int | str
    problem: str
    data_type: str
    problem_type: str
    options: tuple[str, ...]
    solution: str
    path: Path
    data_source: str
    process: str = ""
    references: tuple[str, ...] = ()

    @property
    def strict(self) -> bool:
        """True when the answer is right or wrong (SCRE); False when it is graded (IGSR)."""
        return self.problem_type in _STRICT

    @property
    def question(self) -> str:
        """The problem with its options, one a line."""
        return "\n".join([self.problem, "Options:", *self.options]) if self.options else self.problem

    def verdict(self, completion: str) -> rc.Verdict:
        """How well a completion answers, by the rule of its kind (`raise_core.verify_details`)."""
        return rc.verify_details(self.problem_type, completion, self.references or self.solution)

    def text_score(self, completion: str) -> float:
        """The score of `verdict`, in [0, 1]."""
        return self.verdict(completion).score


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
    if not isinstance(raw, dict):
        raise BadRow(f"row {index}: got {type(raw).__name__}, expected an object in the Video-R1 schema")
    name = f"row {raw.get('problem_id', index)}"
    for key in ("problem", "data_type", "problem_type", "solution", "path"):
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise BadRow(f"{name}: no `{key}` (a non-empty string); add it or drop the row")
    for key in ("process", "data_source"):
        if not isinstance(raw.get(key, ""), str):
            raise BadRow(f"{name}: `{key}` is {type(raw[key]).__name__}, expected a string")
    options, references = (_strings(name, key, raw.get(key) or []) for key in ("options", "references"))
    if raw["problem_type"] not in PROBLEM_TYPES:
        known = ", ".join(PROBLEM_TYPES)
        raise BadRow(f"{name}: problem_type {raw['problem_type']!r}, expected one of {known}")
    if raw["data_type"] != "video":
        raise BadRow(f"{name}: data_type {raw['data_type']!r}, expected 'video'; drop the row")
    if references and raw["problem_type"] not in ("free-form", "OCR"):
        raise BadRow(f"{name}: `references` on a {raw['problem_type']} row; give one `solution`")
    if rc.verify_details(raw["problem_type"], "<answer>0</answer>", raw["solution"]).reason == "bad_solution":
        raise BadRow(f"{name}: solution {raw['solution']!r} cannot be read as {raw['problem_type']}; mend it")
    return Row(
        problem_id=raw.get("problem_id", index),
        problem=raw["problem"],
        data_type=raw["data_type"],
        problem_type=raw["problem_type"],
        options=options,
        solution=raw["solution"],
        path=_below(name, root, raw["path"]),
        data_source=raw.get("data_source", ""),
        process=raw.get("process", ""),
        references=references,
    )


def _strings(name: str, key: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise BadRow(f"{name}: `{key}` is {str(values)[:60]!r}, expected a list of non-empty strings")
    return tuple(values)


def _below(name: str, root: Path, path: str) -> Path:
    """The file `path` names under `root`; links are followed before it is judged."""
    try:
        found = (root / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRow(f"{name}: path {path!r} is no path ({error}); mend it or drop the row") from None
    if not found.is_relative_to(root):
        raise BadRow(f"{name}: path {path!r} leaves the data root {root}; move the file below it")
    return found
