"""The interface of a sampler, the built-in one, and what the policy says of another's completions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

import raise_core as rc
from raise_core.scoring.backbone import VisionFeatures

from ..method import Method
from ..prompts import Prompt
from ..rollout import Rollout, sample


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; see `rollout.sample`. temperature 0 is greedy."""

    group_size: int
    max_new_tokens: int
    temperature: float
    eos: tuple[int, ...]
    suppress: tuple[int, ...]

    @classmethod
    def of(cls, method: Method, *, eos: Sequence[int], suppress: Sequence[int]) -> "Sampling":
        """As a method's settings say."""
        size, longest = method.group_size, method.max_new_tokens
        return cls(size, longest, method.temperature, tuple(eos), tuple(suppress))


class Engine(Protocol):
    """A sampler. Every process of a run has one, and calls `sync` and `sample` in the same order."""

    def sync(self, model: Any, step: int) -> None:
        """Sample from these weights from now on; `step`: finished optimiser steps, their version.

        All processes call it. Does nothing for a version that is already there.
        """

    def sample(
        self,
        prompts: Sequence[Prompt],
        draws: Tensor | None,
        *,
        features: Sequence[VisionFeatures | None] | None = None,
        group_size: int | None = None,
    ) -> Rollout:
        """G completions of each prompt, of this process alone; none for no prompts.

        draws [B, max_new_tokens]: see `rollout.sample`; another engine makes its seeds of them. group_size:
        another G than usual. UserError when the engine cannot be used, or answers something else than it was
        asked for.
        """

    def close(self) -> None:
        """Give back what the engine holds; it is not used afterwards."""


class Generate:
    """The built-in sampler: the policy itself, in this process. There is nothing to push."""

    def __init__(self, model: Any, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling

    def sync(self, model: Any, step: int) -> None:
        """The model sampled from is the one that is trained."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        draws: Tensor | None,
        *,
        features: Sequence[VisionFeatures | None] | None = None,
        group_size: int | None = None,
    ) -> Rollout:
        """See `rollout.sample`."""
        s = self.sampling
        return sample(
            self.model, prompts, group_size=group_size or s.group_size, max_new_tokens=s.max_new_tokens,
            temperature=s.temperature, eos=s.eos, suppress=s.suppress, draws=draws, features=features,
        )  # fmt: skip

    def close(self) -> None:
        """Nothing is held."""


@torch.no_grad()
def rescored(rollout: Rollout, scorer: rc.Scorer, temperature: float) -> tuple[Rollout, float]:
    """A rollout of another engine with what the policy says of its tokens; call before the next update.

    Fills in `logp` and `entropy` [nats], at temperature 1 over the whole vocabulary, from one pass. Also
    gives Σ |engine's log p − policy's log p| over the tokens, both at the sampling temperature (1 for greedy
    sampling, whose distribution has no logarithm). 0 without prompts.
    """
    if not rollout.prompts:
        return rollout, 0.0
    assert rollout.sampled_logp is not None  # an engine's
    states = scorer.completion_rows(rollout.inputs, rollout.groups, features=rollout.features)
    head = scorer.head().options()
    own = rc.linear_token_stats(states.hidden, targets=states.targets, want=("logp", "entropy"), **head)
    assert own.logp is not None and own.entropy is not None
    warm = own.logp
    if temperature not in (0.0, 1.0):
        found = rc.linear_token_stats(states.hidden, targets=states.targets, temperature=temperature, **head)
        assert found.logp is not None
        warm = found.logp
    gap = float((torch.cat(rollout.sampled_logp) - warm.double().cpu()).abs().sum())
    lengths = [len(ids) for ids in rollout.completions]
    logp, entropy = (list(torch.split(x.cpu(), lengths)) for x in (own.logp, own.entropy))
    sampled = [x.to(own.logp.dtype) for x in rollout.sampled_logp]
    return replace(rollout, logp=logp, entropy=entropy, sampled_logp=sampled), gap
