"""What `raise-core dpo` does, in one typed object."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from ..train_config import TrainConfig, check, checked, read_settings
from ..train_fields import Count, DataFiles, FrameCount, Number, Pixels, Positive, Share, Weight

# What may differ between a run and the one that goes on from it.
FREE = ("out", "rounds", "prompts", "save_every", "workers", "frame_cache", "micro_tokens", "tracker")
SHARED = (
    "seed", "template", "dtype", "attention", "lora_rank", "freeze_vision", "gradient_checkpointing",
    "max_new_tokens", "temperature", "micro_tokens", "lr", "frames", "pixels", "workers", "frame_cache",
    "on_bad_media", "save_every", "tracker",
)  # fmt: skip


class DpoConfig(BaseModel):
    """Every setting; the text below a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """that has learned to write chains: Hugging Face id or folder"""
    prm: str
    """process reward model that scores paths: the model folder of a checkpoint of raise-core prm train"""
    data: DataFiles = Field(min_length=1)
    """files of questions, as in training"""
    out: Path
    """folder of the run; each round has paths, pairs and a training run in it"""
    seed: Number = 0
    """of the sampling and of the order of rows and pairs"""

    rounds: Count = 3
    """times that paths are sampled from the last policy and trained on"""
    start: Literal["model", "last"] = "model"
    """what a round's policy and reference begin as: `model` (as in Chain-of-Step), or the last policy"""
    rows: Number = 0
    """questions of a round, others in the next one; 0 takes all"""
    paths: Count = 16
    """paths sampled for each question"""
    min_gap: Weight = 0.1
    """smallest difference of the rewards of a pair; the paper names none"""
    step_share: Share = 0.2
    """of the steps in a path's reward"""

    beta: Positive = 0.1
    """of the preference loss"""
    nll_weight: Weight = 1.0
    """weight of the chosen path's mean negative log-probability; 0 leaves it out"""
    pairs: Count = 32
    """pairs in an optimiser step, or as many as a round has"""
    epochs: Count = 1
    """times each pair is used in its round"""
    lr: Positive = 1e-6
    """peak learning rate of each round"""

    template: str = "chain_of_step"
    """prompt template, as in training"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the passes; trained weights are kept in float32 beside it"""
    attention: Literal["sdpa", "eager", "flash"] = "sdpa"
    """as in training"""
    lora_rank: Number = 0
    """rank of LoRA adapters that each round trains, as in training; 0 trains the weights themselves"""
    freeze_vision: bool = True
    """leave the vision tower as it is"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass"""
    max_new_tokens: Count = 768
    """longest path, in tokens"""
    temperature: Positive = 1.0
    """of the paths"""
    prompts: Count = 8
    """questions sampled at a time"""
    micro_tokens: Count = 16384
    """tokens in one forward pass"""

    frames: FrameCount = 16
    """as in training"""
    pixels: Pixels = 128 * 28 * 28
    """as in training"""
    workers: Number = 2
    """processes that decode"""
    frame_cache: Path | None = None
    """folder that keeps decoded frames"""
    on_bad_media: Literal["skip", "fail"] = "skip"
    """a row or medium that cannot be used is named, counted and left out, or stops the run"""
    save_every: Count = 100
    """optimiser steps between checkpoints; a round's last step has one"""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """where metrics go besides metrics.jsonl"""

    def training(self, **other: Any) -> TrainConfig:
        """The same in the words of a training run, with other settings of it."""
        given = self.model_dump(mode="json", include={*SHARED, "model", "data", "out"})
        fixed = {"reference": "frozen", "group_size": self.paths}
        return check(given | fixed | other)


def load_dpo_config(given: Sequence[str]) -> DpoConfig:
    """The settings of one YAML file and of `key=value` pairs. UserError naming the first fault."""
    files = [one for one in given if "=" not in one]
    if len(files) > 1:
        raise UserError(f"{files[1]!r}: a second file; give one YAML file, and changes to it as key=value")
    read = read_settings(Path(files[0]) if files else None, [one for one in given if "=" in one])
    config = checked(DpoConfig, read)
    if config.paths < 2:
        raise UserError(f"paths: got {config.paths}, wanted 2 or more; a pair is two of them")
    return config
