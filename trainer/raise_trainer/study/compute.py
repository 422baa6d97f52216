"""Equal compute: the operations of a step of each arm, counted once, and the steps that the budget buys.

The budget is what the base arm's GRPO steps cost. Operations are those of the matrix products, attention
included: sampling, the passes that rewards need, the update. What only fills the log is not counted.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..grpo import Phases
from ..logbook import Logbook
from ..loop import run_sft
from .arms import ARMS, BASE, Arm
from .learning import learn_grpo
from .seeds import Seed
from .sizes import Sizes


class CountedPhases(Phases):
    """Counts floating-point operations per phase as well as seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """`with phases("score"):` counts what runs inside; phases do not nest."""
        with super().__call__(name), FlopCounterMode(display=False) as counter:
            yield
        self.operations[name] = self.operations.get(name, 0) + int(counter.get_total_flops())


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in `work`, attention included."""
    with _countable(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _countable() -> Any:
    # only the plain implementation of attention is made of operations that the counter knows on a CPU
    return sdpa_kernel(SDPBackend.MATH)


def step_operations(arm: Arm, seed: Seed, model: Any, sizes: Sizes, log: Logbook) -> dict[str, float]:
    """Operations of one step of an arm by phase, as a mean over the first `counted_steps` after `model`.

    Phases: rollout, score, update; for supervised steps update alone. No score phase for an arm whose
    learning does not need it. `model` stays as it is.
    """
    steps, twin = sizes.counted_steps, copy.deepcopy(model)
    config = replace(seed.config, grpo_steps=steps)
    if arm.kind == "none":
        return {}
    if arm.kind == "sft":
        counted = operations(
            lambda: run_sft(twin, seed.data.supervised, config, log, name="counted", steps=steps)
        )
        return {"update": counted / steps}
    phases = CountedPhases()
    with _countable():
        learn_grpo(arm, twin, seed.data, config, log, steps=steps, watch_kl=False, phases=phases)
    counts = {name: n / steps for name, n in phases.operations.items()}
    if not arm.reads_own_answers:  # that pass is the base's own one, over the same prompts and draws
        counts["score"] -= step_operations(ARMS[BASE], seed, model, sizes, log)["score"]
    return counts if arm.reads_reference else {k: v for k, v in counts.items() if k != "score"}


def equal_steps(per_step: dict[str, dict[str, float]], arm: Arm, base_steps: int) -> int:
    """Steps of an arm that cost what `base_steps` of the base cost; at least 1, and 0 without training.

    per_step: `step_operations` by arm, with the base among them.
    """
    if arm.kind == "none":
        return 0
    budget = base_steps * sum(per_step[BASE].values())
    return max(1, round(budget / sum(per_step[arm.name].values())))
