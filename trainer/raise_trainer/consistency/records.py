"""Answers to judge: what `raise-core eval` wrote, or completions of a training run, with their questions."""

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from raise_core.tags import answer_in

from ..benchmarks.answers import UNUSABLE
from ..benchmarks.questions import Question, Rule
from ..completions import Completion
from ..errors import BadRow, UserError
from ..json_lines import read_json_lines
from ..row_files import RowFile
from ..rows import Row, parse_row
from .confidence import Confidence
from .match import THRESHOLD, answer_of, chain_of, score_of
from .statistics import Floats

LogProb = Annotated[float, Field(le=0.0)]  # nats
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
OPTIONS = "\nOptions:\n"  # as `Row.question` writes them
_SPLIT = re.compile(r"\n(?=[A-Z]\.|(?:Sentence|Caption|Option)\s)")  # an option may have lines of its own


class Record(BaseModel):
    """A line of an evaluation (`benchmarks.answers.Answer`), as far as it is read here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bench: str
    id: StrictStr
    sample: int
    task: str
    video: str
    problem_type: str
    question: str
    solution: str
    text: str
    reason: str | None = None
    answer_p_mean: Probability | None = None
    answer_p_min: Probability | None = None
    answer_logp_mean: LogProb | None = None
    sequence_logp_mean: LogProb | None = None


class Sampled(Completion):
    """A completion of a training run, whose text is read; log-probabilities are at most 0."""

    id: StrictInt | StrictStr
    text: str
    logp: list[LogProb] = Field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """One answered question. row: None where an evaluation could not ask it, which is an unanswered one.

    line: in its file, from 1. kind: benchmark, or problem type. group: the completions of one prompt share
    it. chain, answer: of the output, "" where there is none. score in [0, 1]; right: at least the threshold.
    is_gold: the answer's text is the solution's.
    """

    line: int
    id: int | str
    kind: str
    task: str
    sample: int
    group: Hashable
    video: str
    row: Row | None
    chain: str
    answer: str
    score: float
    right: bool
    is_gold: bool
    confidence: Confidence


def rows_of(files: Sequence[Path]) -> dict[int | str, Row | BadRow]:
    """The rows of files in the Video-R1 schema by id, or why one cannot be used; media are not looked at.

    UserError when an id stands there twice.
    """
    found: dict[int | str, Row | BadRow] = {}
    for file in files:
        rows = RowFile(file, file.parent)
        for number in range(len(rows)):
            raw: Any = None
            row: Row | BadRow
            try:
                raw = rows.raw(number)
                row = _without_media(number, raw)
            except BadRow as error:
                row = error
            row_id = raw.get("problem_id", number) if isinstance(raw, dict) else number
            if not isinstance(row_id, (int, str)):
                continue
            if row_id in found:
                raise UserError(
                    f"--data {file}: two rows have the id {row_id!r}; name the file that was used"
                )
            found[row_id] = row
    return found


def _without_media(number: int, raw: Any) -> Row:
    if not isinstance(raw, dict):
        raise BadRow(f"row {number}: got {type(raw).__name__}, expected an object in the Video-R1 schema")
    video = raw["path"] if isinstance(raw.get("path"), str) else ""
    text = {k: v for k, v in raw.items() if k != "path"} | {"data_type": "text", "data_source": video}
    return parse_row(number, text, Path())


def read_answers(
    file: Path, rows: Mapping[int | str, Row | BadRow], *, threshold: float = THRESHOLD
) -> tuple[list[Answer], Counter[str]]:
    """The answers of a file or folder, and why others are left out, with their numbers.

    file: JSON lines of an evaluation, which bring their questions (of one question and sample the last line
    counts, but none that could not be asked stands above one that could), or of a training run, whose
    questions are in `rows` by id; or the folder of either, with the answers of all its processes. threshold:
    score from which on an answer is right. UserError, naming the line, for one that is neither.
    """
    answers, left_out, place = list[Answer](), Counter[str](), dict[Hashable, int]()
    lines = ((one, *line) for one in _files(file) for line in read_json_lines(one))
    for one, number, raw in lines:
        try:
            made = (
                _evaluated(number, raw, threshold)
                if "bench" in raw
                else _sampled(number, raw, rows, threshold)
            )
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "line"
            raise UserError(
                f"{one}, line {number}: {name}: {first['msg']}; wanted an answer of raise-core eval, or a "
                "completion of a training run"
            ) from None
        except BadRow as error:
            left_out[str(error)] += 1
            continue
        key = (made.group, made.sample) if "bench" in raw else (one, number)
        if key in place:
            if made.row is not None or answers[place[key]].row is None:
                answers[place[key]] = made
        else:
            place[key] = len(answers)
            answers.append(made)
    if not answers and not left_out:
        raise UserError(f"{file}: no answer in it")
    return answers, left_out


def _files(path: Path) -> list[Path]:
    """The file itself, or the files of an evaluation's or a training run's folder."""
    if not path.is_dir():
        return [path]
    found = [path / "answers.jsonl", *sorted(path.glob("answers-*.jsonl"))]
    kept = [file for file in found if file.is_file()]
    if not kept and (path / "completions.jsonl").is_file():
        kept = [path / "completions.jsonl"]
    if not kept:
        raise UserError(f"{path}: holds neither answers.jsonl nor completions.jsonl; name another folder")
    return kept


def _evaluated(number: int, raw: Mapping[str, Any], threshold: float) -> Answer:
    record = Record.model_validate(raw)
    mean, least = record.answer_p_mean, record.answer_p_min
    logp = record.answer_logp_mean
    sequence = record.sequence_logp_mean
    known = Confidence(
        answer=None if logp is None else math.exp(logp),
        mean_p=mean,
        min_p=least,
        sequence=None if sequence is None else math.exp(sequence),
        # as likely on average as the least likely one: a single token, or all alike
        logp=(logp,) if logp is not None and mean == least else None,
    )
    row = None if record.reason in UNUSABLE else _question(record)
    place = {"kind": record.bench, "task": record.task, "sample": record.sample, "video": record.video}
    return _answer(number, record.id, (record.bench, record.id), row, record.text, known, threshold, place)


def _question(record: Record) -> Question:
    """The question as the evaluation read it. BadRow when it cannot be."""
    problem, _, options = record.question.rpartition(OPTIONS)
    has_options = record.problem_type == "multiple choice" and bool(problem)
    raw = {
        "problem_id": record.id, "problem": problem if has_options else record.question, "data_type": "text",
        "problem_type": record.problem_type, "solution": record.solution,
        "options": _SPLIT.split(options) if has_options else [],
    }  # fmt: skip
    row = parse_row(0, raw, Path())
    values = {f.name: getattr(row, f.name) for f in fields(Row)}
    return Question(
        **values, bench=record.bench, task=record.task, rule=_rule(record), r1_kind=record.problem_type,
        video=record.video,
    )  # fmt: skip


def _rule(record: Record) -> Rule:
    """How its official scorer reads answers, as the benchmarks' loaders say."""
    if record.problem_type == "multiple choice":
        return "caption" if record.task.startswith("caption_matching") else "choice"
    if record.problem_type == "regression" or (record.bench, record.problem_type) == (
        "vsibench",
        "numerical",
    ):
        return "number"
    return "yes_no" if record.task.startswith("yes_no") else "open"


def _sampled(
    number: int, raw: Mapping[str, Any], rows: Mapping[int | str, Row | BadRow], threshold: float
) -> Answer:
    c = Sampled.model_validate(raw)
    row = rows.get(c.id)
    if row is None:
        raise BadRow(f"row {c.id}: is in no file of --data; name the files that were trained on")
    if isinstance(row, BadRow):
        raise row
    start, stop = c.answer or (0, 0)
    if c.logp and not 0 <= start <= stop <= len(c.logp):
        raise BadRow(f"row {c.id}: answer {start} to {stop} of {len(c.logp)} tokens; mend line {number}")
    known = Confidence.of(c.logp, start, stop) if c.logp else Confidence()
    place = {"kind": row.problem_type, "task": "", "sample": 0, "video": row.data_source or f"row {c.id}"}
    return _answer(number, c.id, (c.id, c.step), row, c.text, known, threshold, place)


def _answer(
    line: int, row_id: int | str, group: Hashable, row: Row | None, text: str, known: Confidence,
    threshold: float, place: Mapping[str, Any],
) -> Answer:  # fmt: skip
    answer = answer_of(row, text)[0] if row is not None else ""
    score = score_of(row, text) if row is not None else 0.0
    gold, untagged = answer_in(row.solution) if row is not None else ("", None)
    return Answer(
        line=line, id=row_id, group=group, row=row, chain=chain_of(text) if row is not None else "",
        answer=answer, score=score, right=score >= threshold,
        is_gold=bool(answer) and answer == (row.solution.strip() if row and untagged else gold),
        confidence=known if answer else Confidence(sequence=known.sequence), **place,
    )  # fmt: skip


def scored_rewards(file: Path, answers: Sequence[Answer]) -> Floats:
    """Rewards [N] that `raise-core score` wrote of a training run's completions; NaN for those it left out.

    UserError for a line that is none, and for a file that is of other completions.
    """
    by_line: dict[Any, tuple[Any, float]] = {}
    for number, record in read_json_lines(file):
        reward = record.get("reward")
        if not {"line", "id", "reward"} <= record.keys() or not isinstance(reward, (int, float)):
            raise UserError(f"{file}, line {number}: is no line of raise-core score; name another file")
        by_line[record["line"]] = record["id"], float(reward)
    found = [by_line.get(a.line, (a.id, math.nan)) for a in answers]
    if any(row_id != a.id for (row_id, _), a in zip(found, answers, strict=True)):
        raise UserError(f"{file}: its lines are of other rows; score this file of completions again")
    return np.array([reward for _, reward in found])
