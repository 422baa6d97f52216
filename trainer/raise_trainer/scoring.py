"""From sampled completions to rewards: text score, answer span, confidence under the reference, reward."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import raise_core as rc
from raise_core.bonuses import consistency_bonus

from .method import Method
from .rewards import FAMILY, family_reward, reads_all_rows
from .rollout import Rollout

FORM = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


@dataclass(frozen=True)
class Scored:
    """B completions with their rewards.

    text [B]: decoded completions.  score [B]: text score in [0, 1].  found [B]: answer spans.
    reward [B]; confidence [B] in [0, 1], under the reference, for wrong answers too. truncated [B]: no end.
    logp_ref [T]: log-probability of every completion token under the reference, at the sampling temperature,
    as the policy's in the KL [nats]; None where neither the loss nor a metric has a KL.
    metrics: means over this batch, by name. step_advantage [T]: of every completion token beside that of its
    completion, where steps have their own; else None.
    """

    text: list[str]
    score: Tensor
    found: list[rc.Found]
    reward: Tensor
    confidence: Tensor
    truncated: Tensor
    logp_ref: Tensor | None
    metrics: dict[str, float]
    step_advantage: Tensor | None = None


@torch.no_grad()
def score(
    rollout: Rollout, scorer: rc.Scorer, tokenizer: Any, method: Method, *, eos: Sequence[int]
) -> Scored:
    """Score a rollout under the reference that `scorer` holds; call where that reference is active.

    method.reward: "scre-igsr" rewards right answers by the reference's confidence in them (SCRE for strict
    rows, IGSR for open ones), "scre" the strict rows alone, open ones by their text score; "accuracy" rewards
    by the text score everywhere, and so does "chain-of-step" here, whose PRM speaks later
    (`chain_reward.with_chain_reward`); the others are those of `rewards`.
    All log the same figures.
    confidence_share k: text * (1 - k) + k * confidence reward. To that come the bonuses "format", for the
    wanted form, and "grpo-care" (`raise_core.bonuses.consistency_bonus`); "t-grpo" needs shuffled frames too:
    `temporal.with_bonus`.
    """
    rows = [rollout.prompts[p].row for p in rollout.owner]
    text = [tokenizer.decode(ids) for ids in rollout.completions]
    verdicts = [row.verdict(t) for row, t in zip(rows, text, strict=True)]
    text_score = torch.tensor([verdict.score for verdict in verdicts])
    found = rc.find_answer_spans(rollout.completions, tokenizer)
    strict = torch.tensor([row.strict for row in rows])
    offsets = torch.tensor([0, *(len(f) for f in found)]).cumsum(0)
    variant = "balanced" if method.reward == "scre-igsr-balanced" else "paper"
    options: dict[str, Any] = {"group_size": method.group_size, "variant": variant}
    options |= {name: getattr(method, name) for name in ("eta", "lam", "tau", "penalty")}
    logp_ref = states = None
    if method.kl or method.watch_kl or reads_all_rows(method.reward):
        states = scorer.completion_rows(rollout.inputs, rollout.groups, features=rollout.features)
        head, device = scorer.head().options(), states.hidden.device
        spans = rc.build_spans(found, rollout.completions, states.offsets[:-1].cpu(), rollout.owner)
        got = rc.confidence_rewards(
            spans.to(device),
            text_score.to(device),
            strict.to(device),
            hidden=states.hidden,
            **head,
            **options,
        )
        if method.kl or method.watch_kl:
            logp_ref = rc.linear_token_stats(
                states.hidden, targets=states.targets, temperature=method.temperature, **head
            ).logp
    else:  # the answers' rows alone
        got = scorer.rewards(
            rollout.inputs, rollout.groups, text_score, strict, tokenizer, found=found,
            features=rollout.features, **options,
        )  # fmt: skip
    confidence, k = got.confidence.cpu(), method.confidence_share
    logp, extra = got.parts["logp"].cpu(), dict[str, float]()
    value = text_score if method.reward in ("accuracy", "chain-of-step") else got.reward.cpu()
    if method.reward == "scre":
        value = torch.where(strict, value, text_score)
    if method.reward in FAMILY:
        value = family_reward(
            method.reward, rollout, scorer, tokenizer, found=found, text_score=text_score, own_logp=logp,
            states=states,
        )  # fmt: skip
    reward = value if k == 1 or value is text_score else text_score * (1 - k) + k * value
    well_formed = torch.tensor([bool(FORM.fullmatch(_visible(t, tokenizer))) for t in text])
    if weight := method.bonus.get("format"):
        reward = reward + weight * well_formed
    if weight := method.bonus.get("grpo-care"):
        bonus = consistency_bonus(logp, offsets, text_score, torch.tensor(rollout.owner), weight=weight)
        reward, extra["grpo_care_share"] = reward + bonus, _share(bonus > 0)
    truncated = torch.tensor([ids[-1:] == [] or ids[-1] not in eos for ids in rollout.completions])
    answered = strict & (offsets.diff() > 0)
    plain = rc.scre(logp, offsets, eta=0.0, lam=0.0, first_index=0)  # Π p
    shares = got.metrics()
    metrics = {
        "reward_mean": float(reward.mean()),
        "text_score_mean": float(text_score.mean()),
        "confidence_mean": float(confidence.mean()),
        "completion_tokens_mean": sum(map(len, rollout.completions)) / len(rollout.completions),
        "answer_missing_share": sum(f.reason is not None for f in found) / len(found),
        "truncated_share": _share(truncated),
        "well_formed_share": _share(well_formed),
        "answer_cut_share": sum(verdict.cut for verdict in verdicts) / len(verdicts),
        "scre_differs_share": _share((confidence - plain).abs()[answered] > 0.01),
        "igsr_bonus_share": _number(shares["bonus_share"]),
        "igsr_no_effect_share": _number(shares["no_effect_share"]),
        **extra,
    }
    return Scored(
        text,
        text_score,
        found,
        reward,
        confidence,
        truncated,
        None if logp_ref is None else logp_ref.cpu(),
        metrics,
    )


def _visible(text: str, tokenizer: Any) -> str:
    """Without the end-of-sequence token's text."""
    return text.removesuffix(tokenizer.eos_token or "").strip()


def _number(value: Tensor) -> float:
    """The value; 0 when there was nothing to count."""
    return 0.0 if bool(value.isnan()) else float(value)


def _share(flags: Tensor) -> float:
    """Share of True; 0 when there is nothing to count."""
    return float(flags.float().mean()) if flags.numel() else 0.0
