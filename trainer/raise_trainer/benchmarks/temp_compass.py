"""TempCompass (lmms-eval/TempCompass): multi-choice, yes_no, caption_matching; videos in [videos/]ID.mp4.

Row: video_id, question (options on lines of its own), answer, dim (one of five aspects of time). Captioning
is not read: its answers are judged by a chat model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadRow
from .questions import Draft, choice_row, plain_row, text_of

FILES = {
    "multi-choice": ("multi-choice",),
    "yes_no": ("yes_no",),
    "caption_matching": ("caption_matching",),
}
_LETTERED = re.compile(r"[A-Z]\.\s")
NAMED = re.compile(r"(?:Sentence|Caption|Option)\s+(?P<index>[A-Z]|\d+):\s*(?P<text>.+)")


def draft(raw: Mapping[str, Any], label: str, number: int, root: Path) -> Draft:
    """A task is the form of the question and its aspect, as in "yes_no, speed"."""
    video, task = text_of(raw, "video_id"), f"{label}, {text_of(raw, 'dim')}"
    row_id, question, answer = f"{label}/{number}", text_of(raw, "question"), text_of(raw, "answer")
    path = f"videos/{video}.mp4" if (root / "videos").is_dir() else f"{video}.mp4"
    if label == "yes_no":
        if answer.lower() not in ("yes", "no"):
            raise BadRow(f"row {row_id}: answer {answer[:60]!r}, expected yes or no")
        asked = f"{question}\nAnswer yes or no."
        row = plain_row(row_id, asked, "free-form", answer.lower(), path, "tempcompass")
        return Draft(row, task, "yes_no", r1_kind="multiple choice")
    lines = [line.strip() for line in question.split("\n") if line.strip()]
    pattern = _LETTERED if label == "multi-choice" else NAMED
    options = [line for line in lines[1:] if pattern.match(line)]
    if not options or len(options) + 1 != len(lines):
        raise BadRow(f"row {row_id}: expected a line with the question, then one for each option")
    if answer not in options:
        raise BadRow(f"row {row_id}: answer {answer[:60]!r} is none of the options; mend the row")
    if label == "multi-choice":
        row = choice_row(row_id, lines[0], options, answer[0], path, "tempcompass")
        return Draft(row, task, "choice")
    found = NAMED.match(answer)
    assert found is not None  # it is one of the options
    return Draft(choice_row(row_id, lines[0], options, found["index"], path, "tempcompass"), task, "caption")
