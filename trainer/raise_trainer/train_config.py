"""What `raise-core train` and `raise-core sft` do, in one typed object: a YAML file and key=value pairs."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from .errors import UserError
from .media.sampling import Sampling

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

MIN_PIXELS = 16 * 28 * 28  # smaller pictures are enlarged to this
# What may differ between a checkpoint's run and the one that goes on from it.
FREE = ("out", "steps", "save_every", "eval_every", "workers", "frame_cache", "micro_tokens")


class DataFile(BaseModel):
    """A file of rows; a path alone stands for one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    root: Path | None = None  # of its media; the configuration's data_root when not given
    reward: Literal["scre", "igsr"] | None = None  # route of its rows, in place of their problem types'

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, (str, Path)) else given

    @model_serializer
    def _to_path(self) -> Any:
        given = {"path": str(self.path), "root": self.root and str(self.root), "reward": self.reward}
        return given["path"] if self.root is None and self.reward is None else given


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, (str, Path, Mapping)) else given


DataFiles = Annotated[tuple[DataFile, ...], BeforeValidator(_as_list)]


class TrainConfig(BaseModel):
    """Every setting; the text below a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """Hugging Face id or folder of the model to train"""
    data: DataFiles = Field(min_length=1)
    """JSON or JSON-lines files in the Video-R1 schema: paths, or {path: …, root: …, reward: scre | igsr}"""
    data_root: Path | None = None
    """folder the rows' media paths are taken under; each data file's own when not given"""
    eval_data: DataFiles = ()
    """files of rows to evaluate on while training"""
    out: Path
    """folder of the run: checkpoints, metrics.jsonl, report.html"""
    seed: Annotated[int, Field(ge=0)] = 0
    """of the order of the rows, the sampling and every generator"""
    template: str = "think"
    """name of a prompt template (templates/prompts/*.yaml), or a path to one"""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the weights"""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """attention implementation of the model; packed groups need one of these"""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """rank of LoRA adapters on all linear layers of the language model; 0 trains the weights themselves"""
    freeze_vision: bool = True
    """leave the vision tower as it is"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass"""

    reward: Literal["scre-igsr", "accuracy"] = "scre-igsr"
    """confidence in right answers, or the text score alone"""
    confidence_share: Share = 1.0
    """k in text * (1 - k) + k * confidence reward"""
    format_weight: Annotated[float, Field(ge=0)] = 0.0
    """added for a completion of the form <think>…</think><answer>…</answer>"""
    igsr_variant: Literal["paper", "balanced"] = "paper"
    """of the open-ended reward (DESIGN.md, section 3)"""
    reference: Literal["ema", "frozen", "policy"] = "ema"
    """whose confidence is the reward"""
    ema_decay: Share = 0.995
    """weight of the old reference, every 10 steps"""

    loss: Literal["grpo", "dapo", "dr_grpo"] = "dr_grpo"
    """how tokens are averaged"""
    scale: Literal["group", "batch", "none"] = "group"
    """what an advantage is divided by"""
    min_std: Annotated[float, Field(ge=0)] = 0.02
    """smallest divisor of an advantage, in units of reward"""
    clip: tuple[Positive, Positive] = (0.2, 0.2)
    """how far a ratio counts below and above 1; (0.2, 0.28) is clip-higher"""
    kl: Annotated[float, Field(ge=0)] = 0.0
    """weight of the KL term to the reference"""
    mask_truncated: bool = True
    """leave completions that reached max_new_tokens out of the loss"""

    steps: Annotated[int, Field(ge=0)] = 1000
    """optimiser steps; GRPO: rollouts times `updates`"""
    prompts: Count = 8
    """prompts in a rollout, over all processes; sft: examples in a step"""
    group_size: Count = 8
    """completions for each prompt (G)"""
    updates: Count = 1
    """optimiser steps for each rollout"""
    max_new_tokens: Count = 768
    """longest completion, in tokens"""
    temperature: Positive = 1.0
    """of the sampling and of the policy ratio; confidence is taken at 1"""
    micro_tokens: Count = 16384
    """tokens in one forward pass; a step's gradient does not depend on it"""
    lr: Positive = 1e-6
    """peak learning rate; ten steps of warm-up, then linear decay to a tenth"""

    frames: Annotated[int, Field(ge=2)] = 16
    """most frames sampled from a video"""
    fps: Annotated[float, Field(ge=0)] = 0.0
    """frames sampled for each second, up to `frames`; 0 spreads `frames` evenly"""
    max_pixels: Count = 128 * 28 * 28
    """most pixels of a frame or image"""
    workers: Annotated[int, Field(ge=0)] = 2
    """processes that decode; 0 decodes in the training process"""
    frame_cache: Path | None = None
    """folder that keeps decoded frames"""
    on_bad_media: Literal["skip", "fail"] = "skip"
    """a row or medium that cannot be used is named, counted and left out, or stops the run"""

    save_every: Count = 100
    """steps between checkpoints; the last two are kept"""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """steps between evaluations; 0 is at the end alone"""

    def sampling(self) -> Sampling:
        """Which frames of a video, and how large."""
        pixels = {"min_pixels": min(MIN_PIXELS, self.max_pixels), "max_pixels": self.max_pixels}
        if not self.fps:
            return Sampling(frames=self.frames, **pixels)
        return Sampling(fps=self.fps, min_frames=min(4, self.frames), max_frames=self.frames, **pixels)


def load(file: Path | None, pairs: Sequence[str] = ()) -> TrainConfig:
    """The settings of a YAML file, changed by `key=value` pairs. UserError naming the first fault."""
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
    return check(given)


def check(given: Mapping[str, Any]) -> TrainConfig:
    """Settings by name, checked. UserError naming an unknown key with its nearest one, or a wrong value."""
    known = list(TrainConfig.model_fields)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"unknown setting {key!r}; {hint}")
    try:
        return TrainConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        got = "nothing" if first["type"] == "missing" else repr(first["input"])
        raise UserError(f"{name}: got {got}; {first['msg'][0].lower()}{first['msg'][1:]}") from None


def as_yaml(config: TrainConfig) -> str:
    """The settings with their documentation, as a YAML file that `load` reads."""
    values = config.model_dump(mode="json")
    lines = list[str]()
    for name, field in TrainConfig.model_fields.items():
        lines.append(f"# {' '.join((field.description or '').split())}")
        value = yaml.safe_dump(values[name], default_flow_style=True, width=1000)
        lines.append(f"{name}: {value.removesuffix('...' + chr(10)).strip()}")
    return "\n".join(lines) + "\n"
