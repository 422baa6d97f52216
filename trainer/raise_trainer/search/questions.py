"""What is kept of each question: sampled chains with their scores, and what beam search found."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..chain_judge import ChainJudge, Judged
from ..prompts import Prompt
from ..rollout import draws, sample
from ..rows import Row
from .beam import Generation, beam_search
from .votes import answer_key

Value = Callable[[Row, str], float]


def text_score(row: Row, text: str) -> float:
    """How right a completion is, by the rule of its kind, [0, 1]."""
    return row.text_score(text)


@torch.no_grad()
def search_questions(
    how: Generation,
    judge: ChainJudge,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    counts: Sequence[int],
    *,
    keep: int = 1,
    beams: bool = True,
    value: Value = text_score,
) -> list[dict[str, Any]]:
    """A record for each prompt: max(counts) samples, and a beam search for each of counts (`search.votes`).

    numbers: of the questions; their draws depend on seed and number alone. beams: search by steps too.
    value: how right a completion is.
    """
    most = max(counts)
    places = [(number, -1) for number in numbers]
    rollout = sample(
        how.model, prompts, group_size=most, max_new_tokens=how.max_new_tokens, temperature=how.temperature,
        eos=how.eos, suppress=how.suppress,
        draws=draws(how.seed, places, most, how.max_new_tokens) if how.temperature else None,
    )  # fmt: skip
    judged = judge([p.inputs for p in prompts], rollout.groups)
    records: list[dict[str, Any]] = [
        {
            "samples": [
                described(how, prompt, ids, one, value) for ids, one in zip(group, scores, strict=True)
            ],
            "beams": dict[str, Any](),
        }
        for prompt, group, scores in zip(prompts, rollout.groups, judged, strict=True)
    ]
    for n in counts if beams else ():
        found = beam_search(how, judge, prompts, numbers, n, keep=min(keep, n))
        for record, prompt, (beam, tokens) in zip(records, prompts, found, strict=True):
            assert beam.judged is not None
            line = described(how, prompt, beam.ids, beam.judged, value)
            record["beams"][str(n)] = line | {"tokens": tokens}
    return records


def described(
    how: Generation, prompt: Prompt, ids: Sequence[int], judged: Judged, value: Value
) -> dict[str, Any]:
    """What a record keeps of a chain. tokens: sampled for it."""
    text = how.tokenizer.decode(list(ids))
    return {
        "text": text,
        "key": answer_key(prompt.row, text),
        "value": value(prompt.row, text),
        "reward": judged.reward,
        "step_scores": list(judged.scores.steps),
        "answer_score": judged.scores.answer,
        "tokens": len(ids),
    }
