"""The passes of an update: whole groups, a forward and a backward pass each.

Under FSDP2 every pass gathers weights and reduces gradients, so every process makes as many: a group that
needs several is cut up, and a process with fewer passes than others adds empty ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import raise_core as rc
from raise_core.scoring.backbone import Backbone, VisionFeatures

from . import ranks
from .checkpoints.ranks import on_any
from .sharded import gathered, sharded

ENDLESS = 1 << 40  # tokens of a pass that is never cut up
MEDIA = ("pixel_values", "pixel_values_videos")


@dataclass
class Group:
    """A prompt and those of its completions that are learned from.

    advantage [g]; logp_ref [t] of their tokens in order. logp_old [t]: log-probabilities of the policy that
    sampled, at the sampling temperature; None until the first update, in which the policy is that one; of
    another engine from the start.
    features: of the prompt's media where the vision tower is not trained; None runs it. token_advantage [t]:
    added to the advantage of each token's completion; None for none.
    """

    inputs: dict[str, Any]
    completions: list[list[int]]
    advantage: Tensor
    logp_ref: Tensor | None
    logp_old: Tensor | None = None
    features: VisionFeatures | None = None
    token_advantage: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return sum(map(len, self.completions))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self.inputs["input_ids"].shape[-1])

    @property
    def cost(self) -> int:
        """Tokens of its packed pass."""
        return self.prompt_tokens + self.tokens

    @property
    def moves(self) -> bool:
        """Whether any of its tokens has an advantage."""
        per_token = self.token_advantage
        return bool(self.advantage.any()) or (per_token is not None and bool(per_token.any()))

    def cut(self, most: int) -> list["Group"]:
        """The same in groups of at most `most` tokens with the prompt, or of one completion."""
        parts, room = list[list[int]](), 0
        for i, ids in enumerate(self.completions):
            if not parts or len(ids) > room:
                parts.append([])
                room = most - self.prompt_tokens
            parts[-1].append(i)
            room -= len(ids)
        if len(parts) < 2:
            return [self]
        ends = list(accumulate(map(len, self.completions), initial=0))
        pieces = []
        for part in parts:
            some, tokens = slice(part[0], part[-1] + 1), slice(ends[part[0]], ends[part[-1] + 1])
            by_token = ("logp_ref", "logp_old", "token_advantage")
            cut = {name: None if (x := getattr(self, name)) is None else x[tokens] for name in by_token}
            kept = self.completions[some]
            pieces.append(replace(self, completions=kept, advantage=self.advantage[some], **cut))
        return pieces


def micro_batches(groups: Sequence[Group], most: int) -> Iterator[list[Group]]:
    """Whole groups in order, of at most `most` tokens together; a larger group is by itself."""
    kept, room = list[Group](), most
    for group in groups:
        if kept and group.cost > room:
            yield kept
            kept, room = [], most
        kept.append(group)
        room -= group.cost
    if kept:
        yield kept


def passes(scorer: rc.Scorer, groups: Sequence[Group], most: int) -> Iterator[tuple[rc.Scorer, list[Group]]]:
    """The groups in passes of about `most` tokens, each with the scorer that runs it; all processes call it.

    Under FSDP2 a pass is one forward pass of the layers, and processes with fewer passes make empty ones at
    the end, here. Groups that are cut up get their `logp_old` back when all passes are done.
    """
    if not sharded(scorer.model):
        yield from ((scorer, some) for some in micro_batches(groups, most))
        return
    found = _LOCKSTEP.setdefault(scorer, _Lockstep(scorer))
    found.check(scorer, groups)
    planned, cut = list[tuple[rc.Scorer, list[Group]]](), list[tuple[Group, list[Group]]]()
    packed = list[Group]()
    for group, mode in zip(groups, _plan(scorer, groups), strict=True):
        pieces = group.cut(0 if mode == "plain" else most)
        cut += [(group, pieces)] if len(pieces) > 1 else []
        if mode == "plain":
            planned += [(found.plain, [piece]) for piece in pieces]
        elif found.several:
            packed += pieces
        else:
            planned += [(found.packed, [piece]) for piece in pieces]
    planned += [(found.packed, some) for some in micro_batches(packed, most)]
    missing = max(ranks.gather(len(planned))) - len(planned)
    yield from planned
    for _ in range(missing):
        found.empty()
    for group, pieces in cut:
        olds = [piece.logp_old for piece in pieces if piece.logp_old is not None]
        if group.logp_old is None and len(olds) == len(pieces):
            group.logp_old = torch.cat(olds)


class _Lockstep:
    """Scorers whose call is one forward pass of each layer; the one given says how, and checks first."""

    def __init__(self, scorer: rc.Scorer) -> None:
        options: dict[str, Any] = {"max_tokens": ENDLESS, "self_check": False}
        self.packed = rc.Scorer(scorer.model, packing="packed", **options)
        self.plain = rc.Scorer(scorer.model, packing="plain", **options)
        backbone = Backbone(scorer.model)
        self.several = backbone.attention == "sdpa"  # others have a dense mask, and a pass for each prompt
        self._text = self.packed if backbone.why_plain is None else self.plain
        self._seen = set[tuple[bool, ...]]()

    def check(self, scorer: rc.Scorer, groups: Sequence[Group]) -> None:
        """The scorer's first-use checks, on whole weights: their passes are not the same in all processes."""
        new = dict[tuple[bool, ...], Group]()
        for group in groups:
            kind = tuple(name in group.inputs for name in MEDIA)
            if kind not in self._seen and len(group.completions) > 1:
                new.setdefault(kind, group)
        if on_any(bool(new)):
            with gathered(scorer.model):
                for group in new.values():
                    scorer.completion_rows([group.inputs], [group.completions[:2]])
        self._seen |= set(new)

    def empty(self) -> None:
        """One pass that adds 0 to every gradient."""
        nothing = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        (self._text.completion_rows([nothing], [[[0]]]).hidden.sum() * 0.0).backward()


_LOCKSTEP: WeakKeyDictionary[rc.Scorer, _Lockstep] = WeakKeyDictionary()


def _plan(scorer: rc.Scorer, groups: Sequence[Group]) -> list[str]:
    return scorer.plan([g.inputs for g in groups], [g.completions for g in groups])
