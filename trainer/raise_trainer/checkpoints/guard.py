"""A step whose loss or gradient is not finite is skipped, counted and kept for a look."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import ranks
from .errors import TooManyBadSteps
from .files import Writer


class StepGuard:
    """Decides before `optimizer.step()` whether it may be taken. Put it into `TrainingState.others`.

    folder: where bad batches are dumped, `bad-step-12/` with batch.json and batch.safetensors; with several
        processes `bad-step-12-rank-1/`, by those whose own figures are bad. limit: bad steps in a row that
        end the run. keep: how many dumps are kept, the newest. skipped: bad steps so far; in_a_row: just now.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        limit: int = 3,
        keep: int = 10,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit: got {limit}, wanted 1 or more bad steps in a row")
        if keep < 1:
            raise ValueError(f"keep: got {keep}, wanted 1 or more dumps")
        self.folder = Path(folder)
        self.limit, self.keep = limit, keep
        self.skipped = self.in_a_row = 0
        self._say = say or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=4))

    def good(self, step: int, *, batch: Any = None, **figures: float) -> bool:
        """Whether all `figures` (loss, grad_norm, ...) are finite on all ranks; else dump, count and skip.

        step: finished steps before this one. batch: trees of tensors, texts and numbers; of anything else its
        `repr` is kept. All ranks call it and get the same answer. TooManyBadSteps at `limit` in a row.
        """
        values = {name: float(value) for name, value in figures.items()}
        own_bad = not all(map(math.isfinite, values.values()))
        if not ranks.on_any(own_bad):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        text = ", ".join(f"{name} {value}" for name, value in values.items())
        where = self._dump(step, values, batch) if own_bad else "another rank's"
        told = f"step {step} is skipped, number {self.in_a_row} in a row: {text}; batch: {where}"
        if self.in_a_row >= self.limit:
            raise TooManyBadSteps(
                f"{told}; the weights and the last checkpoint are as they were; lower the learning rate, or "
                "look at the batch"
            )
        self._say(told)
        return False

    def state_dict(self) -> dict[str, int]:
        """The two counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting from there."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def _dump(self, step: int, figures: Mapping[str, float], batch: Any) -> str:
        suffix = f"-rank-{ranks.rank()}" if ranks.size() > 1 else ""
        place = self.folder / f"bad-step-{step}{suffix}"
        writer = Writer(place, here=True)
        writer.tree("batch", {"step": step, "figures": dict(figures), "batch": batch}, other=repr)
        if writer.error is not None:
            return f"not dumped, {writer.error}"
        dumps = sorted(self.folder.glob(f"bad-step-*{suffix}"), key=lambda path: path.stat().st_mtime_ns)
        for path in dumps[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        return str(place)
