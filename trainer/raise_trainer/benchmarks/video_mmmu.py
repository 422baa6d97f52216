"""VideoMMMU (lmms-eval/VideoMMMU): Perception, Comprehension, Adaptation; videos in DISCIPLINE/ID.mp4.

Row: id ("validation_Art_Theory_12"), question, options, answer, question_type. The last frame of a video
shows a quiz, which belongs to the question in Adaptation alone; frames are sampled with the last one among
them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadRow
from .questions import Draft, choice_row, lettered, plain_row, text_of

FILES = {
    "perception": ("Perception", "perception"),
    "comprehension": ("Comprehension", "comprehension"),
    "adaptation": ("Adaptation", "adaptation"),
}
DISCIPLINES = {
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities": "History Literature Psychology Sociology",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
FOLDER_OF = {subject: folder for folder, subjects in DISCIPLINES.items() for subject in subjects.split()}
IGNORE_QUIZ = "The video's last frame shows a quiz; leave it out of account."
USE_IMAGE = "The picture that the question is about is at the end of the video."


def draft(raw: Mapping[str, Any], label: str, number: int, root: Path) -> Draft:
    """Multiple choice where there are options, else an open question."""
    given = text_of(raw, "id")
    subject = "_".join(given.split("_")[1:-1])
    if subject not in FOLDER_OF:
        raise BadRow(
            f"row {given}: subject {subject!r} is none of the 30; expected an id as dev_Art_Theory_1"
        )
    note = USE_IMAGE if label == "adaptation" else IGNORE_QUIZ
    problem = f"{text_of(raw, 'question')}\n{note}\n"
    row_id, path = f"{label}/{given}", f"{FOLDER_OF[subject]}/{given}.mp4"
    if raw.get("options"):
        row = choice_row(row_id, problem, lettered(raw["options"]), text_of(raw, "answer"), path, "videommmu")
        return Draft(row, label, "choice")
    row = plain_row(row_id, problem.rstrip(), "free-form", text_of(raw, "answer"), path, "videommmu")
    return Draft(row, label, "open")
