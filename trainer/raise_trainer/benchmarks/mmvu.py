"""MMVU (yale-nlp/MMVU, lmms-eval/MMVU), validation set: multiple-choice and open-ended are two tasks.

Row: id, question, question_type, choices {A: …}, answer, and video_path or video (an address that ends in
videos/SUBJECT/N.mp4).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadRow
from .questions import Draft, choice_row, plain_row, text_of

FILES = {"": ("validation", "val")}


def draft(raw: Mapping[str, Any], label: str, number: int, root: Path) -> Draft:
    """Choices without a text are no options."""
    row_id, task = text_of(raw, "id"), text_of(raw, "question_type")
    path = _video(root, text_of(raw, "video_path", "video"))
    problem, answer = text_of(raw, "question"), text_of(raw, "answer")
    if task == "multiple-choice":
        choices = raw.get("choices")
        if not isinstance(choices, Mapping):
            raise BadRow(f"row {row_id}: `choices` is {type(choices).__name__}, expected letters with texts")
        options = [f"{letter}. {text}" for letter, text in choices.items() if str(text or "").strip()]
        return Draft(choice_row(row_id, problem, options, answer, path, "mmvu"), task, "choice")
    return Draft(plain_row(row_id, problem, "free-form", answer, path, "mmvu"), task, "open")


def _video(root: Path, given: str) -> str:
    """A path as given, or of an address what follows `videos/`, below that folder where there is one."""
    if "://" not in given:
        return given
    tail = given.rsplit("/videos/", 1)[-1]
    return f"videos/{tail}" if (root / "videos").is_dir() else tail
