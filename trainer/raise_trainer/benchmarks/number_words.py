"""Numbers in free text, as VSI-Bench's scorer in lmms-eval reads them."""

import re
from collections.abc import Sequence

_DIGITS = re.compile(r"-?\d+(?:\.\d+)?")
_WORD = re.compile(r"[a-z]+")
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES = {
    **{word: value for value, word in enumerate(_SMALL.split())},
    **{word: 10 * value for value, word in enumerate(_TENS.split(), 2)},
    "hundred": 100,
    "thousand": 1000,
}


def first_number(text: str) -> float | None:
    """The number that comes first, in digits ("3.5 m": 3.5) or in English words ("twenty-one": 21); None.

    Units are not read, and neither are thousands' commas: "1,000" is 1, as in the published scorer.
    """
    lower = text.lower()
    digits = _DIGITS.search(lower)
    start, words = _first_words(lower)
    if digits is not None and (start is None or digits.start() < start):
        return float(digits[0])
    return None if start is None else float(value_of(words))


def _first_words(text: str) -> tuple[int | None, list[str]]:
    """Where the first run of number words begins, and its words; "and" inside a run is passed over."""
    start, words = None, list[str]()
    for match in _WORD.finditer(text):
        if match[0] in VALUES:
            start = match.start() if start is None else start
            words.append(match[0])
        elif words and match[0] != "and":
            break
    return start, words


def value_of(words: Sequence[str]) -> int:
    """Of number words, in order: three hundred twenty one is 321."""
    total = part = 0
    for word in words:
        value = VALUES[word]
        if value == 1000:
            total, part = total + max(part, 1) * 1000, 0
        elif value == 100:
            part = max(part, 1) * 100
        else:
            part += value
    return total + part
