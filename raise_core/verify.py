"""Rule-based checks of an answer against its solution, each in [0, 1]: Video-R1's five kinds of question.

The answer is the stripped text inside the last complete `<answer>…</answer>` of the completion
(raise_core/tags.py, the same rule as for spans; Video-R1 takes the first); without one the score is 0. Rules
per kind are in raise_core/graders.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raise_core import graders
from raise_core.tags import Reason, answer_in

KINDS = ("multiple_choice", "numerical", "regression", "ocr", "free_form")

MAX_CHARACTERS = 2048
"""Answers and references are cut to this length before they are graded: ROUGE-L is quadratic in words."""

VerdictReason = Reason | Literal["unparsable", "bad_solution"]
"""A span's reason, "unparsable" (the answer is no number) or "bad_solution" (the solution is unreadable)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify_details` found.

    score: in [0, 1], never NaN.
    answer: the extracted answer, cut to MAX_CHARACTERS; `""` if there is none.
    reason: why the score is 0 without a comparison, None if answer and solution were compared.
    cut: whether the answer or a reference was longer than MAX_CHARACTERS; count these.
    """

    score: float
    answer: str
    reason: VerdictReason | None
    cut: bool


def verify(kind: str, completion_text: str, solution: str | Sequence[str]) -> float:
    """Score of a completion in [0, 1]; `verify_details(...).score`, documented there."""
    return verify_details(kind, completion_text, solution).score


def verify_details(kind: str, completion_text: str, solution: str | Sequence[str]) -> Verdict:
    """Compare a completion's answer with the solution.

    kind: one of KINDS; Video-R1's spellings ("multiple choice", "free-form", "OCR") are the same.
    completion_text: the whole decoded completion, any text and any length; only its answer is graded.
    solution: "<answer>X</answer>" or X alone; for "ocr" and "free_form" also a list of references.
    Never raises for what a text holds: an answer or solution that cannot be read scores 0 with a reason.
    Raises ValueError for an unknown kind, TypeError for a completion or solution that is not text, and
    ImportError, saying what to install, if "ocr" or "free_form" lacks jiwer or rouge-score.
    """
    name = canonical_kind(kind)
    if not isinstance(completion_text, str):
        raise TypeError(
            f"completion_text: got {type(completion_text).__name__}, wanted str; decode the ids first"
        )
    references = _references(name, solution)
    answer, missing = answer_in(completion_text)
    cut = len(answer) > MAX_CHARACTERS or any(len(reference) > MAX_CHARACTERS for reference in references)
    answer = answer[:MAX_CHARACTERS]
    references = [reference[:MAX_CHARACTERS] for reference in references]
    if missing is not None:
        return Verdict(0.0, "", missing, cut)
    grade = graders.GRADERS[name](answer, references)
    if isinstance(grade, str):
        return Verdict(0.0, answer, grade, cut)
    return Verdict(grade, answer, None, cut)


def canonical_kind(kind: str) -> str:
    """The name in KINDS of a kind in any spelling; ValueError, naming the known ones, if there is none."""
    name = kind.strip().lower().replace(" ", "_").replace("-", "_") if isinstance(kind, str) else ""
    if name not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(KINDS)}")
    return name


def _references(kind: str, solution: str | Sequence[str]) -> list[str]:
    given = [solution] if isinstance(solution, str) else solution
    if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise TypeError(
            f"solution: got {type(solution).__name__}, wanted str or a list of str; use str(solution)"
        )
    if len(given) != 1 and kind not in ("ocr", "free_form"):
        raise ValueError(f"solution: got {len(given)} references, wanted one for kind {kind!r}")
    return [_bare(one) for one in given]


def _bare(solution: str) -> str:
    answer, missing = answer_in(solution)
    return answer if missing in (None, "empty") else solution.strip()
