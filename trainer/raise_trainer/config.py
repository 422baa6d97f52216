"""What a demo run does, in one typed object; every field is a command-line flag."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import UserError

OnBad = Literal["skip", "fail"]
RewardKind = Literal[
    "scre-igsr",
    "scre-igsr-balanced",
    "scre",
    "accuracy",
    "likelihood",
    "mean-logp",
    "rlpr",
    "jepo",
    "nover",
    "intuitor",
    "rent",
    "em-rl",
    "deepconf",
    "min-prob",
]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo; the defaults take minutes on 2 cores."""

    out: Path = Path("runs/demo")
    """folder of the run; must not exist yet, or be empty"""
    data: Path | None = None
    """data folder (clips/, sft.json, train.json, test.json); written under `out` when not given"""
    on_bad: OnBad = "fail"
    """an unusable row or video stops the run, or is left out, counted and named"""
    reward: RewardKind = "scre-igsr"
    """confidence in right answers, the text score alone (accuracy), or another one of docs/rewards.md"""
    seed: int = 0
    """of the data, the weights and the sampling"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the model runs"""
    threads: int = 1
    """CPU threads; so small a model gains little from a second one, and loses much where cores are shared"""
    train_videos: int = 700
    """videos to train on"""
    test_questions: int = 500
    """held-out questions, at least; their videos are not among the training videos"""
    frames: int = 8
    """frames sampled per video"""
    warm_steps: int = 360
    """supervised steps before GRPO"""
    warm_batch: int = 32
    """examples per supervised step"""
    warm_lr: float = 2e-3
    """learning rate of the supervised steps"""
    grpo_steps: int = 120
    """policy-gradient steps"""
    prompts: int = 16
    """prompts per GRPO step"""
    group_size: int = 8
    """completions per prompt (G)"""
    max_new_tokens: int = 28
    """longest completion, in tokens"""
    temperature: float = 1.0
    """of the sampling; the update and the confidence are always taken at 1"""
    grpo_lr: float = 5e-4
    """learning rate of the GRPO steps"""
    loss: Literal["grpo", "dapo", "dr_grpo"] = "dr_grpo"
    """how tokens are averaged"""
    min_std: float = 0.02
    """smallest divisor of an advantage, in units of reward"""
    ema_decay: float = 0.995
    """weight of the old reference, every 10 steps"""
    eval_samples: int = 8
    """samples per held-out question at temperature 1"""
    smoke: bool = False
    """a run of seconds that exercises every stage; its figures mean nothing"""


def check(config: DemoConfig) -> None:
    """UserError naming the first flag whose value makes no sense, before anything is written."""
    at_least = {
        "threads": 1, "train_videos": 1, "test_questions": 1, "frames": 2, "warm_steps": 0, "warm_batch": 1,
        "grpo_steps": 0, "prompts": 1, "group_size": 1, "max_new_tokens": 1, "eval_samples": 1,
        "min_std": 0.0,
    }  # fmt: skip
    for name, least in at_least.items():
        if not getattr(config, name) >= least:
            _refuse(name, getattr(config, name), f"{least} or more")
    for name in ("warm_lr", "grpo_lr", "temperature"):
        if not 0 < getattr(config, name) < float("inf"):
            _refuse(name, getattr(config, name), "a number above 0")
    if not 0 <= config.ema_decay <= 1:
        _refuse("ema_decay", config.ema_decay, "a number in [0, 1]")


def _refuse(name: str, got: object, wanted: str) -> None:
    raise UserError(f"--{name.replace('_', '-')} {got}: expected {wanted}")
