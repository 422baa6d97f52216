"""What an arm does with the warm-started model: nothing, supervised steps, or GRPO with its own method."""

from dataclasses import replace
from typing import Any

import raise_core as rc

from ..config import DemoConfig
from ..demo import Prepared
from ..grpo import Phases
from ..logbook import Logbook
from ..loop import run_grpo, run_sft
from ..method import Method
from .arms import Arm

STAGE = "learn"  # of metrics.jsonl


def reference_of(arm: Arm, model: Any) -> rc.Reference:
    """Under whose probabilities the arm's rewards are taken."""
    if arm.reference == "policy":
        return rc.PolicyReference(model)
    return (
        rc.FrozenReference(model)
        if arm.reference == "frozen"
        else rc.EmaReference(model, decay=arm.reference)
    )


def learn_grpo(
    arm: Arm,
    model: Any,
    data: Prepared,
    config: DemoConfig,
    log: Logbook,
    *,
    steps: int,
    watch_kl: bool = True,
    phases: Phases | None = None,
) -> None:
    """`steps` GRPO steps of an arm; prompts and draws depend on the seed alone, and so are every arm's."""
    chosen: Any = dict(arm.method)
    run_grpo(
        model, data.train, data.processor.tokenizer, replace(config, grpo_steps=steps), log, name=STAGE,
        sampling=data.sampling, method=replace(Method.of(config), watch_kl=watch_kl, **chosen),
        reference=reference_of(arm, model), phases=phases,
    )  # fmt: skip


def learn(arm: Arm, model: Any, data: Prepared, config: DemoConfig, log: Logbook, *, steps: int) -> None:
    """Train `model` as the arm says."""
    if arm.kind == "sft":
        run_sft(model, data.supervised, config, log, name=STAGE, steps=steps)
    elif arm.kind == "grpo":
        learn_grpo(arm, model, data, config, log, steps=steps)
