"""Reward operations over exact answer spans: spans, verifiers, SCRE, IGSR, advantages, policy losses.

What is large or registers operators with PyTorch is imported at its first use, so that `import raise_core` is
light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raise_core.advantages import group_advantages
from raise_core.policy_loss import PolicyLoss, pack, policy_loss
from raise_core.spans import Found, Spans, build_spans, find_answer_spans, find_step_spans
from raise_core.verify import Verdict, verify, verify_details

if TYPE_CHECKING:
    from raise_core.chain import Chain, Step, format_chain, parse_chain
    from raise_core.dpo import DpoLoss, dpo_loss
    from raise_core.ema import EmaReference, FrozenReference, PolicyReference, Reference
    from raise_core.family.answer import mean_logp, mean_prob, min_prob, rlpr, sequence_likelihood, sum_logp
    from raise_core.family.deepconf import EarlyStop, deepconf, weighted_vote
    from raise_core.family.group import StdFilter, jepo, nover
    from raise_core.family.pacr import Progress, pacr
    from raise_core.family.splice import Splice, option_confidence, splice_gold, spliced_stats
    from raise_core.family.whole_response import em_rl_sequence, em_rl_token, intuitor, rent
    from raise_core.linear_policy_loss import linear_policy_loss
    from raise_core.ops.candidates import candidate_logp
    from raise_core.ops.impl import chosen_impl
    from raise_core.ops.parallel import parallel_linear_token_stats, parallel_token_stats
    from raise_core.ops.partial import (
        PartialStats,
        merge_token_stats,
        partial_linear_token_stats,
        partial_token_stats,
    )
    from raise_core.ops.rewards import Rewards, confidence_rewards, igsr, scre
    from raise_core.ops.span_ops import span_logp
    from raise_core.ops.stats import TokenStats, linear_token_stats, token_stats
    from raise_core.ops.step_ops import step_margins, step_scores
    from raise_core.scoring.scorer import CompletionRows, SamplerCheck, Scorer
    from raise_core.scoring.step_scorer import StepScorer, StepScores, gold_logp_after_steps
    from raise_core.step_rewards import step_advantages, step_loss, trajectory_reward

__all__ = [
    "Chain",
    "CompletionRows",
    "DpoLoss",
    "EarlyStop",
    "EmaReference",
    "Found",
    "FrozenReference",
    "PartialStats",
    "PolicyLoss",
    "PolicyReference",
    "Progress",
    "Reference",
    "Rewards",
    "SamplerCheck",
    "Scorer",
    "Spans",
    "Splice",
    "StdFilter",
    "Step",
    "StepScorer",
    "StepScores",
    "TokenStats",
    "Verdict",
    "build_spans",
    "candidate_logp",
    "chosen_impl",
    "confidence_rewards",
    "deepconf",
    "dpo_loss",
    "em_rl_sequence",
    "em_rl_token",
    "find_answer_spans",
    "find_step_spans",
    "format_chain",
    "gold_logp_after_steps",
    "group_advantages",
    "igsr",
    "intuitor",
    "jepo",
    "linear_policy_loss",
    "linear_token_stats",
    "mean_logp",
    "mean_prob",
    "merge_token_stats",
    "min_prob",
    "nover",
    "option_confidence",
    "pack",
    "pacr",
    "parallel_linear_token_stats",
    "parallel_token_stats",
    "parse_chain",
    "partial_linear_token_stats",
    "partial_token_stats",
    "policy_loss",
    "rent",
    "rlpr",
    "scre",
    "sequence_likelihood",
    "span_logp",
    "splice_gold",
    "spliced_stats",
    "step_advantages",
    "step_loss",
    "step_margins",
    "step_scores",
    "sum_logp",
    "token_stats",
    "trajectory_reward",
    "verify",
    "verify_details",
    "weighted_vote",
]
_HOME = {
    "Chain": "raise_core.chain",
    "Step": "raise_core.chain",
    "format_chain": "raise_core.chain",
    "parse_chain": "raise_core.chain",
    "DpoLoss": "raise_core.dpo",
    "dpo_loss": "raise_core.dpo",
    "EmaReference": "raise_core.ema",
    "FrozenReference": "raise_core.ema",
    "PolicyReference": "raise_core.ema",
    "Reference": "raise_core.ema",
    "mean_logp": "raise_core.family.answer",
    "mean_prob": "raise_core.family.answer",
    "min_prob": "raise_core.family.answer",
    "rlpr": "raise_core.family.answer",
    "sequence_likelihood": "raise_core.family.answer",
    "sum_logp": "raise_core.family.answer",
    "EarlyStop": "raise_core.family.deepconf",
    "deepconf": "raise_core.family.deepconf",
    "weighted_vote": "raise_core.family.deepconf",
    "StdFilter": "raise_core.family.group",
    "jepo": "raise_core.family.group",
    "nover": "raise_core.family.group",
    "Progress": "raise_core.family.pacr",
    "pacr": "raise_core.family.pacr",
    "Splice": "raise_core.family.splice",
    "option_confidence": "raise_core.family.splice",
    "splice_gold": "raise_core.family.splice",
    "spliced_stats": "raise_core.family.splice",
    "em_rl_sequence": "raise_core.family.whole_response",
    "em_rl_token": "raise_core.family.whole_response",
    "intuitor": "raise_core.family.whole_response",
    "rent": "raise_core.family.whole_response",
    "linear_policy_loss": "raise_core.linear_policy_loss",
    "CompletionRows": "raise_core.scoring.scorer",
    "SamplerCheck": "raise_core.scoring.scorer",
    "Scorer": "raise_core.scoring.scorer",
    "candidate_logp": "raise_core.ops.candidates",
    "chosen_impl": "raise_core.ops.impl",
    "parallel_linear_token_stats": "raise_core.ops.parallel",
    "parallel_token_stats": "raise_core.ops.parallel",
    "PartialStats": "raise_core.ops.partial",
    "merge_token_stats": "raise_core.ops.partial",
    "partial_linear_token_stats": "raise_core.ops.partial",
    "partial_token_stats": "raise_core.ops.partial",
    "Rewards": "raise_core.ops.rewards",
    "confidence_rewards": "raise_core.ops.rewards",
    "igsr": "raise_core.ops.rewards",
    "scre": "raise_core.ops.rewards",
    "span_logp": "raise_core.ops.span_ops",
    "StepScorer": "raise_core.scoring.step_scorer",
    "StepScores": "raise_core.scoring.step_scorer",
    "gold_logp_after_steps": "raise_core.scoring.step_scorer",
    "step_advantages": "raise_core.step_rewards",
    "step_loss": "raise_core.step_rewards",
    "trajectory_reward": "raise_core.step_rewards",
    "step_margins": "raise_core.ops.step_ops",
    "step_scores": "raise_core.ops.step_ops",
    "TokenStats": "raise_core.ops.stats",
    "linear_token_stats": "raise_core.ops.stats",
    "token_stats": "raise_core.ops.stats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
