"""Answers of a model, one JSON line each, appended as they come: what a killed evaluation goes on from.

`answers.jsonl`, and `answers-N.jsonl` of process N. An answer's key is (bench, id, sample); of several with
one key the last counts, but none that could not be asked stands above one that could.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..json_lines import append_json_lines, drop_torn_line, read_json_lines

Key = tuple[str, str, int]
UNUSABLE = ("bad_row", "bad_media")


@dataclass(frozen=True)
class Answer:
    """One output for one question, with its scores; self-contained, so that it can be judged again.

    bench, id, sample: its key. task, video: see `questions.Question`. question: with its options, as the
    model read it but for the template. text: the output, without the end-of-sequence token; "" when the
    question could not be asked. prediction, vote, reason, scores: see `scoring.Graded`; reason "bad_row" or
    "bad_media" has its story in detail. tokens: sampled, with the end. truncated: it ran into the limit.
    Of the sampled tokens' probabilities under the model at temperature 1: answer_p_mean, answer_p_min and
    answer_logp_mean [nats] over the answer span (`rc.find_answer_spans`), answer_logp [nats] of each of its
    tokens, null without one; sequence_logp_mean [nats] over the whole output, null without a token.
    """

    bench: str
    id: str
    sample: int
    task: str
    video: str
    problem_type: str
    question: str
    solution: str
    text: str
    prediction: str
    vote: str
    reason: str | None
    detail: str
    scores: dict[str, float]
    tokens: int
    truncated: bool
    answer_p_mean: float | None = None
    answer_p_min: float | None = None
    answer_logp_mean: float | None = None
    answer_logp: list[float] | None = None
    sequence_logp_mean: float | None = None

    @property
    def key(self) -> Key:
        """What no other answer has."""
        return self.bench, self.id, self.sample

    @property
    def usable(self) -> bool:
        """Whether the question could be asked."""
        return self.reason not in UNUSABLE


class AnswerFile:
    """The answers of one process. Opening cuts off a line that a killed process left torn."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.file = folder / (f"answers-{rank}.jsonl" if rank else "answers.jsonl")
        drop_torn_line(self.file)

    def append(self, answers: Iterable[Answer]) -> None:
        """Write answers behind those that are there."""
        append_json_lines(self.file, [asdict(answer) for answer in answers])


def read_answers(folder: Path) -> dict[Key, Answer]:
    """Answers of all processes by key, one of each. UserError naming a line that is no answer."""
    found = dict[Key, Answer]()
    names = [folder / "answers.jsonl", *sorted(folder.glob("answers-*.jsonl"))]
    for file in names:
        if file.is_file():
            for number, record in read_json_lines(file):
                answer = _answer(file, number, record)
                before = found.get(answer.key)
                if before is None or answer.usable or not before.usable:
                    found[answer.key] = answer
    return found


_NAMES = {f.name for f in fields(Answer)}


def _answer(file: Path, number: int, record: Mapping[str, Any]) -> Answer:
    try:
        return Answer(**record)
    except TypeError:
        odd = sorted(_NAMES ^ set(record))
        raise UserError(
            f"{file}, line {number}: is no answer of this version (fields {', '.join(odd)}); "
            "name another folder"
        ) from None


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what the answers of a folder depend on, or compare with what is there.

    UserError for a folder that holds something else, and naming each setting that differs.
    """
    file = folder / "settings.json"
    try:
        if not file.is_file():
            if folder.is_dir() and any(other != _beside(file) for other in folder.iterdir()):
                raise UserError(f"--out {folder}: holds something that is no evaluation; name another folder")
            folder.mkdir(parents=True, exist_ok=True)
            _write(file, settings)
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError(f"holds {type(before).__name__}, expected an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be used ({error}); name another folder with --out") from None
    differ = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if before.get(name, value) != value
    ]
    if differ:
        raise UserError(
            f"--out {folder}: its answers were made otherwise: {'; '.join(differ)}; name another folder"
        )
    _write(file, before | dict(settings))


def _beside(file: Path) -> Path:
    return file.with_suffix(".tmp")


def _write(file: Path, settings: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    _beside(file).write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")
    _beside(file).replace(file)
