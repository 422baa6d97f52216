"""What `raise-core demo-steps` does, in one typed object; every field is a command-line flag."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """Settings of the demo in steps; the defaults take minutes on 2 cores."""

    out: Path = Path("runs/demo-steps")
    """folder of the run; must not exist yet, or be empty"""
    start: Path | None = None
    """folder of an earlier run with this seed: its policy, and its PRM if there is one, are trained on"""
    seed: int = 0
    """of the data, the weights and the sampling"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the models run"""
    threads: int = 1
    """CPU threads"""
    frames: int = 4
    """frames sampled per video"""
    train_videos: int = 800
    """videos to train on"""
    test_videos: int = 96
    """held-out videos, a question each"""
    look_steps: int = 400
    """supervised steps on right answers alone, in which the model learns to see"""
    look_batch: int = 32
    """examples in each of them"""
    warm_steps: int = 520
    """supervised steps on structured chains, some of them wrong"""
    own_chains: int = 2
    """chains of each training video that the warm-started policy writes for the PRM to learn from"""
    prm_steps: int = 450
    """steps of the PRM, which starts from the warm-started policy"""
    batch: int = 16
    """examples in a supervised step and in one of the PRM"""
    lr: float = 2e-3
    """learning rate of looking; half of it is that of the chains and of the PRM"""
    n: tuple[int, ...] = (1, 2, 4, 8, 16)
    """numbers of samples that search is measured at"""
    keep: int = 1
    """beams that step beam search keeps"""
    samples: int = 8
    """samples of each test question after a round of preference optimisation"""
    rounds: int = 3
    """rounds of preference optimisation"""
    paths: int = 16
    """paths sampled for each question of a round"""
    questions: int = 96
    """questions of a round"""
    min_gap: float = 0.1
    """smallest difference in reward between the two of a pair"""
    beta: float = 0.1
    """of the preference loss"""
    nll_weight: float = 1.0
    """weight of the chosen path's negative log-probability"""
    dpo_lr: float = 2e-4
    """learning rate of the preference steps"""
    dpo_batch: int = 8
    """pairs in a step"""
    epochs: int = 2
    """times each pair is used in a round"""
    smoke: bool = False
    """a run of seconds that exercises every stage; its figures mean nothing"""


SMOKE: dict[str, Any] = {
    "train_videos": 12, "test_videos": 3, "look_steps": 3, "look_batch": 4, "warm_steps": 50,
    "own_chains": 1, "prm_steps": 3, "batch": 4, "n": (1, 2),
    "rounds": 1, "paths": 4, "questions": 4, "dpo_batch": 2, "samples": 2, "epochs": 1, "min_gap": 0.0,
}  # fmt: skip
