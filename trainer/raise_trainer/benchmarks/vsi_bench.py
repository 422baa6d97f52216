"""VSI-Bench (nyu-visionx/VSI-Bench): test.jsonl or parquet; videos in DATASET/SCENE.mp4.

Row: id, dataset, scene_name, question_type, question, options (null for numbers), ground_truth.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .questions import Draft, choice_row, lettered, plain_row, text_of

FILES = {"": ("test",)}
DIRECTIONS = "object_rel_direction_"  # easy, medium and hard are one task of the eight


def draft(raw: Mapping[str, Any], label: str, number: int, root: Path) -> Draft:
    """Multiple choice where there are options, else a number."""
    row_id, task = text_of(raw, "id"), text_of(raw, "question_type")
    path = f"{text_of(raw, 'dataset')}/{text_of(raw, 'scene_name')}.mp4"
    problem, truth = text_of(raw, "question"), text_of(raw, "ground_truth")
    if raw.get("options"):
        row = choice_row(row_id, problem, lettered(raw["options"]), truth, path, "vsibench")
        return Draft(row, task, "choice")
    return Draft(plain_row(row_id, problem, "regression", truth, path, "vsibench"), task, "number")


def group(task: str) -> str:
    """The task of the macro mean of a question type: easy, medium and hard are averaged first."""
    return DIRECTIONS.rstrip("_") if task.startswith(DIRECTIONS) else task
