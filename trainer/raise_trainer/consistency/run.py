"""`raise-core consistency`: answers to a judge, to figures, to a page."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..chat_client import ChatClient
from ..errors import UserError
from ..logbook import Logbook
from .analysis import Analysis, confidence_analysis
from .discrimination import Discrimination, discrimination, recorded_rewards
from .judges import Judge, ModelJudge, ServerJudge
from .judging import Consistency, Judged, ask_judge, consistency, judged
from .match import THRESHOLD
from .records import Answer, read_answers, rows_of, scored_rewards
from .report import tables, write_page

STRICT = ("multiple choice", "numerical")  # right or wrong: their groups can be all right


@dataclass(frozen=True)
class Settings:
    """What the command was asked for.

    files: of answers, or folders of them; each is an arm. judge: Hugging Face id, folder, or address of an
    OpenAI-compatible server. judge_model: its name there. data: rows that a training run's completions are
    of. threshold: text score from which on an answer is right, and two answers in words are one.
    key_variable: environment variable with the server's key. resamples: of the intervals. rewards: names,
    and files of `raise-core score` with these rewards of the only arm's completions.
    """

    files: tuple[Path, ...]
    judge: str
    out: Path
    judge_model: str = ""
    data: tuple[Path, ...] = ()
    threshold: float = THRESHOLD
    max_new_tokens: int = 256
    batch: int = 16
    dtype: str = "bfloat16"
    parallel: int = 8
    timeout: float = 120.0
    retries: int = 5
    key_variable: str = "OPENAI_API_KEY"
    resamples: int = 1000
    rewards: tuple[tuple[str, Path], ...] = ()


@dataclass(frozen=True)
class Arm:
    """What was found of one file. kinds: its benchmarks or problem types, then all. rewards: by name."""

    answers: int
    left_out: dict[str, int]
    kinds: list[Consistency]
    analysis: Analysis
    rewards: dict[str, Discrimination]


def run_consistency(settings: Settings, *, console: Console | None = None) -> dict[str, Arm]:
    """Judge the answers of all files and write consistency.json, judged.jsonl, figures and the page to `out`.

    Replies are kept in `out`/replies.jsonl: a command that was stopped goes on where it was. UserError for
    what a user can mend.
    """
    if settings.rewards and len(settings.files) > 1:
        raise UserError("--rewards: are those of one file of answers, and there are several; name one")
    rows = rows_of(settings.data)
    read = {
        name: read_answers(file, rows, threshold=settings.threshold)
        for name, file in arm_names(settings.files).items()
    }
    for name, (answers, left_out) in read.items():
        if not answers:
            raise UserError(f"{name}: none of its answers can be used; {next(iter(left_out))}")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {settings.out}: {error.strerror}; name another folder") from None
    log = Logbook(settings.out, console)
    judge = judge_of(settings)
    replies, refused = ask_judge([a for answers, _ in read.values() for a in answers], judge, log)
    found = {
        name: [judged(a, replies, refused, threshold=settings.threshold) for a in answers]
        for name, (answers, _) in read.items()
    }
    arms = {
        name: arm_of(some, read[name][1], settings.resamples, scored=settings.rewards)
        for name, some in found.items()
    }
    _write(settings, found, arms)
    _say(log, settings, arms, refused)
    return arms


def arm_names(files: Sequence[Path]) -> dict[str, Path]:
    """Short names of files: the folder's, with the file's where a folder has several. UserError if equal."""
    folder_of = {file: file.resolve() if file.is_dir() else file.resolve().parent for file in files}
    folders = Counter(folder_of.values())
    names: dict[str, Path] = {}
    for file in files:
        folder = folder_of[file]
        name = folder.name if folders[folder] == 1 else f"{folder.name}/{file.stem}"
        if name in names:
            raise UserError(f"{file}, {names[name]}: both would be called {name}; rename a folder")
        names[name] = file
    return names


def judge_of(settings: Settings) -> Judge:
    """The judge that `settings` names. UserError for a server without a model's name."""
    cache = settings.out / "replies.jsonl"
    if not settings.judge.startswith(("http://", "https://")):
        return ModelJudge(
            settings.judge, cache, max_new_tokens=settings.max_new_tokens, batch=settings.batch,
            dtype=settings.dtype,
        )  # fmt: skip
    if not settings.judge_model:
        raise UserError(f"--judge {settings.judge}: a server has models by name; name one with --judge-model")
    client = ChatClient(
        settings.judge, settings.judge_model, cache, key=ChatClient.key_of(settings.key_variable),
        timeout=settings.timeout, retries=settings.retries,
    )  # fmt: skip
    return ServerJudge(client, max_new_tokens=settings.max_new_tokens, parallel=settings.parallel)


def arm_of(
    some: Sequence[Judged],
    left_out: Mapping[str, int],
    resamples: int,
    *,
    scored: Sequence[tuple[str, Path]] = (),
) -> Arm:
    """All figures of judged answers, one or more. scored: rewards by name, and the files they are in."""
    kinds = list(dict.fromkeys(j.of.kind for j in some))
    parts = [consistency(kind, [j for j in some if j.of.kind == kind], resamples=resamples) for kind in kinds]
    if len(kinds) > 1:
        parts.append(consistency("all", some, resamples=resamples))
    known = [j.of.confidence for j in some]
    analysis = confidence_analysis(
        [j.of.right for j in some],
        [j.match for j in some],
        _or_nan([c.answer for c in known]),
        _or_nan([c.sequence for c in known]),
        _or_nan([c.min_p for c in known]),
        [j.of.video for j in some],
        resamples=resamples,
    )
    return Arm(len(some), dict(left_out), parts, analysis, _rewards(some, resamples, scored))


def _or_nan(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _rewards(
    judged_all: Sequence[Judged], resamples: int, scored: Sequence[tuple[str, Path]]
) -> dict[str, Discrimination]:
    """Of the questions that are right or wrong; {} where none was sampled twice."""
    some = [j for j in judged_all if j.of.row is not None and j.of.row.problem_type in STRICT]
    answers: list[Answer] = [j.of for j in some]
    groups = [a.group for a in answers]
    if not groups or max(Counter(groups).values()) < 2:
        return {}
    rewards = recorded_rewards(
        [a.confidence for a in answers], [a.score for a in answers], groups, [a.is_gold for a in answers]
    )
    rewards |= {name: scored_rewards(file, answers) for name, file in scored}
    return {
        name: discrimination(
            values, np.array([j.match for j in some]), np.array([a.right for a in answers]), groups,
            [a.video for a in answers], known=np.array([j.known for j in some]), resamples=resamples,
        )
        for name, values in rewards.items()
    }  # fmt: skip


def _write(settings: Settings, found: Mapping[str, Sequence[Judged]], arms: Mapping[str, Arm]) -> None:
    lines = [_line(name, j) for name, some in found.items() for j in some]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    judge = settings.judge_model or settings.judge
    values = {
        "judge": judge,
        "threshold": settings.threshold,
        "arms": {n: asdict(a) for n, a in arms.items()},
    }
    try:
        (settings.out / "judged.jsonl").write_text(text, encoding="utf-8")
        (settings.out / "consistency.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {settings.out}: cannot be written ({error.strerror})") from None
    write_page(settings.out, arms, judge=judge, threshold=settings.threshold)


def _line(arm: str, j: Judged) -> dict[str, Any]:
    a = j.of
    return {
        "arm": arm, "line": a.line, "id": a.id, "kind": a.kind, "task": a.task, "sample": a.sample,
        "video": a.video, "answer": a.answer, "score": a.score, "right": a.right, "judge_answer": j.answer,
        "judge_score": j.score, "judge_reason": j.reason, "match": j.match, "why": j.why,
    }  # fmt: skip


def _say(log: Logbook, settings: Settings, arms: Mapping[str, Arm], refused: Mapping[str, str]) -> None:
    for title, header, rows in tables(arms):
        log.table(title, header, rows, texts=2)
    for name, arm in arms.items():
        for reason, count in list(arm.left_out.items())[:5]:
            log.say(f"left out of {name}: {count}: {reason}")
    for reason in list(dict.fromkeys(refused.values()))[:5]:
        log.say(f"not asked: {reason}")
    log.say(f"Page: {settings.out / 'consistency.html'}")
