"""One question of a benchmark: a row that a model can be asked, with what its scorers need to know."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import BadRow
from ..rows import Row, parse_row
from .clips import Clip

Rule = Literal["choice", "number", "open", "yes_no", "caption"]


@dataclass(frozen=True)
class Draft:
    """What a loader makes of a published row.

    row: in the schema of rows.py. task: the table's line it counts in. rule: how the official scorer reads
    answers (`scoring`). r1_kind: the kind of question for Video-R1's scorer, the row's problem type when "".
    clip: the part of the video that is shown.
    """

    row: dict[str, Any]
    task: str
    rule: Rule
    r1_kind: str = ""
    clip: Clip | None = None


@dataclass(frozen=True)
class Question(Row):
    """A row with its place in a benchmark; fields as in `Draft`.

    number: its place in the benchmark's files, from 0; the draws of its samples follow from it. video: file
    under the data folder; questions about one video are not independent.
    """

    bench: str = ""
    number: int = 0
    task: str = ""
    rule: Rule = "choice"
    r1_kind: str = ""
    video: str = ""
    clip: Clip | None = None

    @property
    def id(self) -> str:
        """Its id, unique in the benchmark."""
        return str(self.problem_id)


@dataclass(frozen=True)
class Refused:
    """A row that cannot be asked; it counts as unanswered. reason names the row."""

    id: str
    bench: str
    number: int
    task: str
    video: str
    reason: str


def question(draft: Draft, root: Path, number: int, bench: str) -> Question:
    """The question of a draft. Raises BadRow with its id."""
    row = parse_row(number, draft.row, root.resolve())
    values = {f.name: getattr(row, f.name) for f in fields(Row)}
    video = str(draft.row.get("path") or f"no video, {row.problem_id}")
    return Question(
        **values, bench=bench, number=number, task=draft.task, rule=draft.rule,
        r1_kind=draft.r1_kind or row.problem_type, video=video, clip=draft.clip,
    )  # fmt: skip


def text_of(raw: Mapping[str, Any], *keys: str) -> str:
    """The text under the first key that is there; numbers are written out. BadRow where there is none."""
    for key in keys:
        value = raw.get(key)
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, (str, int, float)) and str(value).strip():
            return str(value).strip()
    raise BadRow(f"no `{'` or `'.join(keys)}` in the row; is it this benchmark's file?")


def is_there(path: Path) -> bool:
    """Whether a path exists; False also for a name that the file system refuses."""
    try:
        return path.exists()
    except OSError:  # a name too long
        return False


def lettered(options: Any) -> list[str]:
    """Options as "A. text"; those that carry their letters already keep them. BadRow for anything else."""
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        raise BadRow(f"options {str(options)[:60]!r}: expected a list of non-empty strings")
    if len(options) > 26:
        raise BadRow(f"{len(options)} options, expected at most 26, a letter each")
    letters = [chr(ord("A") + i) for i in range(len(options))]
    if all(o.strip().startswith(f"{letter}.") for o, letter in zip(options, letters, strict=True)):
        return [o.strip() for o in options]
    return [f"{letter}. {o.strip()}" for o, letter in zip(options, letters, strict=True)]


def choice_row(
    row_id: str, problem: str, options: list[str], solution: str, path: str, source: str
) -> dict[str, Any]:
    """A multiple choice row in the schema of rows.py; solution: a letter, or what stands for one."""
    return {
        "problem_id": row_id, "problem": problem, "data_type": "video", "problem_type": "multiple choice",
        "options": options, "solution": f"<answer>{solution}</answer>", "path": path, "data_source": source,
    }  # fmt: skip


def plain_row(row_id: str, problem: str, kind: str, solution: str, path: str, source: str) -> dict[str, Any]:
    """A row without options in the schema of rows.py; kind: its problem type."""
    return {
        "problem_id": row_id, "problem": problem, "data_type": "video", "problem_type": kind,
        "solution": f"<answer>{solution}</answer>", "path": path, "data_source": source,
    }  # fmt: skip
