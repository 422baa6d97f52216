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
    from raise_core.ema import EmaReference, FrozenReference, PolicyReference, Reference
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
    from raise_core.scoring.scorer import CompletionRows, SamplerCheck, Scorer

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
_HOME = {
    "EmaReference": "raise_core.ema",
    "FrozenReference": "raise_core.ema",
    "PolicyReference": "raise_core.ema",
    "Reference": "raise_core.ema",
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
