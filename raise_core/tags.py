"""Tag pairs in a text: an open tag and the first close tag after it, with no other tag between them.

Shared by the span finder and the verifiers, so that what is graded and what is scored are the same answer.

    <answer>A</answer> no: <answer>B</answer>     repeated: the last pair, "B"
    <answer>A<answer>B</answer>C</answer>         nested: the innermost pair, "B"; the last close tag is stray
    <answer>A</answer> or <answer>B               the last COMPLETE pair, "A"
    A</answer>                                    "missing": a close tag alone says nothing
    <answer>B                                     "unclosed": opened, and the text goes on to its end
    <answer>B</ans                                "truncated": the text stops inside a tag
    <answer> </answer>                            "empty": the last pair holds white space only
"""

from __future__ import annotations

from typing import Literal

ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"

Reason = Literal["missing", "empty", "unclosed", "truncated"]
"""Why there is no span: see the table at the top of this file."""


def check_tags(open: str, close: str) -> None:
    """Refuse tags that cannot delimit: empty, equal, or one inside the other (ValueError)."""
    for name, tag in (("open", open), ("close", close)):
        if not isinstance(tag, str):
            raise TypeError(
                f"{name}: got {type(tag).__name__}, wanted the tag as a str such as {ANSWER_OPEN!r}"
            )
    if not open or not close or open in close or close in open:
        raise ValueError(
            f"open={open!r}, close={close!r}: wanted two non-empty tags, neither inside the other"
        )


def last_pair(text: str, open: str = ANSWER_OPEN, close: str = ANSWER_CLOSE) -> tuple[int, int] | None:
    """Character bounds `[start, stop)` of what the last complete pair encloses, None without one.

    Three scans, so the time is linear in the text whatever it holds.
    """
    last_close = text.rfind(close)
    last_open = text.rfind(open, 0, last_close) if last_close >= 0 else -1
    if last_open < 0:
        return None
    start = last_open + len(open)
    return start, text.find(close, start)


def all_pairs(text: str, open: str, close: str) -> list[tuple[int, int]]:
    """Character bounds of what every complete pair encloses, in order; pairs never overlap. Linear time."""
    pairs: list[tuple[int, int]] = []
    seen = 0
    while (stop := text.find(close, seen)) >= 0:
        start = text.rfind(open, seen, stop)
        if start >= 0:
            pairs.append((start + len(open), stop))
        seen = stop + len(close)
    return pairs


def why_no_pair(text: str, open: str = ANSWER_OPEN, close: str = ANSWER_CLOSE) -> Reason:
    """The reason code of a text in which `last_pair` found nothing."""
    opened = open in text
    if _ends_inside(text, close if opened else open):
        return "truncated"
    return "unclosed" if opened else "missing"


def strip_bounds(text: str, start: int, stop: int) -> tuple[int, int]:
    """Bounds of `text[start:stop]` without white space (Unicode) at its ends; equal if none left."""
    inside = text[start:stop]
    start += len(inside) - len(inside.lstrip())
    return start, start + len(inside.strip())


def answer_in(text: str, open: str = ANSWER_OPEN, close: str = ANSWER_CLOSE) -> tuple[str, Reason | None]:
    """The stripped text inside the last complete pair and None, or `""` and the reason there is none."""
    pair = last_pair(text, open, close)
    if pair is None:
        return "", why_no_pair(text, open, close)
    answer = text[pair[0] : pair[1]].strip()
    return answer, None if answer else "empty"


def _ends_inside(text: str, tag: str) -> bool:
    return any(text.endswith(tag[:n]) for n in range(1, len(tag)))
