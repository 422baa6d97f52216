"""Video-MME (lmms-eval/Video-MME): test parquet; videos in data/VIDEOID.mp4 (.MP4, .mkv). Without subtitles.

Row: question_id, videoID, duration (short, medium, long: the tasks), domain, sub_category, task_type,
question, options, answer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .questions import Draft, choice_row, is_there, lettered, text_of

FILES = {"": ("videomme", "test")}


def draft(raw: Mapping[str, Any], label: str, number: int, root: Path) -> Draft:
    """A task is a class of length."""
    row = choice_row(
        text_of(raw, "question_id"), text_of(raw, "question"), lettered(raw.get("options")),
        text_of(raw, "answer"), _video(root, text_of(raw, "videoID")), "videomme",
    )  # fmt: skip
    return Draft(row, text_of(raw, "duration"), "choice")


def _video(root: Path, name: str) -> str:
    places = [f"{folder}{name}{end}" for folder in ("data/", "") for end in (".mp4", ".MP4", ".mkv")]
    return next((place for place in places if is_there(root / place)), places[0])
