"""The rules behind `verify`: an answer and its references, both stripped and of bounded length, to a score.

A grader returns a score in [0, 1], or "unparsable" / "bad_solution" if there was nothing to compare. Where a
rule differs from Video-R1's (tulerfeng/Video-R1, its training reward) the docstring says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Grade = float | Literal["unparsable", "bad_solution"]

# A letter alone, in brackets, or before . ) or : and a gap; "A ball" and "Blue" are words.
_OPTION = re.compile(r"\(\s*([A-Za-z])\s*\)|([A-Za-z])(?:\s*$|\s*[):]|\.(?:\s|$))")

_NUMBER = re.compile(
    r"[$€£¥]?[ \u00a0]*"
    r"(?P<value>[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,9})?)"
    r"(?:[ \u00a0]*(?P<unit>[^\W\d_]{1,16}(?:/[^\W\d_]{1,16})?[²³]?|[%°]))?"
    r"[ \u00a0]*\.?"
)


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number and the unit behind it ("" if none, "%" for per cent)."""

    value: float
    unit: str


def option_letter(text: str) -> str | None:
    """The option that "B", "(B)", "B.", "b) red", "B. red" or "B: red" names, a capital; None for "Blue"."""
    match = _OPTION.match(text)
    return (match[1] or match[2]).upper() if match else None


def parse_number(text: str) -> Number | None:
    """A number that is the whole of a text, or None.

    Read: sign, thousands in groups of three ("1,000"), decimals, exponent ("-2e3"), a currency sign in front,
    one unit word behind ("3.5 m", "12 km/h", "50 %"), a full stop. Refused: "nan", "inf", what overflows,
    "1,00", other words around the number, several numbers, control characters.
    """
    match = _NUMBER.fullmatch(text.replace("\u2212", "-"))
    if match is None:
        return None
    value = float(match["value"].replace(",", ""))
    if not math.isfinite(value):
        return None
    unit = (match["unit"] or "").lower()
    return Number(value, "%" if unit in ("percent", "pct") else unit)


def multiple_choice(answer: str, references: Sequence[str]) -> Grade:
    """1 if both choose the same option letter, or if they are the same text but for case and white space.

    Video-R1 wants equal strings, so that "B." is wrong where the solution is "B".
    """
    if not references[0]:
        return "bad_solution"
    wanted = option_letter(references[0])
    if wanted is not None and option_letter(answer) == wanted:
        return 1.0
    return float(_folded(answer) == _folded(references[0]))


def numerical(answer: str, references: Sequence[str]) -> Grade:
    """1 if the numbers agree to two decimals, or to two significant digits where that is finer (below 0.1).

    A unit on one side only is ignored; two different units are wrong. Per cent is a unit: "50%" is 50, not
    0.5. Video-R1 rounds to two decimals always (0.001 is then 0.004), takes commas out anywhere ("3,5" is
    35), and calls the answer wrong if only one side has a point or a comma ("3.0" for "3", "1,000" for
    "1000").
    """
    numbers = _two_numbers(answer, references[0])
    if isinstance(numbers, str):
        return numbers
    got, wanted = numbers
    if _units_differ(got, wanted):
        return 0.0
    size = abs(wanted.value)
    digits = 1 - math.floor(math.log10(size)) if 0.0 < size < 0.1 else 2
    return float(round(got.value, digits) == round(wanted.value, digits))


def regression(answer: str, references: Sequence[str]) -> Grade:
    """`1 - min(|got - wanted| / |wanted|, 1)`; for wanted = 0 it is 1 at 0 and 0 elsewhere.

    Units as in `numerical`. Video-R1 adds 1e-9 above and below, so that the right answer to a solution of 0
    scores 0 there.
    """
    numbers = _two_numbers(answer, references[0])
    if isinstance(numbers, str):
        return numbers
    got, wanted = numbers
    if _units_differ(got, wanted):
        return 0.0
    if got.value == wanted.value:
        return 1.0
    error = abs(got.value - wanted.value)
    return 1.0 - min(error / abs(wanted.value), 1.0) if wanted.value else 0.0


def ocr(answer: str, references: Sequence[str]) -> Grade:
    """The best of `max(0, 1 - WER)` over the references; words are split at white space, case counts."""
    wer = _word_error_rate()
    words = " ".join(answer.split())
    wanted = [" ".join(reference.split()) for reference in references]
    scores = [1.0 - float(wer(one, words)) for one in wanted if one]
    return min(max(0.0, *scores), 1.0) if scores else "bad_solution"


def free_form(answer: str, references: Sequence[str]) -> Grade:
    """Mean over the references of the mean F of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming.

    As in Video-R1 a right answer of one word scores 2/3: it has no bigram. The mean is taken over references
    because repeating the best one word for word would score 1, and a group of such answers leaves IGSR no
    headroom; the mean rewards what the references agree on, and right answers stay apart. rouge-score reads
    ASCII letters and digits only: text in other scripts has no words for it and scores 0.
    """
    scorer = _rouge()
    wanted = [reference for reference in references if reference]
    if not wanted:
        return "bad_solution"
    scores = [score.fmeasure for reference in wanted for score in scorer.score(reference, answer).values()]
    return min(max(sum(scores) / len(scores), 0.0), 1.0)


GRADERS: dict[str, Callable[[str, Sequence[str]], Grade]] = {
    "multiple_choice": multiple_choice,
    "numerical": numerical,
    "regression": regression,
    "ocr": ocr,
    "free_form": free_form,
}
"""Grader of each kind."""


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _two_numbers(answer: str, solution: str) -> tuple[Number, Number] | Literal["unparsable", "bad_solution"]:
    wanted = parse_number(solution)
    if wanted is None:
        return "bad_solution"
    got = parse_number(answer)
    return "unparsable" if got is None else (got, wanted)


def _units_differ(got: Number, wanted: Number) -> bool:
    return bool(got.unit) and bool(wanted.unit) and got.unit != wanted.unit


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(_INSTALL.format(kind="free_form", package="rouge-score")) from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


@cache
def _word_error_rate() -> Callable[[str, str], float]:
    try:
        from jiwer import wer
    except ImportError as error:
        raise ImportError(_INSTALL.format(kind="ocr", package="jiwer")) from error
    return wer  # type: ignore[no-any-return]


_INSTALL = "kind {kind!r} needs {package}, which is not installed: pip install -e '.[train]'"
