"""A step's rounds of prompts put together: with dynamic sampling there are several."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .rollout import Rollout
from .scoring import Scored


@dataclass(frozen=True)
class Round:
    """Completions of some prompts, with their rewards; scored is None where this process has no prompt."""

    rollout: Rollout
    scored: Scored | None

    @property
    def differs(self) -> list[bool]:
        """By prompt, whether its completions' rewards differ: else nothing can be learned from them."""
        if self.scored is None:
            return []
        rewards = self.scored.reward.view(len(self.rollout.prompts), -1)
        return (rewards.amax(1) != rewards.amin(1)).tolist()

    def without_features(self) -> "Round":
        """The media features of groups that are not learned from are given up."""
        features = self.rollout.features
        if features is None:
            return self
        kept = [f if differs else None for f, differs in zip(features, self.differs, strict=True)]
        return replace(self, rollout=replace(self.rollout, features=kept))


def joined(rounds: Sequence[Round]) -> Round:
    """All rounds as one, in their order. Metrics are means weighted by the number of completions."""
    rounds = [r for r in rounds if r.scored is not None] or list(rounds[:1])
    if len(rounds) == 1:
        return rounds[0]
    rollouts = [r.rollout for r in rounds]
    owner, before = list[int](), 0
    for rollout in rollouts:
        owner += [before + p for p in rollout.owner]
        before += len(rollout.prompts)
    features = None
    if any(r.features is not None for r in rollouts):
        features = [f for r in rollouts for f in r.features or [None] * len(r.prompts)]
    lists = {f.name: _put_together([getattr(r, f.name) for r in rollouts]) for f in fields(Rollout)}
    rollout = Rollout(**(lists | {"owner": owner, "features": features}))
    parts = [r.scored for r in rounds if r.scored is not None]
    whole = {f.name: _put_together([getattr(s, f.name) for s in parts]) for f in fields(Scored)}
    weights = [len(s.text) for s in parts]
    whole["metrics"] = {
        name: sum(s.metrics[name] * w for s, w in zip(parts, weights, strict=True)) / sum(weights)
        for name in parts[0].metrics
    }
    return Round(rollout, Scored(**whole))


def _put_together(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], list):
        return [x for value in values for x in value]
    return values[0]  # None, in every round alike
