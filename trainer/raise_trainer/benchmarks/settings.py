"""What `raise-core eval` was asked for. Light: the command's --help loads it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError

Source = Literal["auto", "published", "video_r1"]
NAMES = ("vsibench", "videommmu", "mmvu", "mvbench", "tempcompass", "videomme")
SCORERS = {"video_r1": ("video_r1",), "official": ("official",), "both": ("video_r1", "official")}


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What `raise-core eval` was asked for; see its --help. batch: completions that grow side by side."""

    model: str
    bench: tuple[str, ...]
    data: Path
    out: Path
    source: Source = "auto"
    scorer: str = "both"
    frames: int = 16
    pixels: int = 256 * 28 * 28
    template: str = "think"
    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 1024
    seed: int = 0
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    batch: int = 8
    workers: int = 2
    limit: int | None = None
    retry: bool = False

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"--samples {self.samples} at temperature 0: greedy samples are all equal; give --temperature"
            )
        least = {"samples": 1, "max_new_tokens": 1, "batch": 1, "pixels": 1, "frames": 2}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {lowest}"
                )
        if (
            not 0 <= self.temperature < math.inf
            or self.workers < 0
            or (self.limit is not None and self.limit < 1)
        ):
            raise UserError(
                f"--temperature {self.temperature} --workers {self.workers} --limit {self.limit}: expected "
                "numbers of at least 0, 0 and 1"
            )

    def made_by(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """What an answer depends on; the number of samples, benchmarks and rows may change.

        files: what stands for each benchmark's files.
        """
        names = (
            "model", "frames", "pixels", "template", "temperature", "max_new_tokens", "seed", "dtype",
            "attention",
        )  # fmt: skip
        own = {name: getattr(self, name) for name in names}
        return own | {f"data/{name}": mark for name, mark in files.items()}
