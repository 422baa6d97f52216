"""Operations on tensors: the only folder of raise_core that imports raise_kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raise_core.ops.candidates import candidate_logp
    from raise_core.ops.impl import chosen_impl
    from raise_core.ops.parallel import parallel_linear_token_stats, parallel_token_stats
    from raise_core.ops.partial import (
        PartialStats,
        merge_token_stats,
        partial_linear_token_stats,
        partial_token_stats,
    )
    from raise_core.ops.reward_operator import check_groups
    from raise_core.ops.rewards import Rewards, confidence_rewards, igsr, scre
    from raise_core.ops.span_ops import span_logp
    from raise_core.ops.stats import TokenStats, linear_token_stats, token_stats
    from raise_core.ops.step_ops import step_margins, step_scores

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
    "step_margins",
    "step_scores",
    "token_stats",
]
_HOME = {
    "candidate_logp": "raise_core.ops.candidates",
    "chosen_impl": "raise_core.ops.impl",
    "parallel_linear_token_stats": "raise_core.ops.parallel",
    "parallel_token_stats": "raise_core.ops.parallel",
    "PartialStats": "raise_core.ops.partial",
    "merge_token_stats": "raise_core.ops.partial",
    "partial_linear_token_stats": "raise_core.ops.partial",
    "partial_token_stats": "raise_core.ops.partial",
    "Rewards": "raise_core.ops.rewards",
    "check_groups": "raise_core.ops.reward_operator",
    "confidence_rewards": "raise_core.ops.rewards",
    "igsr": "raise_core.ops.rewards",
    "scre": "raise_core.ops.rewards",
    "span_logp": "raise_core.ops.span_ops",
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
