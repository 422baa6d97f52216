"""Reward operations over exact answer spans: spans, verifiers, SCRE, IGSR, advantages, policy losses."""

from .advantages import group_advantages
from .ema import EmaReference, FrozenReference, PolicyReference, Reference
from .linear_policy_loss import linear_policy_loss
from .ops import (
    PartialStats,
    Rewards,
    TokenStats,
    candidate_logp,
    chosen_impl,
    confidence_rewards,
    igsr,
    linear_token_stats,
    merge_token_stats,
    parallel_linear_token_stats,
    parallel_token_stats,
    partial_linear_token_stats,
    partial_token_stats,
    scre,
    span_logp,
    token_stats,
)
from .policy_loss import PolicyLoss, pack, policy_loss
from .scorer import CompletionRows, SamplerCheck, Scorer
from .spans import Found, Spans, build_spans, find_answer_spans, find_step_spans
from .verify import Verdict, verify, verify_details

__all__ = [
    "CompletionRows",
    "EmaReference",
    "Found",
    "FrozenReference",
    "PartialStats",
    "PolicyLoss",
    "PolicyReference",
    "Reference",
    "Rewards",
    "SamplerCheck",
    "Scorer",
    "Spans",
    "TokenStats",
    "Verdict",
    "build_spans",
    "candidate_logp",
    "chosen_impl",
    "confidence_rewards",
    "find_answer_spans",
    "find_step_spans",
    "group_advantages",
    "igsr",
    "linear_policy_loss",
    "linear_token_stats",
    "merge_token_stats",
    "pack",
    "parallel_linear_token_stats",
    "parallel_token_stats",
    "partial_linear_token_stats",
    "partial_token_stats",
    "policy_loss",
    "scre",
    "span_logp",
    "token_stats",
    "verify",
    "verify_details",
]
