"""Operations on tensors: the only folder of raise_core that imports raise_kernels."""

from raise_core.ops.candidates import candidate_logp
from raise_core.ops.impl import chosen_impl
from raise_core.ops.parallel import parallel_linear_token_stats, parallel_token_stats
from raise_core.ops.partial import (
    PartialStats,
    merge_token_stats,
    partial_linear_token_stats,
    partial_token_stats,
)
from raise_core.ops.rewards import Rewards, check_groups, confidence_rewards, igsr, scre
from raise_core.ops.span_ops import span_logp
from raise_core.ops.stats import TokenStats, linear_token_stats, token_stats

__all__ = [
    "PartialStats",
    "Rewards",
    "TokenStats",
    "candidate_logp",
    "check_groups",
    "chosen_impl",
    "confidence_rewards",
    "igsr",
    "linear_token_stats",
    "merge_token_stats",
    "parallel_linear_token_stats",
    "parallel_token_stats",
    "partial_linear_token_stats",
    "partial_token_stats",
    "scre",
    "span_logp",
    "token_stats",
]
