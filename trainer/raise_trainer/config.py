"""What a demo run does, in one typed object; every field is a command-line flag."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OnBad = Literal["skip", "fail"]
RewardKind = Literal["scre-igsr", "accuracy"]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a tiny video model from nothing: synthetic videos, supervised warm start, GRPO, held-out
    evaluation."""

    out: Path = Path("runs/demo")
    """folder of the run; must not exist yet, or be empty"""
    data: Path | None = None
    """data folder (clips/, sft.json, train.json, test.json); written under `out` when not given"""
    on_bad: OnBad = "fail"
    """an unusable row or video stops the run, or is left out, counted and named"""
    reward: RewardKind = "scre-igsr"
    """confidence in right answers, or the text score alone"""
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
    """of the sampling; confidence is always taken at 1"""
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
