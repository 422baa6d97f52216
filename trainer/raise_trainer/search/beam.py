"""Step-level beam search: sample next steps, score them by a PRM, keep the best, repeat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import raise_core as rc

from ..chain_judge import ChainJudge, Judged
from ..prompts import Prompt
from ..rollout import draws, sample

STEPS = 1000  # apart in the places of draws, so that no two rounds of a question share one


@dataclass(frozen=True)
class Generation:
    """How a policy is sampled.

    eos: token ids that end a completion. step_close: id of the token that ends a step. suppress: token ids
    never sampled.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int
    eos: Sequence[int]
    suppress: Sequence[int]
    step_close: int
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Beam:
    """A chain, whole or to be gone on with.

    judged: its scores, None before its first step. ended: by an end-of-sequence token or for want of room.
    """

    ids: tuple[int, ...] = ()
    judged: Judged | None = None
    ended: bool = False

    @property
    def rank(self) -> float:
        """What beams are kept by: the trajectory reward of a whole chain, of others the mean step score."""
        if self.judged is None:
            return 0.0
        return self.judged.reward if self.ended else self.judged.partial


@dataclass
class _Search:
    """One question's beams, best first, the best whole chain seen, and the tokens sampled for it."""

    beams: list[Beam]
    best: Beam | None = None
    tokens: int = 0

    @property
    def alive(self) -> list[Beam]:
        return [beam for beam in self.beams if not beam.ended]


@torch.no_grad()
def beam_search(
    how: Generation,
    judge: ChainJudge,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    n: int,
    *,
    keep: int = 1,
) -> list[tuple[Beam, int]]:
    """The best chain of each prompt and the tokens sampled for it.

    Each round samples n // keep next steps of every beam (n in the first), scores the chains so far, and
    keeps the `keep` best of a question, whole ones among them, which are not gone on with; it ends when all
    kept ones are whole. What counts then is the best whole chain seen: step scores say nothing of an answer,
    and an open chain that was preferred to it may have ended badly. A round costs what n samples of best-of-n
    cost there. All questions and beams of a round are one batch: media are encoded once, a beam's tokens once
    a round for all its next steps.
    numbers: of the questions, which their draws depend on.
    """
    searches = [_Search([Beam()]) for _ in prompts]
    frozen = rc.Scorer(how.model).vision_features([p.inputs for p in prompts])
    seen = judge.features([p.inputs for p in prompts])
    depth = 0
    while any(search.alive for search in searches):
        size = n if depth == 0 else max(n // keep, 1)
        places, who = list[tuple[int, int]](), list[tuple[int, Beam]]()
        for q, search in enumerate(searches):
            for b, beam in enumerate(search.alive):
                places.append((numbers[q], depth * STEPS + b))
                who.append((q, beam))
        room = how.max_new_tokens - min(len(beam.ids) for _, beam in who)
        made = sample(
            how.model, [prompts[q].extended(beam.ids) for q, beam in who], group_size=size,
            max_new_tokens=room, temperature=how.temperature, eos=[*how.eos, how.step_close],
            suppress=how.suppress, draws=_draws(how, places, size, room),
            features=[frozen[q] for q, _ in who],
        )  # fmt: skip
        found: list[dict[tuple[int, ...], bool]] = [{} for _ in prompts]
        for (q, beam), group in zip(who, made.groups, strict=True):
            for more in group:
                # Another beam's room may be larger, and what is sampled beyond one's own is not its cost.
                ids = (*beam.ids, *more)[: how.max_new_tokens]
                searches[q].tokens += len(ids) - len(beam.ids)
                found[q][ids] = ids[-1] != how.step_close or len(ids) == how.max_new_tokens
        groups = [[list(ids) for ids in some] for some in found]
        scored = judge([p.inputs for p in prompts], groups, seen)
        for search, some, judged in zip(searches, found, scored, strict=True):
            done = [beam for beam in search.beams if beam.ended]
            new = [Beam(ids, j, over) for (ids, over), j in zip(some.items(), judged, strict=True)]
            search.beams = sorted([*done, *new], key=lambda beam: -beam.rank)[:keep]
            whole = [beam for beam in new if beam.ended]
            search.best = max([*([search.best] if search.best else []), *whole], key=_rank, default=None)
        depth += 1
    return [(search.best or search.beams[0], search.tokens) for search in searches]


def _rank(beam: Beam) -> float:
    return beam.rank


def _draws(how: Generation, places: Sequence[tuple[int, int]], size: int, room: int) -> Tensor | None:
    # As wide whatever the room is: that of a round depends on the other questions of the batch.
    return draws(how.seed, places, size, how.max_new_tokens)[:, :room] if how.temperature else None
