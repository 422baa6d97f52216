"""The settings of the method itself, whoever runs it: the demo or a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from raise_core.policy_kinds import CLIPPED, Kind, KlEstimator

from .config import RewardKind
from .errors import UserError
from .rewards import check_group_size
from .train_fields import ChainOfStep

Bonus = Literal["format", "t-grpo", "grpo-care"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How completions are drawn, rewarded and learned from; the fields are those of `TrainConfig`.

    eta, lam, tau and penalty, of SCRE and IGSR (`raise_core.scre`, `raise_core.igsr`), are not: a run has
    their defaults.
    """

    group_size: int
    max_new_tokens: int
    temperature: float = 1.0
    reward: RewardKind | Literal["chain-of-step"] = "scre-igsr"
    chain: ChainOfStep | None = None  # of the reward "chain-of-step"
    confidence_share: float = 1.0
    eta: float = 0.1
    lam: float = 1.0
    tau: float = 0.1
    penalty: float = 0.05
    bonus: Mapping[Bonus, float] = field(default_factory=dict)  # weight of each, in units of reward
    loss: Kind = "dr_grpo"
    scale: Literal["group", "batch", "none"] = "group"
    min_std: float = 0.02
    clip: tuple[float, float] | tuple[float, float, float] = (0.2, 0.2)  # below and above 1, dual clip
    kl: float = 0.0
    kl_estimator: KlEstimator = "k3"
    watch_kl: bool = False  # report the KL although no loss has it: all completion rows are scored for it
    mask_truncated: bool = False
    updates: int = 1
    resample: int = 0  # rounds of further prompts in place of groups whose rewards are all equal
    micro_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        self._check_clip()
        if (self.reward == "chain-of-step") != (self.chain is not None):
            raise UserError("reward chain-of-step: needs its PRM; write reward: {chain-of-step: FOLDER}")
        check_group_size(self.reward, self.group_size)
        for name, weight in self.bonus.items():
            if name not in get_args(Bonus):
                raise UserError(f"bonus: got {name!r}, wanted {', '.join(get_args(Bonus))}")
            if not 0 <= weight < float("inf"):
                raise UserError(f"bonus {name}: got {weight}, wanted a finite weight, 0 or more")
        if self.bonus.get("t-grpo") and self.group_size < 2:
            raise UserError("bonus t-grpo: needs a group_size of 2 or more; half of it is sampled once more")

    def _check_clip(self) -> None:
        below, dual = self.clip[0], self.clip[2:]
        if self.loss in CLIPPED and not 0 <= below <= 1:
            raise UserError(f"clip: got {list(self.clip)}; the first number is the share below 1, at most 1")
        if dual and (self.loss not in CLIPPED or not 1 < dual[0] < float("inf")):
            raise UserError(
                f"clip: got {list(self.clip)} with loss {self.loss}; a third number is above 1, and the dual "
                f"clip of {', '.join(CLIPPED)}; give two, or another loss"
            )

    @classmethod
    def of(cls, config: Any) -> "Method":
        """The settings of that name which `config` has."""
        given = {f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)}
        if isinstance(given["reward"], dict):
            ((given["reward"], given["chain"]),) = given["reward"].items()
        if hasattr(config, "kl_term"):
            given["kl"], given["kl_estimator"] = config.kl_term
        return cls(**given)
