"""Chain-of-Step's structured chain as text and as token ids: written, read back, and marked for scoring.

    <|reasoning_start|>
    <|reasoning_step_start|>
    <|reasoning_step_name_start|>NAME<|reasoning_step_name_end|>
    <|reasoning_step_thought_start|>THOUGHT<|reasoning_step_thought_end|>
    <|reasoning_step_reflection_start|>REFLECTION<|reasoning_step_reflection_end|>
    <|reasoning_step_end|>
    <|reasoning_proceed|>
    … more steps …
    <|reasoning_end|>
    Answer:
    <|answer_start|>ANSWER<|answer_end|>

(arXiv 2509.19003, NeurIPS 2025.) Name says what the step does, thought is the reasoning, reflection ties it
to what is seen and to the steps before. A process reward model (PRM) reads a step tag after each step and
after the answer, and says there how much likelier "good" is than "bad". The answer may stand in
`<answer>…</answer>` instead, which is what verifiers and answer spans look for by default.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from raise_core.pieces import TokenizerLike, lay_out
from raise_core.spans import STEP_CLOSE, STEP_OPEN
from raise_core.tags import ANSWER_CLOSE, ANSWER_OPEN, Reason, all_pairs, answer_in, last_pair

START, END = "<|reasoning_start|>", "<|reasoning_end|>"
PROCEED, BACKTRACK = "<|reasoning_proceed|>", "<|reasoning_backtrack|>"
CHAIN_ANSWER_OPEN, CHAIN_ANSWER_CLOSE = "<|answer_start|>", "<|answer_end|>"
PARTS = ("name", "thought", "reflection")
STEP_TAG, GOOD, BAD = "ки", "к+и", "к-и"  # Cyrillic, as published: they are part of trained tokenizers

DESCRIPTIONS = {
    START: "start of the reasoning",
    END: "end of the reasoning",
    PROCEED: "proceed to the next reasoning step",
    BACKTRACK: "go back to an earlier reasoning step",
    STEP_OPEN: "start of a reasoning step",
    STEP_CLOSE: "end of the reasoning step",
    **{
        f"<|reasoning_step_{part}_{edge}|>": f"{edge} of the step's {part}"
        for part in PARTS
        for edge in ("start", "end")
    },
    CHAIN_ANSWER_OPEN: "start of the answer",
    CHAIN_ANSWER_CLOSE: "end of the answer",
    STEP_TAG: "is this step right or wrong",
    GOOD: "good, right",
    BAD: "bad, wrong",
}
"""Every special token and what it says: a new embedding starts from the mean of these words' embeddings."""
SCORE_TOKENS = (STEP_TAG, GOOD, BAD)
CHAIN_TOKENS = tuple(token for token in DESCRIPTIONS if token not in SCORE_TOKENS)

Fault = Literal[
    "missing_start", "missing_end", "no_steps", "unclosed_step", "nested_step", "stray_step_end",
    "empty_step", "missing_name", "missing_thought", "missing_reflection", "missing_proceed",
    "text_between_steps", "missing_answer", "unclosed_answer", "empty_answer", "truncated",
]  # fmt: skip
"""What is wrong with a chain; the table is in docs/steps.md."""

_KEPT = (STEP_OPEN, STEP_CLOSE, CHAIN_ANSWER_OPEN, CHAIN_ANSWER_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
_ANY_CHAIN_TOKEN = re.compile("|".join(map(re.escape, CHAIN_TOKENS)))
_ANY_TOKEN = re.compile("|".join(map(re.escape, (*CHAIN_TOKENS, *SCORE_TOKENS))))


@dataclass(frozen=True)
class Step:
    """One step. name, thought, reflection: stripped, "" where the part is not there.

    start, stop: characters of the parsed text from the step's open tag through its close tag, half open; both
    0 for a step that was not parsed.
    """

    name: str
    thought: str
    reflection: str = ""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Chain:
    """What a completion holds: its complete steps in order, its answer ("" without one), what is wrong.

    reasons: each `Fault` once, in order of discovery; () for a chain of the exact form.
    """

    steps: tuple[Step, ...]
    answer: str
    reasons: tuple[Fault, ...]

    @property
    def well_formed(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.reasons


def format_chain(
    steps: Sequence[Step],
    answer: str,
    *,
    open: str = CHAIN_ANSWER_OPEN,
    close: str = CHAIN_ANSWER_CLOSE,
) -> str:
    """The chain as text, in the form at the top of this file; `parse_chain` gives its steps and answer back.

    open, close: tags of the answer; "<answer>" and "</answer>" for the trainer's own data and verifiers.
    Raises ValueError for a field that holds one of the special tokens, and an answer that holds its tags.
    """
    fields = [text for step in steps for text in (step.name, step.thought, step.reflection)]
    for text in (*fields, answer):
        if (held := _ANY_CHAIN_TOKEN.search(text)) is not None:
            raise ValueError(f"steps, answer: got text that holds {held.group()!r}; remove it")
    if open in answer or close in answer:
        raise ValueError(f"answer: got {answer[:80]!r}, which holds {open!r} or {close!r}; remove it")
    blocks = [_written(step) for step in steps]
    return f"{START}\n" + f"{PROCEED}\n".join(blocks) + f"{END}\nAnswer:\n{open}{answer.strip()}{close}"


def _written(step: Step) -> str:
    parts = zip(PARTS, (step.name, step.thought, step.reflection), strict=True)
    return "\n".join([STEP_OPEN, *(_wrapped(part, text) for part, text in parts), f"{STEP_CLOSE}\n"])


def _wrapped(part: str, text: str) -> str:
    return f"<|reasoning_step_{part}_start|>{text.strip()}<|reasoning_step_{part}_end|>"


def parse_chain(text: str) -> Chain:
    """Read a chain from whatever a model wrote; never raises, whatever the text holds.

    Steps are the complete pairs that `find_step_spans` finds: a step that is opened again before it is
    closed counts from its last open tag. The answer is that of the last complete pair of the chain's answer
    tags, or without such a pair of `<answer>` tags. Text before the chain and after it is let pass. Linear in
    the text.
    """
    pairs = all_pairs(text, STEP_OPEN, STEP_CLOSE)
    steps = tuple(_step(text, *pair) for pair in pairs)
    answer, why_none = _answer(text)
    faults: dict[Fault, None] = dict.fromkeys(_frame_faults(text, steps))
    faults |= dict.fromkeys(_nesting_faults(text))
    faults |= dict.fromkeys(fault for step in steps for fault in _step_faults(step))
    faults |= dict.fromkeys(_gap_faults(text, steps))
    if why_none is not None and why_none != "truncated":
        faults[_NO_ANSWER[why_none]] = None
    if why_none == "truncated" or any(
        text.endswith(token[:n]) for token in CHAIN_TOKENS for n in range(1, len(token))
    ):
        faults["truncated"] = None
    return Chain(steps, answer, tuple(faults))


def _answer(text: str) -> tuple[str, Reason | None]:
    answer, why_none = answer_in(text, CHAIN_ANSWER_OPEN, CHAIN_ANSWER_CLOSE)
    plain, why_no_plain = answer_in(text if why_none else answer, ANSWER_OPEN, ANSWER_CLOSE)
    if why_none is None:
        return (plain, None) if why_no_plain is None else (answer, None)
    if why_no_plain in (None, "empty") or why_none == "missing":
        return plain, why_no_plain
    return "", why_none


def _answer_stop(text: str) -> int | None:
    """Where the last complete answer ends, its close tag included."""
    for open, close in ((CHAIN_ANSWER_OPEN, CHAIN_ANSWER_CLOSE), (ANSWER_OPEN, ANSWER_CLOSE)):
        pair = last_pair(text, open, close)
        if pair is not None:
            return pair[1] + len(close)
    return None


_NO_ANSWER: dict[str, Fault] = {
    "missing": "missing_answer",
    "unclosed": "unclosed_answer",
    "empty": "empty_answer",
}


def _step(text: str, start: int, stop: int) -> Step:
    inside = text[start:stop]
    name, thought, reflection = (
        answer_in(inside, f"<|reasoning_step_{part}_start|>", f"<|reasoning_step_{part}_end|>")[0]
        for part in PARTS
    )
    return Step(name, thought, reflection, start - len(STEP_OPEN), stop + len(STEP_CLOSE))


def _frame_faults(text: str, steps: Sequence[Step]) -> list[Fault]:
    faults = list[Fault]()
    if START not in text:
        faults.append("missing_start")
    if END not in text:
        faults.append("missing_end")
    if not steps:
        faults.append("no_steps")
    return faults


_STEP_EDGE = re.compile(f"{re.escape(STEP_OPEN)}|{re.escape(STEP_CLOSE)}")


def _nesting_faults(text: str) -> list[Fault]:
    faults, is_open = list[Fault](), False
    for edge in _STEP_EDGE.findall(text):
        opens = edge == STEP_OPEN
        if opens == is_open:
            faults.append("nested_step" if opens else "stray_step_end")
        is_open = opens
    return [*faults, "unclosed_step"] if is_open else faults


def _step_faults(step: Step) -> list[Fault]:
    if not (step.name or step.thought or step.reflection):
        return ["empty_step"]
    missing: list[tuple[str, Fault]] = [
        (step.name, "missing_name"),
        (step.thought, "missing_thought"),
        (step.reflection, "missing_reflection"),
    ]
    return [fault for text, fault in missing if not text]


def _gap_faults(text: str, steps: Sequence[Step]) -> list[Fault]:
    """Around the steps there is white space alone, and between two of them a token that goes on or back."""
    faults = list[Fault]()
    if not steps:
        return faults
    first, last = text.find(START), text.find(END, steps[-1].stop)
    gaps = [text[b.stop : a.start] for b, a in pairwise(steps)]
    if any(PROCEED not in gap and BACKTRACK not in gap for gap in gaps):
        faults.append("missing_proceed")
    if 0 <= first < steps[0].start:
        gaps.append(text[first : steps[0].start])
    if last >= 0:
        gaps.append(text[steps[-1].stop : last])
    if any(_ANY_TOKEN.sub("", gap).strip() for gap in gaps):
        faults.append("text_between_steps")
    return faults


@dataclass(frozen=True)
class StepTokens:
    """Token ids of the step tag and of what a PRM may say there."""

    tag: int
    good: int
    bad: int

    @classmethod
    def of(
        cls, tokenizer: TokenizerLike, tag: str = STEP_TAG, good: str = GOOD, bad: str = BAD
    ) -> StepTokens:
        """The ids of three tokens of a tokenizer. ValueError naming the first that is no token of it."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
        find: Any = getattr(backend, "token_to_id", None) or getattr(tokenizer, "get_vocab", dict)().get
        ids: list[Any] = [find(token) for token in (tag, good, bad)]
        for token, found in zip((tag, good, bad), ids, strict=True):
            if found is None:
                raise ValueError(
                    f"tokenizer: {token!r} is not one of its tokens; add them to model and tokenizer by "
                    "raise_trainer.chain_tokens.add_chain_tokens(model, tokenizer), or name the PRM's own "
                    "tag, good and bad tokens"
                )
        if len(set(ids)) < 3:
            raise ValueError(f"tag, good, bad: got {tag!r}, {good!r}, {bad!r}; wanted three different tokens")
        return cls(*map(int, ids))


@dataclass(frozen=True)
class TaggedChain:
    """Token ids of a completion with a step tag after each step and after the answer.

    positions: where the tags are in `ids`, in order. steps: how many of them follow a step; the one more, if
    there is one, follows the answer. ends: for each tag, how many tokens of the untagged completion come
    before it.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    steps: int
    ends: tuple[int, ...]


def tag_steps(
    completion_ids: Sequence[Sequence[int]], tokenizer: TokenizerLike, tokens: StepTokens
) -> list[TaggedChain]:
    """Put the step tag after the close tag of each step and of the last complete answer.

    completion_ids: B completions as `find_step_spans` takes them, whose steps these are. A tag, good or bad
    token that the model wrote itself is left out, so that no completion can score itself. A token that a
    close tag shares with what follows is in front of the tag.
    """
    own, tagged = {tokens.tag, tokens.good, tokens.bad}, list[TaggedChain]()
    for row in completion_ids:
        ends, steps = step_ends(row, tokenizer)
        kept = [j for j, i in enumerate(row) if int(i) not in own]
        out, positions, done = list[int](), [0] * len(ends), 0
        # An answer that is closed inside of a step, or before one, is scored where it stands.
        for place in sorted(range(len(ends)), key=ends.__getitem__):
            stop = bisect_left(kept, ends[place])
            out += [*(int(row[j]) for j in kept[done:stop]), tokens.tag]
            done = stop
            positions[place] = len(out) - 1
        out += [int(row[j]) for j in kept[done:]]
        tagged.append(TaggedChain(tuple(out), tuple(positions), steps, tuple(ends)))
    return tagged


def step_ends(ids: Sequence[int], tokenizer: TokenizerLike) -> tuple[list[int], int]:
    """How many tokens of a completion come up to the end of each step, and of the answer if it has one.

    The second result is the number of steps: the first one has that many entries, or one more. Linear.
    """
    layout = lay_out(ids, tokenizer, keep=_KEPT)
    stops = [stop + len(STEP_CLOSE) for _, stop in all_pairs(layout.text, STEP_OPEN, STEP_CLOSE)]
    steps, answer = len(stops), _answer_stop(layout.text)
    if answer is not None:
        stops.append(answer)
    return [layout.tokens(stop - 1, stop)[1] for stop in stops], steps
