"""How large the runs of a study are; every arm has the same."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config import DemoConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Fields that `DemoConfig` has mean the same as there; all else is the demo's default.

    test_questions: held-out ones; shifted_questions: of each shifted test set. Both are least numbers, as a
    video has several questions. counted_steps: steps whose operations are counted.
    """

    train_videos: int
    test_questions: int
    shifted_questions: int
    warm_steps: int
    grpo_steps: int
    prompts: int
    group_size: int = 8
    warm_batch: int = 32
    eval_samples: int = 4
    counted_steps: int = 5

    def demo(self, seed: int, *, out: Path, data: Path) -> DemoConfig:
        """The demo's settings of one run."""
        known = {f.name for f in fields(DemoConfig)}
        mine: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name in known}
        return DemoConfig(out=out, data=data, seed=seed, **mine)


FULL = Sizes(
    train_videos=500, test_questions=250, shifted_questions=120, warm_steps=300, grpo_steps=50, prompts=12
)
QUICK = Sizes(
    train_videos=100, test_questions=40, shifted_questions=20, warm_steps=60, grpo_steps=8, prompts=8,
    eval_samples=2, counted_steps=1,
)  # fmt: skip
SMOKE = Sizes(
    train_videos=12, test_questions=8, shifted_questions=4, warm_steps=2, grpo_steps=2, prompts=2,
    group_size=4, warm_batch=4, eval_samples=2, counted_steps=1,
)  # fmt: skip
