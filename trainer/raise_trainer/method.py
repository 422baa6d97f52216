"""The settings of the method itself, whoever runs it: the demo or a training run."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from .config import RewardKind


@dataclass(frozen=True, kw_only=True)
class Method:
    """How completions are drawn, rewarded and learned from; the fields are those of `TrainConfig`."""

    group_size: int
    max_new_tokens: int
    temperature: float = 1.0
    reward: RewardKind = "scre-igsr"
    confidence_share: float = 1.0
    format_weight: float = 0.0
    igsr_variant: Literal["paper", "balanced"] = "paper"
    loss: Literal["grpo", "dapo", "dr_grpo"] = "dr_grpo"
    scale: Literal["group", "batch", "none"] = "group"
    min_std: float = 0.02
    clip: tuple[float, float] = (0.2, 0.2)
    kl: float = 0.0
    watch_kl: bool = False  # report the KL although no loss has it: all completion rows are scored for it
    mask_truncated: bool = False
    updates: int = 1
    micro_tokens: int = 1 << 20

    @classmethod
    def of(cls, config: Any) -> "Method":
        """The settings of that name which `config` has."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)})
