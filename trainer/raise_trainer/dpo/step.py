"""Pairs of a PRM's best and worst path, and the gradient step on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import raise_core as rc

from .. import ranks
from ..chain_judge import Judged
from ..checkpoints import StepGuard
from ..errors import UserError
from ..passes import Group, passes
from ..update import finish


@dataclass(frozen=True)
class Pair:
    """A prompt's inputs, and the token ids of the completion to prefer and of the one to avoid."""

    inputs: dict[str, Any]
    chosen: list[int]
    rejected: list[int]

    @property
    def completions(self) -> list[list[int]]:
        """Both, the chosen one first."""
        return [self.chosen, self.rejected]


def best_and_worst(
    completions: Sequence[Sequence[int]], judged: Sequence[Judged], min_gap: float
) -> tuple[int, int] | None:
    """Indices of the paths with the highest and the lowest reward; None where they are closer than min_gap.

    The chosen one must have an answer, and both at least a token and scores: what is beyond the PRM's context
    is neither good nor bad. Of equals the first. min_gap in units of reward; a gap of 0 is never enough, and
    equal paths, whose scores differ by roundings, are no pair.
    """
    some = [i for i, ids in enumerate(completions) if ids and judged[i].fits]
    answered = [i for i in some if judged[i].scores.answer is not None]
    if not answered:
        return None
    high = max(answered, key=lambda i: judged[i].reward)
    low = min(some, key=lambda i: judged[i].reward)
    gap = judged[high].reward - judged[low].reward
    differ = list(completions[high]) != list(completions[low])
    return (high, low) if differ and gap > 0 and gap >= min_gap else None


def dpo_step(
    scorer: rc.Scorer,
    confidant: rc.Scorer,
    reference: rc.Reference,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    *,
    beta: float,
    nll_weight: float,
    micro_tokens: int = 1 << 20,
    guard: StepGuard | None = None,
    step: int = 0,
) -> dict[str, float]:
    """One optimiser step on the mean loss of the pairs of all processes (`rc.dpo_loss`).

    scorer: of the policy; confidant: of reference.model, whose log-probabilities are packed the same way, a
    prompt run once for both completions. The figures are the metrics of `rc.DpoLoss`.
    """
    none = torch.zeros(0)
    groups = [Group(pair.inputs, pair.completions, none, none) for pair in pairs]
    (count,) = ranks.totals(len(pairs))
    with torch.no_grad(), reference.active():
        known = {id(g): _sums(confidant, [g])[0].cpu() for g in groups}
    longest = max(ranks.gather(max((g.cost for g in groups), default=0)))
    optimizer.zero_grad(set_to_none=True)
    parts = list[dict[str, float]]()
    # A pair is one unit: the slope of either completion depends on both.
    for run, some in passes(scorer, groups, max(micro_tokens, longest)):
        if any(len(g.completions) != 2 for g in some):
            raise UserError(
                "dpo: under sharding this model cannot be packed, and its pairs run one by one; use sdpa, or "
                "one process with the whole model"
            )
        sums, ref = _sums(run, some), [known[id(g)] for g in some]
        logp, before = torch.stack(sums), torch.stack(ref).to(sums[0].device)
        made = rc.dpo_loss(
            logp[:, 0], logp[:, 1], before[:, 0], before[:, 1], beta=beta, nll_weight=nll_weight,
            chosen_tokens=torch.tensor([len(g.completions[0]) for g in some]), num_pairs=count,
        )  # fmt: skip
        torch.autograd.backward(made.loss)
        parts.append({"loss": made.loss.item()} | {k: v.item() for k, v in made.metrics.items()})
    figures = ranks.joined(parts)
    batch = [g.completions for g in groups]
    return figures | finish(scorer.model, optimizer, figures.get("loss", 0.0), guard, step, batch)


def _sums(scorer: rc.Scorer, groups: Sequence[Group]) -> list[torch.Tensor]:
    """Log-probability of the chosen and the rejected completion of each group, [2] nats each."""
    found = scorer.token_stats([g.inputs for g in groups], [g.completions for g in groups])
    return [torch.stack([_sum(one) for one in pair]) for pair in found]


def _sum(stats: rc.TokenStats) -> torch.Tensor:
    assert stats.logp is not None
    return stats.logp.sum()
