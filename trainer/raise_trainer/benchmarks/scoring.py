"""Two scorers side by side. `video_r1`: what tulerfeng/Video-R1 59d65c3 computes in src/eval_bench.py.
`official`: the benchmarks' own rules, as in lmms-eval 0.7.2 (75571cf), without chat models as judges.

Both give scores in [0, 1]. Where ours and the published code differ: docs/evaluate.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import official
from .extraction import AnswerReason, extract, extract_video_r1
from .questions import Question

SCORERS = ("video_r1", "official")


@dataclass(frozen=True)
class Graded:
    """What an output was worth.

    prediction: the answer that the official rules read, "" for none; vote: the same for answers that mean the
    same (a letter, a number, words), "" where it could not be read. reason: why it was not read, or that it
    was read without tags ("missing"). scores: in [0, 1] by scorer.
    """

    prediction: str
    vote: str
    reason: AnswerReason | None
    scores: dict[str, float]


def grade(question: Question, output: str, scorers: Sequence[str] = SCORERS) -> Graded:
    """Score an output. Never raises for what it holds."""
    found = extract(output)
    score, vote = official.RULES[question.rule](question, found.text) if found.text else (0.0, "")
    reason: AnswerReason | None = found.reason
    if found.text and not vote:
        reason = "unparsable"
    scores = {"official": score, "video_r1": video_r1(question, output)}
    return Graded(found.text, vote, reason, {name: scores[name] for name in scorers})


def video_r1(question: Question, output: str) -> float:
    """Video-R1's score of an output; OCR and free-form questions score 0 there."""
    answer, truth = extract_video_r1(output), official.gold(question)
    rule = _VIDEO_R1.get(question.r1_kind)
    return rule(answer, truth) if rule else 0.0


def _equal(answer: str, truth: str) -> float:
    return float(answer.strip() == truth.strip())


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _numerical(answer: str, truth: str) -> float:
    """Equal to two decimals; 0 where one side alone has a point or a comma."""
    pointed = ["." in text or "," in text for text in (answer, truth)]
    got, wanted = _number(answer), _number(truth)
    if pointed[0] != pointed[1] or got is None or wanted is None:
        return 0.0
    return float(round(got, 2) == round(wanted, 2))


def _regression(answer: str, truth: str) -> float:
    """Mean over thresholds .50, .55, …, .95 of [error < 1 - threshold], in fp32.

    error = |got - wanted| / (|wanted| + 1e-8); strict, so that an error of exactly a half scores 0.
    """
    got, wanted = _number(answer), _number(truth)
    if got is None or wanted is None:
        return 0.0
    a, t = torch.tensor(got, dtype=torch.float32), torch.tensor(wanted, dtype=torch.float32)
    error = (a - t).abs() / (t.abs() + 1e-8)
    thresholds = torch.arange(0.5, 0.975, 0.05, dtype=torch.float32)
    return float((error < 1 - thresholds).float().mean())


_VIDEO_R1: dict[str, Callable[[str, str], float]] = {
    "multiple choice": _equal,
    "numerical": _numerical,
    "regression": _regression,
}
