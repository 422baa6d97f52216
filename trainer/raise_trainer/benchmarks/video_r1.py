"""Video-R1's evaluation files, eval_BENCH.json: rows in the trainer's own schema (rows.py)."""

from collections.abc import Mapping
from typing import Any

from ..errors import BadRow
from .questions import Draft, Rule

_RULES: dict[str, Rule] = {
    "multiple choice": "choice", "numerical": "open", "regression": "number", "OCR": "open",
    "free-form": "open",
}  # fmt: skip
# What is read of a row; other fields, say the score of an output that is kept with it, are not the schema's.
KEYS = ("problem", "data_type", "problem_type", "options", "solution", "references", "path", "data_source")
TASK_KEYS = ("question_type", "original_question_type", "task", "data_source", "problem_type")


def draft(raw: Mapping[str, Any], bench: str, number: int) -> Draft:
    """A task is the row's `question_type`, `original_question_type`, `task`, `data_source` or problem type.

    A path may begin with "/" or "./"; both are taken below the folder. Every number of VSI-Bench is scored by
    its relative error, whatever the problem type.
    """
    row_id, kind = raw.get("problem_id", raw.get("id", number)), raw.get("problem_type")
    if not isinstance(kind, str) or kind not in _RULES:
        raise BadRow(f"row {row_id}: problem_type {kind!r}, expected one of {', '.join(_RULES)}")
    row = {key: raw[key] for key in KEYS if raw.get(key) is not None} | {"problem_id": row_id}
    if isinstance(raw.get("path"), str):
        row["path"] = raw["path"].lstrip("/")
    task = next(raw[key] for key in TASK_KEYS if isinstance(raw.get(key), str) and raw[key])
    is_number = bench == "vsibench" and kind == "numerical"
    return Draft(row, task, "number" if is_number else _RULES[kind])
