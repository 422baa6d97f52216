"""The arms of the study: what each does after the warm start that it shares with the others of its seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError

MAIN_SEEDS, EXPLORATORY_SEEDS = 8, 3
BASE = "scre-igsr"  # its cost is everybody's budget; exploratory arms are compared with it


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way on from the warm start.

    name: of its files and on the command line. kind: no training, supervised steps, or GRPO. method: fields
    of `Method` that differ from the demo's. reference: under whose probabilities rewards are taken; a number
    is the decay of an EMA. topic: the question an exploratory arm belongs to, "" in the main table.
    """

    name: str
    title: str
    kind: Literal["none", "sft", "grpo"] = "grpo"
    method: Mapping[str, Any] = field(default_factory=dict)
    reference: Literal["policy", "frozen"] | float = 0.995
    topic: str = ""

    @property
    def reads_reference(self) -> bool:
        """Whether its learning, and not only what is logged, needs the pass under the reference."""
        accuracy = self.method.get("reward") == "accuracy"
        return not accuracy or bool(self.method.get("kl") or self.method.get("bonus", {}).get("grpo-care"))

    @property
    def reads_own_answers(self) -> bool:
        """Whether its learning, and not only what is logged, needs probabilities of the sampled answers."""
        return self.method.get("reward") != "rlpr"  # which reads the gold answer's

    @property
    def seeds(self) -> int:
        """How many seeds it is run with: 0, 1, …"""
        return EXPLORATORY_SEEDS if self.topic else MAIN_SEEDS


MAIN = (
    Arm(name="warm-start", title="warm start", kind="none"),
    Arm(name="sft", title="continued SFT", kind="sft"),
    Arm(name="grpo", title="GRPO 0/1", method={"reward": "accuracy"}),
    Arm(name="grpo-care", title="GRPO-CARE", method={"reward": "accuracy", "bonus": {"grpo-care": 0.5}}),
    Arm(name="rlpr", title="RLPR", method={"reward": "rlpr"}, reference="policy"),
    Arm(name="scre", title="Video-RAISE, SCRE only", method={"reward": "scre"}),
    Arm(name="scre-igsr", title="Video-RAISE, IGSR paper", method={"reward": "scre-igsr"}),
    Arm(
        name="scre-igsr-balanced",
        title="Video-RAISE, IGSR balanced",
        method={"reward": "scre-igsr-balanced"},
    ),
)


def _swept(topic: str, option: str, *values: float) -> tuple[Arm, ...]:
    name = option.replace("_", "-")
    return tuple(
        Arm(name=f"{name}-{v:g}", title=f"{option} {v:g}", method={"reward": BASE, option: v}, topic=topic)
        for v in values
    )


# Each differs in one thing from the base, whose runs with the same seeds are in the main table; eta 0.1,
# lam 1, tau 0.1, penalty 0.05, min_std 0.02, KL 0 and an EMA of 0.995 are the base's.
EXPLORATORY = (
    Arm(
        name="t-grpo",
        title="T-GRPO, 0/1",
        method={"reward": "accuracy", "bonus": {"t-grpo": 0.3}},
        topic="T-GRPO",
    ),
    Arm(name="reference-policy", title="policy", reference="policy", topic="reward source"),
    Arm(name="reference-frozen", title="frozen", reference="frozen", topic="reward source"),
    Arm(name="reference-ema-0.9", title="EMA 0.9", reference=0.9, topic="reward source"),
    *_swept("KL", "kl", 0.04),
    *_swept("SCRE: eta", "eta", 0.0, 0.5),
    *_swept("SCRE: lam", "lam", 0.0, 4.0),
    *_swept("IGSR: tau", "tau", 0.05, 0.25),
    *_swept("IGSR: penalty", "penalty", 0.0, 0.2),
    *_swept("min_std", "min_std", 0.0, 0.1),
)
ARMS = {arm.name: arm for arm in (*MAIN, *EXPLORATORY)}
QUICK_ARMS = ("warm-start", "sft", "grpo", "scre-igsr")


def _steps(name: str, title: str, kind: Literal["none", "grpo"] = "grpo", **chain: Any) -> Arm:
    return Arm(name=name, title=title, kind=kind, method=chain, topic="Chain-of-Step")


# Of `raise-core study --steps`, in another world. `method` is of `ChainOfStep`, whose PRM is the seed's own.
# With share 0 and answer "text" the text score alone is the reward, a rule's 0 or 1: the PRM only watches.
OUTCOME = "outcome"  # what the others are compared with
STEP_ARMS = {
    a.name: a
    for a in (
        _steps("warm-start", "warm start", "none"),
        _steps(OUTCOME, "outcome 0/1", share=0.0, answer="text"),
        _steps("share-0", "answer only", share=0.0),
        _steps("share-0.2", "step + answer, 0.2", share=0.2),
        _steps("share-0.5", "step + answer, 0.5", share=0.5),
        _steps("share-1", "steps only", share=1.0),
        _steps("per-step", "step + answer, 0.2, per step", share=0.2, per_step=1.0),
    )
}


def arm(name: str, known: Mapping[str, Arm] = ARMS) -> Arm:
    """The arm of that name. UserError, with the known ones, if there is none."""
    if name not in known:
        raise UserError(f"--arms {name}: unknown; known are {', '.join(known)}")
    return known[name]
