"""The benchmarks' own rules: an answer's text to a score, and to what it votes for.

A rule takes the text inside the answer tags (`extraction.extract`), never empty. A letter counts where it
stands for an option ("B", "(B)", "B. red", "**B**", a LaTeX box), not as a word or in one: "A man walks"
chooses nothing.
"""

import math
import re
from collections.abc import Callable

import numpy as np

from raise_core.graders import option_letter, parse_number
from raise_core.tags import answer_in

from .number_words import first_number
from .questions import Question, Rule
from .temp_compass import NAMED

_SAID = re.compile(
    r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\**\(?\s*([A-Z])\s*\)?(?=\s*$|\s*[.,;:!*)]|\s*\n|\s+(?:because|since)\b)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")
_LETTER = re.compile(r"^\s*\(?[A-Z][.):]\s*")
_LETTER_AND_TEXT = re.compile(r"([A-Z])\W+(.+)", re.IGNORECASE | re.DOTALL)
_BOXED = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_BLANKS = re.compile(r"\s+")
_YES_NO = re.compile(r"(yes|no)\b", re.IGNORECASE)

Judged = tuple[float, str]


def gold(question: Question) -> str:
    """The solution without its tags."""
    answer, missing = answer_in(question.solution)
    return question.solution.strip() if missing else answer


def choice(question: Question, text: str) -> Judged:
    """1 for the right option's letter, or for its whole text.

    Also "the answer is B", where the letter ends a sentence or its reason follows ("because", "since"); the
    last such sentence counts.
    """
    letter, truth = chosen(question, text), gold(question)
    return float(letter != "" and letter == chosen(question, truth)), letter


def chosen(question: Question, text: str) -> str:
    """The letter of the option that a text chooses, "" for none."""
    bodies = {option_letter(o) or chr(ord("A") + i): _plain(_body(o)) for i, o in enumerate(question.options)}
    plain = _plain(text)
    first = option_letter(plain.partition("\n")[0]) or ""
    if first in bodies:
        return first
    for letter, body in bodies.items():
        if _folded(plain) == _folded(body):
            return letter
    both = _LETTER_AND_TEXT.match(plain)
    letter = both[1].upper() if both else ""
    if both and letter in bodies and _folded(both[2]) == _folded(bodies[letter]):
        return letter
    short = _BLANKS.sub(lambda blanks: "\n" if "\n" in blanks[0] else " ", plain)  # else _SAID is slow on it
    said = [s.upper() for s in _SAID.findall(short) if s.upper() in bodies]
    return said[-1] if said else ""


def _body(option: str) -> str:
    """An option's text without its letter."""
    return _LETTER.sub("", option)


def _plain(text: str) -> str:
    """Without bold type, LaTeX boxes, quotation marks around it."""
    for _ in range(2):  # \\boxed{\\text{B}}
        text = _BOXED.sub(r"\1", text)
    return text.replace("**", "").strip("*\"'` \n")


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def number(question: Question, text: str) -> Judged:
    """VSI-Bench's relative accuracy of the first number in the text, in digits or in words."""
    got, wanted = first_number(text), parse_number(gold(question))
    if got is None or wanted is None:
        return 0.0, ""
    return relative_accuracy(got, wanted.value), f"{got:g}"


def relative_accuracy(got: float, wanted: float) -> float:
    """VSI-Bench's mean relative accuracy, in fp64: mean over .50, .55, …, .95 of [error <= 1 - threshold].

    error = |got - wanted| / |wanted|. For wanted = 0, which the published scorer cannot divide by, it is 1 at
    0 and 0 elsewhere.
    """
    if not (math.isfinite(got) and math.isfinite(wanted)):
        return 0.0
    if wanted == 0:
        return float(got == 0)
    error = abs(got - wanted) / abs(wanted)
    return float((error <= 1 - np.linspace(0.5, 0.95, 10)).mean())


def open_answer(question: Question, text: str) -> Judged:
    """1 if the text holds the solution: as a number to two decimals, else word for word.

    Case and white space do not count. The published rules then ask a chat model (MMVU); this one does not, so
    that other wordings of a right answer score 0.
    """
    truth, said = gold(question), _folded(text)
    wanted = parse_number(truth)
    if wanted is not None:
        found = [float(n.replace(",", "")) for n in _NUMBER.findall(text.replace("\u2212", "-"))]
        return float(any(round(n, 2) == round(wanted.value, 2) for n in found)), said
    holds = re.search(rf"(?<!\w){re.escape(_folded(truth))}(?!\w)", said)
    return float(holds is not None), said


def yes_no(question: Question, text: str) -> Judged:
    """1 if the text begins with the right one of the words yes and no."""
    found = _YES_NO.match(_plain(text))
    said = found[1].lower() if found else ""
    return float(said == gold(question).lower()), said


def caption(question: Question, text: str) -> Judged:
    """1 for the right sentence: itself, with or without its name, or its index ("Sentence B", "B")."""
    plain = _plain(text)
    said = _folded(plain)
    for option in question.options:
        found = NAMED.match(option)
        if found is None:
            continue
        name, index = option.partition(":")[0], found["index"]
        bare = (option, found["text"], name, index, f"({index})", f"{index})")
        forms = {
            _folded(_plain(form)) for form in (*bare, *(f"{index}{mark} {found['text']}" for mark in ".:)"))
        }
        if said in forms or option_letter(plain) == index:
            return float(index == gold(question)), index
    return 0.0, ""


RULES: dict[Rule, Callable[[Question, str], Judged]] = {
    "choice": choice,
    "number": number,
    "open": open_answer,
    "yes_no": yes_no,
    "caption": caption,
}
"""Score and vote of an answer, by `Question.rule`."""
