"""Rewards that compare the completions of one prompt, and RLPR's filter of prompts that teach little."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raise_core.family.segments import (
    LEAST,
    as_given,
    each_alone,
    members,
    packed_logp,
    per_span,
    span_mean,
    span_sum,
    with_empty,
)


def jepo(logp: Tensor, offsets: Tensor, group: Tensor, *, group_size: int | None = None) -> Tensor:
    """What each completion adds to the group's bound on log p(answer), [S] in nats (JEPO, Tang 2025).

        R(Z) = log(1/|Z| sum_{i in Z} exp(sum_t logp_it))        reward_i = R(group) - R(group without i)

    logp [T]: of the reference answer after each completion's reasoning. It is an advantage already (leave
    one out): use it with advantages that are not scaled. An empty span counts as likelihood 0, a group of
    one gives 0, and a row that is NaN is left out of the others' sums. group_size: refuse groups of another
    size.
    """
    values = span_sum(packed_logp(logp, offsets), offsets)
    whole = torch.where(offsets.diff() > 0, values, LEAST).clamp(min=LEAST)
    member, known = members(group, offsets, group_size), ~whole.isnan()
    mates = (member[:, None] == member) & known
    others = mates & ~torch.eye(len(member), dtype=torch.bool, device=member.device)
    gain = _log_mean(whole, mates) - _log_mean(whole, others)
    gain = torch.where(others.any(1), gain, 0.0)
    return as_given(torch.where(known, gain, math.nan), logp)


def _log_mean(whole: Tensor, rows: Tensor) -> Tensor:
    """log-mean-exp of whole [S] over each row's own selection [S, S]."""
    chosen = torch.where(rows, whole, -math.inf)
    return chosen.logsumexp(1) - rows.sum(1).double().log()


def nover(
    logp: Tensor,
    offsets: Tensor,
    group: Tensor,
    reasoning_tokens: Tensor,
    *,
    valid: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Reasoning and efficiency rewards of NOVER (arXiv 2505.16022) together, [S] in [0, 2).

        P_i = exp(mean_t -logp_it / N_i)        N_i = max(1, 1 + log10(reasoning tokens))
        (n - rank_i) / n  +  share of the n - 1 others that are longer and have a larger P

    logp [T]: of the reference answer after the reasoning; reasoning_tokens [S]. rank: how many of the
    group's n valid members have a smaller P, so that equal ones share a rank. valid [S] bool: who has the
    wanted form; the others get 0, as do an empty span and a P of infinity. With one valid member the second
    term is 0. The paper adds 1 for the form. NaN stays with its row. group_size: refuse groups of another
    size.
    """
    nll = -span_mean(packed_logp(logp, offsets), offsets)
    length = per_span("reasoning_tokens", reasoning_tokens, offsets).double()
    perplexity = nll / (1 + length.clamp(min=1).log10())  # its log, which ranks alike and does not overflow
    member, counted = members(group, offsets, group_size), (offsets.diff() > 0) & perplexity.isfinite()
    if valid is not None:
        counted &= per_span("valid", valid, offsets).bool()
    mates = (member[:, None] == member) & counted
    better = mates & (perplexity < perplexity[:, None])
    beaten = mates & (perplexity > perplexity[:, None]) & (length > length[:, None])
    n = mates.sum(1).double()
    reward = (n - better.sum(1)) / n.clamp(min=1) + beaten.sum(1) / (n - 1).clamp(min=1)
    reward = torch.where(counted, reward, torch.where(perplexity.isnan(), math.nan, 0.0))
    return with_empty(reward, offsets, 0.0, logp)


class StdFilter:
    """Leaves prompts out whose rewards hardly differ, std_G < beta * mean std_G (RLPR, arXiv 2506.18254).

    beta: 0.5 for Qwen, 0.9 Llama, 1.0 Gemma in the paper. decay: of the running mean, which is the plain
    mean of the first five steps. first_step: from which step on (counted from 1) anything is left out.
    State is two numbers, `state_dict()`.
    """

    AVERAGED = 5

    def __init__(self, *, beta: float = 0.5, decay: float = 0.99, first_step: int = 11) -> None:
        for name, value in (("beta", beta), ("decay", decay)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: got {value}, wanted a number from 0 to 1")
        self.beta, self.decay, self.first_step = beta, decay, first_step
        self.steps, self.mean = 0, 0.0

    def keep(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Which of a step's completions to learn from, [B] bool; counts the step.

        rewards [B], group [B]: of the whole step; gather them where processes hold parts of it. The bound
        is that of the steps before. ValueError for a reward that is missing or not finite, naming it.
        """
        if not isinstance(rewards, Tensor) or not rewards.dtype.is_floating_point or rewards.ndim != 1:
            raise TypeError(
                "rewards: wanted a floating [B] tensor; drop completions whose reward is None first"
            )
        broken = (~rewards.isfinite()).nonzero()
        if len(broken):
            raise ValueError(f"rewards[{int(broken[0])}]: not finite; drop the row or set its reward to 0")
        values = rewards.detach().cpu().double()
        member = members(group.cpu(), each_alone(len(rewards), values), None)
        stds = [values[member == g] for g in range(int(member.max()) + 1)] if len(member) else []
        spread = torch.stack([x.std() if len(x) > 1 else x.new_zeros(()) for x in stds]) if stds else values
        self.steps += 1
        bound = self.beta * self.mean if self.steps >= self.first_step else 0.0
        if stds:
            weight = 1 / self.steps if self.steps <= self.AVERAGED else 1 - self.decay
            self.mean += weight * (float(spread.mean()) - self.mean)
        return (spread >= bound)[member].to(rewards.device)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": self.steps, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.steps, self.mean = int(state["steps"]), float(state["mean"])
