"""A completion token by token: colours for log-probability and entropy, the answer outlined."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from .completions import Completion

DARKEST = {"logp": 5.0, "entropy": 3.0}  # nats at which the colour is full
SHOWN = 4  # completions of a step


@dataclass(frozen=True)
class Token:
    """One token as the page draws it. low, spread: 0 to 1, how dark its two colours are."""

    text: str
    low: float
    spread: float
    note: str


@dataclass(frozen=True)
class Drawn:
    """A completion in three pieces: before, inside and after the answer."""

    completion: Completion
    before: list[Token]
    answer: list[Token]
    after: list[Token]


def draw(completion: Completion) -> Drawn:
    """A completion with its tokens; what was recorded without tokens is one piece of text without colours."""
    c = completion
    if not c.tokens:
        return Drawn(c, [Token(c.text, 0.0, 0.0, "")], [], [])
    start, stop = c.answer or (len(c.tokens), len(c.tokens))
    tokens = [_token(c, i) for i in range(len(c.tokens))]
    return Drawn(c, tokens[:start], tokens[start:stop], tokens[stop:])


def _token(c: Completion, i: int) -> Token:
    notes, low, spread = [], 0.0, 0.0
    if i < len(c.logp):
        low = _share(-c.logp[i] / DARKEST["logp"])
        notes.append(f"log-probability {c.logp[i]:.3f} nats, probability {exp(min(c.logp[i], 0.0)):.3f}")
    if i < len(c.entropy):
        spread = _share(c.entropy[i] / DARKEST["entropy"])
        notes.append(f"entropy {c.entropy[i]:.3f} nats")
    text = c.tokens[i]
    note = "; ".join([f"token {i}, {text!r}", *notes])
    return Token(text.replace("\n", "↵\n") or "·", low, spread, note)


def _share(value: float) -> float:
    """Between 0 and 1, to three digits; NaN is 1: nothing is known of such a token."""
    return round(min(max(0.0, value), 1.0), 3) if value == value else 1.0


@dataclass(frozen=True)
class Case:
    """Some completions of one prompt at one step."""

    step: int
    row_id: int | str
    prompt: str
    drawn: list[Drawn]
    of: int


def chosen(completions: Sequence[Completion]) -> list[Case]:
    """The prompt whose recorded rewards differ most, of the first step recorded and of the last one.

    Of its group the completions with the highest and the lowest rewards, at most four, best first. A group is
    the completions of one row at one step.
    """
    cases = []
    for step in dict.fromkeys((completions[0].step, completions[-1].step) if completions else ()):
        groups: dict[int | str, list[Completion]] = {}
        for c in completions:
            if c.step == step:
                groups.setdefault(c.id, []).append(c)
        row_id, group = max(groups.items(), key=lambda item: _spread(item[1]))
        ranked = sorted(group, key=lambda c: -(c.reward or 0.0))
        few = ranked if len(ranked) <= SHOWN else ranked[: SHOWN // 2] + ranked[-SHOWN // 2 :]
        cases.append(Case(step, row_id, group[0].prompt, [draw(c) for c in few], len(group)))
    return cases


def _spread(group: Sequence[Completion]) -> float:
    rewards = [c.reward or 0.0 for c in group]
    return max(rewards) - min(rewards)
