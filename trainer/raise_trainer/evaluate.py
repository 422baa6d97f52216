"""Held-out accuracy, Match and confidence of a model in the demo world."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import raise_core as rc
from raise_core.tags import answer_in, last_pair

from . import world
from .data import Row
from .prompts import Prompt
from .rollout import draws, sample

EVALUATION = -1  # the step of its draws


@dataclass(frozen=True)
class Answered:
    """One completion of one question, judged.

    right: a strict answer passes its rule; a description names the video's colour, shape and direction.
    match: the answer follows from the chain of thought.
    confidence: geometric mean probability of the answer's tokens under the model that wrote them; 0 without
    answer.
    """

    row: Row
    text: str
    score: float
    right: bool
    match: bool
    confidence: float


@dataclass(frozen=True)
class HeldOut:
    """Sampled answers to every held-out question, in the order of the questions, and the means over them.

    `figures` is `summary` of the answers, and accuracy and Match of greedy decoding as `*_greedy`.
    """

    answered: list[Answered]
    figures: dict[str, float]


def judge(row: Row, text: str) -> tuple[bool, bool]:
    """(right, match) of a completion; the chain is the last one before the answer."""
    task = world.task_of(row.data_source)
    answer = answer_in(text)[0]
    bounds = last_pair(text)
    chain = answer_in(text[: bounds[0]], "<think>", "</think>")[0] if bounds else ""
    if row.strict:
        right = row.text_score(text) == 1.0
    else:
        truth = world.answer_claim(task, answer_in(row.solution)[0], ())
        right = answer != "" and world.answer_claim(task, answer, ()) == truth
    return right, world.answer_follows_chain(task, chain, answer, row.options)


def evaluate(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    samples: int,
    temperature: float,
    seed: int = 0,
    batch: int = 64,
    advance: Callable[[int], None] = lambda _: None,
    **sampling: Any,
) -> list[Answered]:
    """`samples` completions of every prompt, judged, in the order of the prompts."""
    model.eval()
    answered = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        places = [(EVALUATION, start + i) for i in range(len(some))]
        taken = draws(seed, places, samples, sampling["max_new_tokens"]) if temperature else None
        rollout = sample(model, some, group_size=samples, temperature=temperature, draws=taken, **sampling)
        found = rc.find_answer_spans(rollout.completions, tokenizer)
        for ids, logp, p, span in zip(rollout.completions, rollout.logp, rollout.owner, found, strict=True):
            row, text = some[p].row, tokenizer.decode(ids)
            right, match = judge(row, text)
            confidence = float(logp[span.start : span.stop].mean().exp()) if span.reason is None else 0.0
            answered.append(Answered(row, text, row.text_score(text), right, match, confidence))
        advance(len(some))
    return answered


def summary(answered: Sequence[Answered]) -> dict[str, float]:
    """Means over all completions; accuracy also by kind of question and by task."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    strict = [a for a in answered if a.row.strict]
    figures = {
        "accuracy": mean([a.right for a in answered]),
        "match": mean([a.match for a in answered]),
        "confidence": mean([a.confidence for a in answered]),
        "confidence_right": mean([a.confidence for a in answered if a.right]),
        "confidence_wrong": mean([a.confidence for a in answered if not a.right]),
        "text_score": mean([a.score for a in answered]),
        "accuracy_strict": mean([a.right for a in strict]),
        "accuracy_open": mean([a.right for a in answered if not a.row.strict]),
    }
    for source in sorted({a.row.data_source for a in answered}):
        some = [a for a in answered if a.row.data_source == source]
        figures[f"accuracy/{source.split('/')[-1]}"] = mean([a.right for a in some])
        figures[f"match/{source.split('/')[-1]}"] = mean([a.match for a in some])
    return figures
