"""What `raise-core prm label` does, in one typed object."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from ..train_config import TrainConfig, check, checked, read_settings
from ..train_fields import Count, DataFiles, FrameCount, Number, Pixels, Positive


class LabelConfig(BaseModel):
    """Every setting; the text below a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data: DataFiles = Field(min_length=1)
    """files of rows with steps, as in training"""
    out: Path
    """JSON-lines file of the labelled rows; rows it has already are not done again"""
    by: Literal["rollouts", "judge"] = "rollouts"
    """rollouts: share of continuations that come out right (Math-Shepherd); judge: a model is asked"""
    model: str
    """that continues the chains: Hugging Face id or folder; or the judge's name at its endpoint"""
    on_bad_media: Literal["skip", "fail"] = "skip"
    """a row that cannot be used is named, counted and left out, or stops the command"""

    rollouts: Count = 16
    """continuations from each step"""
    labels: Literal["share", "hard"] = "share"
    """share: what the rollouts found; hard: good if any came out right, else bad"""
    max_new_tokens: Count = 768
    """longest continuation, in tokens"""
    temperature: Positive = 1.0
    """of the continuations"""
    seed: Number = 0
    """of the continuations"""
    prompts: Count = 8
    """prefixes continued at a time"""
    template: str = "chain_of_step"
    """prompt template, as in training"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the weights"""
    frames: FrameCount = 16
    """as in training"""
    pixels: Pixels = 128 * 28 * 28
    """as in training"""
    workers: Number = 2
    """processes that decode"""

    url: str | None = None
    """of the judge's OpenAI-compatible endpoint, such as http://localhost:8000/v1"""
    key_variable: str = "OPENAI_API_KEY"
    """environment variable with its key; none is sent where it is not set"""
    timeout: Positive = 120.0
    """seconds that one request may take"""
    retries: Number = 5
    """times a request is made again after a time-out, a refused connection, status 429 or 5xx"""
    cache: Path | None = None
    """JSON-lines file of the judge's replies, which are not asked for again; OUT.replies.jsonl"""

    def training(self) -> TrainConfig:
        """The same in the words of a training run: model, prompts and media."""
        names = (
            "model", "data", "out", "seed", "template", "dtype", "max_new_tokens", "temperature", "prompts",
            "frames", "pixels", "workers", "on_bad_media",
        )  # fmt: skip
        given = self.model_dump(mode="json", include=set(names))
        return check(given | {"group_size": self.rollouts, "gradient_checkpointing": False})


def load_label_config(given: Sequence[str]) -> LabelConfig:
    """The settings of one YAML file and of `key=value` pairs. UserError naming the first fault."""
    files = [one for one in given if "=" not in one]
    if len(files) > 1:
        raise UserError(f"{files[1]!r}: a second file; give one YAML file, and changes to it as key=value")
    read = read_settings(Path(files[0]) if files else None, [one for one in given if "=" in one])
    config = checked(LabelConfig, read)
    if config.by == "judge" and config.url is None:
        raise UserError("url: got nothing; by=judge needs the address of an OpenAI-compatible endpoint")
    return config
