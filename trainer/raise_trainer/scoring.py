"""From sampled completions to rewards: text score, answer span, confidence under the reference, reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import raise_core as rc

from .config import RewardKind
from .rollout import Rollout


@dataclass(frozen=True)
class Scored:
    """B completions with their rewards.

    text [B]: decoded completions.  score [B]: text score in [0, 1].  found [B]: answer spans.
    reward [B]; confidence [B] in [0, 1], under the reference, for wrong answers too.
    logp_ref [T]: log-probability of every completion token under the reference [nats].
    metrics: means over this batch, by name.
    """

    text: list[str]
    score: Tensor
    found: list[rc.Found]
    reward: Tensor
    confidence: Tensor
    logp_ref: Tensor
    metrics: dict[str, float]


@torch.no_grad()
def score(
    rollout: Rollout, scorer: rc.Scorer, tokenizer: Any, *, group_size: int, kind: RewardKind
) -> Scored:
    """Score a rollout under the reference that `scorer` holds; call where that reference is active.

    kind: "scre-igsr" rewards right answers by the reference's confidence in them (SCRE for strict rows, IGSR
    for open ones); "accuracy" rewards by the text score alone. Both log the same figures.
    """
    rows = [rollout.prompts[p].row for p in rollout.owner]
    text = [tokenizer.decode(ids) for ids in rollout.completions]
    verdicts = [row.verdict(t) for row, t in zip(rows, text, strict=True)]
    text_score = torch.tensor([verdict.score for verdict in verdicts])
    found = rc.find_answer_spans(rollout.completions, tokenizer)
    states, head = scorer.completion_rows(rollout.inputs, rollout.groups), scorer.head().options()
    device, first_rows = states.hidden.device, states.offsets[:-1].cpu()
    spans = rc.build_spans(found, rollout.completions, first_rows, rollout.owner).to(device)
    strict = torch.tensor([row.strict for row in rows])
    got = rc.confidence_rewards(
        spans, text_score.to(device), strict.to(device), hidden=states.hidden, group_size=group_size, **head
    )
    logp_ref = rc.linear_token_stats(states.hidden, targets=states.targets, **head).logp
    reward, confidence = got.reward.cpu(), got.confidence.cpu()
    answered = strict & (spans.lengths.cpu() > 0)
    plain = rc.scre(got.parts["logp"], spans.offsets, eta=0.0, lam=0.0, first_index=0).cpu()  # Π p
    shares = got.metrics()
    metrics = {
        "reward_mean": float(reward.mean() if kind == "scre-igsr" else text_score.mean()),
        "text_score_mean": float(text_score.mean()),
        "confidence_mean": float(confidence.mean()),
        "completion_tokens_mean": sum(map(len, rollout.completions)) / len(rollout.completions),
        "answer_missing_share": sum(f.reason is not None for f in found) / len(found),
        "answer_cut_share": sum(verdict.cut for verdict in verdicts) / len(verdicts),
        "scre_differs_share": _share((confidence - plain).abs()[answered] > 0.01),
        "igsr_bonus_share": _number(shares["bonus_share"]),
        "igsr_no_effect_share": _number(shares["no_effect_share"]),
    }
    return Scored(
        text,
        text_score,
        found,
        reward if kind == "scre-igsr" else text_score,
        confidence,
        logp_ref.cpu(),
        metrics,
    )


def _number(value: Tensor) -> float:
    """The value; 0 when there was nothing to count."""
    return 0.0 if bool(value.isnan()) else float(value)


def _share(flags: Tensor) -> float:
    """Share of True; 0 when there is nothing to count."""
    return float(flags.float().mean()) if flags.numel() else 0.0


def share_of_equal_groups(reward: Tensor, owner: Sequence[int]) -> float:
    """Share of prompts all of whose completions have the same reward: they teach nothing in this step."""
    groups = reward.view(len(set(owner)), -1)
    return _share(groups.amax(1) == groups.amin(1))
