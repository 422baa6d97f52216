"""What `raise-core train` and `raise-core sft` do, in one typed object: a YAML file and key=value pairs."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError
from .media.sampling import Sampling
from .train_fields import (
    Bonuses,
    Clip,
    Count,
    DataFile,
    DataFiles,
    Engine,
    FrameCount,
    Kl,
    KlEstimator,
    Number,
    Pixels,
    Positive,
    Reference,
    Reward,
    Share,
    Weight,
    sampling_of,
)

# What may differ between a checkpoint's run and the one that goes on from it.
FREE = ("out", "steps", "save_every", "eval_every", "workers", "frame_cache", "micro_tokens", "tracker")
EMA_DECAY = 0.995


class TrainConfig(BaseModel):
    """Every setting; the text below a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """Hugging Face id or folder of the model to train"""
    data: DataFiles = Field(min_length=1)
    """JSON or JSON-lines files in the Video-R1 schema: paths, or
    {path: …, root: folder of its media, reward: scre | igsr, frames: …, pixels: …}"""
    eval_data: DataFiles = ()
    """files of rows to evaluate on while training, in the same form"""
    out: Path
    """folder of the run: checkpoints, metrics.jsonl, report.html"""
    seed: Number = 0
    """of the order of the rows, the sampling and every generator"""
    template: str = "think"
    """name of a prompt template (templates/prompts/*.yaml), or a path to one"""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the passes; trained weights are kept in float32 beside it"""
    attention: Literal["sdpa", "eager", "flash"] = "sdpa"
    """attention implementation of the model; groups are packed with sdpa (FlashAttention on a GPU), eager"""
    lora_rank: Number = 0
    """rank of LoRA adapters on all linear layers of the language model; 0 trains the weights themselves"""
    freeze_vision: bool = True
    """leave the vision tower as it is"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass"""
    liger: bool = False
    """Liger's kernels in the model's layers (GPU; package liger-kernel)"""

    reward: Reward = "scre-igsr"
    """confidence in right answers, the text score alone (accuracy), another one of docs/rewards.md, or
    {chain-of-step: PRM}, {chain-of-step: {prm: …, share: 0.2, per_step: 0, answer: prm}} (docs/steps.md)"""
    confidence_share: Share = 1.0
    """k in text * (1 - k) + k * confidence reward"""
    bonus: Bonuses = {}
    """added to the reward: {format: w} for the form <think>…</think><answer>…</answer>, {t-grpo: w},
    {grpo-care: w}"""
    reference: Reference = "ema"
    """whose confidence is the reward; {ema: d} keeps the share d of itself every 10 steps (0.995)"""

    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo"] = "dr_grpo"
    """the surrogate, and how tokens are averaged"""
    scale: Literal["group", "batch", "none"] = "group"
    """what an advantage is divided by"""
    min_std: Weight = 0.02
    """smallest divisor of an advantage, in units of reward"""
    clip: Clip = (0.2, 0.2)
    """how far a ratio counts below and above 1; (0.2, 0.28) is clip-higher, a third number the dual clip;
    gspo wants about (3e-4, 4e-4), cispo bounds a token's weight at 1 + the second, sapo takes neither"""
    kl: Kl = 0.0
    """weight of the KL term to the reference; {k1 | k2 | k3: weight} names the estimator (k3); k1 pulls
    nowhere on average"""
    mask_truncated: bool = True
    """leave completions that reached max_new_tokens out of the loss"""

    steps: Number = 1000
    """optimiser steps; GRPO: rollouts times `updates`"""
    prompts: Count = 8
    """prompts in a rollout, over all processes; sft: examples in a step"""
    group_size: Count = 8
    """completions for each prompt (G)"""
    updates: Count = 1
    """optimiser steps for each rollout"""
    resample: Number = 0
    """most further rounds of prompts in place of groups whose rewards are all equal (dynamic sampling)"""
    max_new_tokens: Count = 768
    """longest completion, in tokens"""
    temperature: Positive = 1.0
    """of the sampling and of the policy ratio; confidence is taken at 1"""
    engine: Engine = "generate"
    """what samples: the model itself, vllm in this process, or the address of a vLLM server"""
    micro_tokens: Count = 16384
    """tokens in one forward pass; a step's gradient does not depend on it"""
    lr: Positive = 1e-6
    """peak learning rate; ten steps of warm-up, then linear decay to a tenth"""

    frames: FrameCount = 16
    """frames of a video: a number spread evenly, or {fps: for each second, min: 4, max: 768}"""
    pixels: Pixels = 128 * 28 * 28
    """most pixels of a frame or image, or {min: …, max: …}"""
    workers: Number = 2
    """processes that decode; 0 decodes in the training process"""
    frame_cache: Path | None = None
    """folder that keeps decoded frames"""
    on_bad_media: Literal["skip", "fail"] = "skip"
    """a row or medium that cannot be used is named, counted and left out, or stops the run"""

    save_every: Count = 100
    """steps between checkpoints; the last two are kept"""
    eval_every: Number = 0
    """steps between evaluations; 0 is at the end alone"""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """where metrics go besides metrics.jsonl"""

    @property
    def ema_decay(self) -> float:
        """Share of itself that an EMA reference keeps every 10 steps."""
        return self.reference["ema"] if isinstance(self.reference, dict) else EMA_DECAY

    @property
    def kl_term(self) -> tuple[float, KlEstimator]:
        """Weight of the KL term, and its estimator."""
        if isinstance(self.kl, dict):
            return next((weight, name) for name, weight in self.kl.items())
        return self.kl, "k3"

    def sampling(self, file: DataFile | None = None) -> Sampling:
        """Which frames of a video, and how large: of a data file, where it has its own."""
        frames = file.frames if file and file.frames is not None else self.frames
        pixels = file.pixels if file and file.pixels is not None else self.pixels
        return sampling_of(frames, pixels)


def load(file: Path | None, pairs: Sequence[str] = ()) -> TrainConfig:
    """The settings of a YAML file, changed by `key=value` pairs. UserError naming the first fault."""
    return check(read_settings(file, pairs))


def read_settings(file: Path | None, pairs: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a YAML file, changed by `key=value` pairs, not checked. UserError where it is none."""
    given: dict[str, Any] = {}
    if file is not None:
        try:
            read = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; name a YAML file of settings") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not YAML ({' '.join(str(error).split())[:200]})") from None
        if not isinstance(read, Mapping):
            raise UserError(f"{file}: got {type(read).__name__}, wanted `key: value` lines")
        given |= read
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r}: wanted key=value, such as steps=200")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            given[key] = value
    return given


def check(given: Mapping[str, Any]) -> TrainConfig:
    """Settings by name, checked. UserError naming an unknown key with its nearest one, or a wrong value."""
    return checked(TrainConfig, given)


Settings = TypeVar("Settings", bound=BaseModel)


def checked(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """As `check`, for settings of any kind."""
    known = list(kind.model_fields)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"unknown setting {key!r}; {hint}")
    try:
        return kind(**given)
    except ValidationError as error:
        raise UserError(_fault(error)) from None


def _fault(error: ValidationError) -> str:
    """The first wrong field and why; of a field with several forms, the form that was meant."""
    faults = error.errors()
    first = faults[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    forms = [fault for fault in faults if fault["loc"][:1] == first["loc"][:1]]
    meant = [fault for fault in forms if not fault["type"].endswith("_type")] or forms
    got = "nothing" if first["type"] == "missing" else repr(meant[0]["input"])
    said = [fault["msg"].removeprefix("Value error, ") for fault in meant]
    return f"{name}: got {got}; " + ", or ".join(dict.fromkeys(s[0].lower() + s[1:] for s in said))


def as_yaml(config: BaseModel) -> str:
    """The settings with their documentation, as a YAML file that `load` reads."""
    values = config.model_dump(mode="json")
    lines = list[str]()
    for name, field in type(config).model_fields.items():
        lines.append(f"# {' '.join((field.description or '').split())}")
        value = yaml.safe_dump(values[name], default_flow_style=True, width=1000)
        lines.append(f"{name}: {value.removesuffix('...' + chr(10)).strip()}")
    return "\n".join(lines) + "\n"
