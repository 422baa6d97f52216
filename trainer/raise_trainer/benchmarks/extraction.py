"""What a scorer reads of an output: the answer, and why there is none."""

from dataclasses import dataclass
from typing import Literal

from raise_core.tags import ANSWER_CLOSE, ANSWER_OPEN, Reason, answer_in

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

AnswerReason = Reason | Literal["unparsable", "bad_row", "bad_media"]
"""A span's reason; "unparsable": there is an answer that the question's rule cannot read; bad_row, bad_media:
the question could not be asked."""


@dataclass(frozen=True)
class Extracted:
    """text: the answer, "" if there is none. reason: of raise_core.tags, None for a complete pair of tags."""

    text: str
    reason: Reason | None


def extract(output: str) -> Extracted:
    """The text inside the last complete `<answer>…</answer>`.

    Without any answer tag ("missing") it is what follows the last `</think>`, or the whole output when
    it does not think aloud: models that were asked for the answer alone write it so. A chain of thought that
    never ends holds no answer, nor do tags that are not complete.
    """
    text, reason = answer_in(output)
    if reason != "missing":
        return Extracted(text, reason)
    _, closed, after = output.rpartition(THINK_CLOSE)
    if not closed and THINK_OPEN in output:
        return Extracted("", reason)
    return Extracted((after if closed else output).strip(), reason)


def extract_video_r1(output: str) -> str:
    """As Video-R1's evaluation reads it: inside the first pair of answer tags, else the whole output.

    In linear time: its regular expression takes minutes for an open tag before a thousand blank lines.
    """
    _, opened, rest = output.partition(ANSWER_OPEN)
    inside, closed, _ = rest.partition(ANSWER_CLOSE)
    return (inside.strip() if opened and closed else "") or output
