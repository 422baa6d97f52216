"""Types of the settings: a name or number alone, or a name with its value."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)

from .config import RewardKind
from .media.sampling import Sampling

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]

MIN_PIXELS = 16 * 28 * 28  # smaller pictures are enlarged to this


class FrameRate(BaseModel):
    """Frames for each second of video, between `min` and `max` in all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fps: Positive
    min: Annotated[int, Field(ge=2)] = 4
    max: Annotated[int, Field(ge=2)] = 768

    @model_validator(mode="after")
    def _ordered(self) -> "FrameRate":
        return _ordered(self, self.min, self.max)


class PixelBounds(BaseModel):
    """Fewest and most pixels of a frame or image; it is enlarged or reduced to lie between them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: Count
    max: Count

    @model_validator(mode="after")
    def _ordered(self) -> "PixelBounds":
        return _ordered(self, self.min, self.max)


def _ordered(given: Any, low: int, high: int) -> Any:
    if low > high:
        raise ValueError(f"min is {low}, max {high}; wanted min <= max")
    return given


FrameCount = Annotated[int, Field(ge=2)] | FrameRate
Pixels = Count | PixelBounds


def sampling_of(frames: int | FrameRate, pixels: int | PixelBounds) -> Sampling:
    """Which frames of a video, and how large."""
    low, high = (pixels.min, pixels.max) if isinstance(pixels, PixelBounds) else (MIN_PIXELS, pixels)
    bounds = {"min_pixels": min(low, high), "max_pixels": high}
    if isinstance(frames, FrameRate):
        return Sampling(fps=frames.fps, min_frames=frames.min, max_frames=frames.max, **bounds)
    return Sampling(frames=frames, **bounds)


class DataFile(BaseModel):
    """A file of rows; a path alone stands for one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    root: Path | None = None  # folder its media paths are taken under; the file's own when not given
    reward: Literal["scre", "igsr"] | None = None  # route of its rows, in place of their problem types'
    frames: FrameCount | None = None  # in place of the configuration's
    pixels: Pixels | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, (str, Path)) else given

    @model_serializer(mode="wrap")
    def _to_path(self, write: Any) -> Any:
        given = {name: value for name, value in write(self).items() if value is not None}
        given["path"] = str(self.path)
        return given if len(given) > 1 else given["path"]


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, (str, Path, Mapping)) else given


DataFiles = Annotated[tuple[DataFile, ...], BeforeValidator(_as_list)]


def _engine(given: str) -> str:
    if given in ("generate", "vllm") or given.startswith(("http://", "https://")):
        return given
    raise ValueError("wanted 'generate', 'vllm' or the http://… address of a vLLM server")


class ChainOfStep(BaseModel):
    """The reward of a process reward model; its folder alone stands for one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prm: Annotated[str, Field(min_length=1)]  # folder or Hugging Face id, of the policy's own tokens
    share: Share = 0.2  # of the steps in the reward
    per_step: Weight = 0.0  # weight of each step's own advantage on its tokens; true is 1
    answer: Literal["prm", "text"] = "prm"  # whose score of the answer counts

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, given: Any) -> Any:
        return {"prm": given} if isinstance(given, str) else given


def _weights(given: Any) -> Any:
    if isinstance(given, Mapping):
        return given
    raise ValueError("wanted weights by name, as in {format: 0.1, grpo-care: 0.5}")


One = Field(min_length=1, max_length=1)  # a mapping of one name to its value
Clip = tuple[Positive, Positive] | tuple[Positive, Positive, Positive]
Engine = Annotated[str, AfterValidator(_engine)]
KlEstimator = Literal["k1", "k2", "k3"]
Reward = RewardKind | Annotated[dict[Literal["chain-of-step"], ChainOfStep], One]
Kl = Weight | Annotated[dict[KlEstimator, Weight], One]
Reference = Literal["ema", "frozen", "policy"] | Annotated[dict[Literal["ema"], Share], One]
Bonuses = Annotated[dict[Literal["format", "t-grpo", "grpo-care"], Weight], BeforeValidator(_weights)]
