"""The chain of a completion, and when two answers to one question agree."""

import re
from typing import Literal

from raise_core.graders import GRADERS, numerical, option_letter
from raise_core.tags import Reason, answer_in, last_pair
from raise_core.verify import MAX_CHARACTERS, canonical_kind

from ..benchmarks.extraction import extract
from ..benchmarks.official import RULES
from ..benchmarks.questions import Question
from ..benchmarks.scoring import grade
from ..rows import Row

Disagreement = Literal["unreadable", "judge_unreadable", "differs"]
THRESHOLD = 0.5  # of a text score, from which on two answers in words count as one (ours)
_LETTER = re.compile(r"\(?\s*[A-Za-z]\s*[).:]\s*")


def chain_of(text: str) -> str:
    """What stands in the last complete `<think>…</think>` before the last complete answer; "" without one.

    Where no `<think>` is there, as after a prompt that ends with it, the chain is all before `</think>`.
    Without an answer, the last complete pair of the whole text.
    """
    answer = last_pair(text)
    before = text[: answer[0]] if answer else text
    chain, missing = answer_in(before, "<think>", "</think>")
    if missing is not None and "<think>" not in before and "</think>" in before:
        return before[: before.rfind("</think>")].strip()
    return chain


def chosen_option(answer: str, options: tuple[str, ...]) -> str | None:
    """The letter of the option an answer names, a capital; None when it names none of them.

    By its letter ("B", "(B)", "B. red"), or by the option's words but for case and white space. Options
    without letters are A, B, … in their order. Without options any letter counts.
    """
    offered = {option_letter(option) or chr(ord("A") + i): option for i, option in enumerate(options)}
    letter = option_letter(answer)
    if letter is not None and (letter in offered or not offered):
        return letter
    for name, option in offered.items():
        words = _LETTER.sub("", option, count=1) if option_letter(option) else option
        if _folded(answer) in (_folded(option), _folded(words)):
            return name
    return None


def answer_of(row: Row, text: str) -> tuple[str, Reason | None]:
    """The answer of an output, "" and the reason where there is none.

    A benchmark's question: as its evaluation reads it (`benchmarks.extraction.extract`), without tags too.
    Other rows: inside the last complete `<answer>…</answer>`.
    """
    if isinstance(row, Question):
        found = extract(text)
        return found.text, None if found.text else found.reason or "empty"
    return answer_in(text)


def score_of(row: Row, text: str) -> float:
    """What an output is worth in [0, 1]: by the benchmark's official rule, or `raise_core.verify`."""
    return (
        grade(row, text, ("official",)).scores["official"]
        if isinstance(row, Question)
        else row.text_score(text)
    )


def disagreement(
    row: Row, original: str, judged: str, *, threshold: float = THRESHOLD
) -> Disagreement | None:
    """Why two answers to a row's question, neither empty, are no match; None when they are one.

    An option (multiple choice, and a benchmark's yes or no and captions): the same one. A number (numerical,
    regression): the same as `verify` compares numerical ones, the original being the solution: two decimals,
    or two significant digits below 0.1; two different units differ. Words (OCR, free-form): two numbers as
    above; else the same text but for case and white space, or a text score of the judge's answer against the
    original of at least `threshold`. "unreadable": the original names no option, or is no number;
    "judge_unreadable": the judge's. A benchmark's answers are read as its official rule reads them.
    """
    kind = canonical_kind(row.problem_type)
    one, other = original[:MAX_CHARACTERS], judged[:MAX_CHARACTERS]
    if isinstance(row, Question) and row.rule != "open":
        one, other = (RULES[row.rule](row, text)[1] for text in (one, other))
    elif kind == "multiple_choice":
        one, other = (chosen_option(text, row.options) or "" for text in (one, other))
    if not one or not other:
        return "judge_unreadable" if one else "unreadable"
    if one == other:
        return None
    if kind == "multiple_choice":
        return "differs"
    graded = numerical(other, [one])
    if kind in ("numerical", "regression") or not isinstance(graded, str):
        if isinstance(graded, str):
            return "unreadable" if graded == "bad_solution" else "judge_unreadable"
        return None if graded == 1.0 else "differs"
    if _folded(one) == _folded(other):
        return None
    graded = GRADERS[kind](other, [one])
    return None if not isinstance(graded, str) and graded >= threshold else "differs"


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
