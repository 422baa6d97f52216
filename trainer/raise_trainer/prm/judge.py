"""What a judge of reasoning steps is asked, and how its replies are read."""

import base64
import json
import mimetypes
import re
from pathlib import Path
from typing import Any

from raise_core.chain import Step

from ..rows import LABELS, Row

INSTRUCTION = """\
You judge the steps of a solution to a question. For each step decide:
"good": it is correct and brings the solution forward;
"neutral": it is not wrong, but does not help;
"bad": it holds a mistake, contradicts the picture or an earlier step, or leads away from the answer.
{answer_rule}Reply with one JSON object and nothing else: {{"labels": [{count} labels, in order]}}."""
ANSWER_RULE = (
    'The last thing to judge is the answer itself: "good" if it agrees with the reference, else "bad".\n'
)
_OBJECT = re.compile(r"\{[^{}]*\}")


class Unreadable(Exception):
    """A reply that holds no labels, or not as many as there are steps."""


def messages_for(row: Row) -> list[dict[str, Any]]:
    """The chat that asks for labels of a row's steps, and of its answer if it has one.

    An image goes along; the frames of a video do not, so that its judge has the reference answer alone.
    """
    count = len(row.steps) + bool(row.answer)
    steps = [f"Step {i}: {_said(step)}" for i, step in enumerate(row.steps, 1)]
    if row.answer:
        steps.append(f"Answer: {row.answer}")
    parts = [f"Question: {row.question}", f"Reference answer: {row.solution}", *steps]
    text: Any = "\n\n".join(parts)
    if row.data_type == "image" and row.path is not None:
        text = [
            {"type": "image_url", "image_url": {"url": _data_url(row.path)}},
            {"type": "text", "text": text},
        ]
    rule = ANSWER_RULE if row.answer else ""
    system = INSTRUCTION.format(answer_rule=rule, count=count)
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def _said(step: Step) -> str:
    parts = [f"{step.name}." if step.name else "", step.thought, step.reflection]
    return " ".join(part for part in parts if part)


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def read_labels(reply: str, count: int) -> list[str]:
    """The labels of a reply, `count` of good, neutral and bad. Raises Unreadable; nothing is guessed."""
    for found in reversed(_OBJECT.findall(reply)):
        try:
            labels = json.loads(found).get("labels")
        except ValueError:
            continue
        if isinstance(labels, list):
            words = [word.strip().lower() if isinstance(word, str) else "" for word in labels]
            if len(words) == count and all(word in LABELS for word in words):
                return words
            raise Unreadable(f"labels {str(labels)[:80]} for {count} things to judge")
    raise Unreadable(f"no labels in {reply[:80]!r}")
