"""A run's folder of checkpoints: each is whole or not there, and the last good one is found again."""

from __future__ import annotations

import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import manifest, ranks
from .errors import DamagedCheckpoint, SaveFailed
from .files import Writer
from .state import TrainingState

KEPT = re.compile(r"save-(\d{5,})-step-(\d+)")
SAVING, REMOVING = ".saving-", ".removing-"


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: the checkpoint, its finished steps, and what was accepted as changed."""

    path: Path
    step: int
    changes: list[str] = field(default_factory=list)


class Checkpoints:
    """The checkpoints in `folder`, named `save-00007-step-1200`: by order of saving, then finished steps.

    keep_last: how many of the newest are kept, at least 1. keep_best: "max" or "min" also keeps the one
    whose `metric` was best. say: who is told of damage; by default it is a RuntimeWarning.
    One run at a time may save into a folder. With several processes all call, and rank 0 touches the disk.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_best: str | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last: got {keep_last}, wanted 1 or more")
        if keep_best not in (None, "max", "min"):
            raise ValueError(f'keep_best: got {keep_best!r}, wanted None, "max" or "min"')
        self.folder = Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best
        self._say = say or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=5))
        self._damaged: set[Path] = set()

    def all(self) -> list[Path]:
        """Every checkpoint that is there, the oldest first; not verified."""
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        return sorted((path for path in found if KEPT.fullmatch(path.name)), key=_serial)

    def save(
        self, state: TrainingState, step: int, metric: float | None = None, *, logs: Sequence[Path] = ()
    ) -> Path:
        """Save after `step` finished steps and return the checkpoint's folder.

        metric: figure of merit for `keep_best`; None or NaN is never best. logs: files, such as
        metrics.jsonl, that are put on the disk before, so that a power cut takes no line of a finished step.
        Written beside under another name, synced, then renamed; only then older ones are removed. SaveFailed,
        on every rank, if that fails: the checkpoints before are kept and what was written is removed.
        """
        state.step = step
        needed = state.bytes()
        part, target = ranks.share(lambda: self._begin(step, needed))
        writer = Writer(part)
        state.write(writer)
        about = {"step": step, "metric": None if metric is None or math.isnan(metric) else float(metric)}
        writer.attempt(self._finish, part, target, about, logs)
        error = writer.error
        if error is not None:
            shutil.rmtree(part, ignore_errors=True)
        reason = ranks.share(lambda: None if error is None else _reason(error))
        if error is not None and not _is_disk(error):
            raise error
        if reason is not None:
            raise SaveFailed(self._failure(step, needed, reason)) from error
        ranks.share(self._prune)
        return target

    def latest(self) -> Path | None:
        """The newest checkpoint whose every file is as it was written; None if there is no checkpoint.

        A damaged one is passed over, loudly. DamagedCheckpoint if all are: nobody starts over unasked.
        """
        return ranks.share(self._latest)

    def best(self) -> Path | None:
        """The checkpoint with the best metric among those that are there, or None."""
        return ranks.share(lambda: self._best(self.all()))

    def resume(
        self, state: TrainingState, *, on_change: str = "refuse", may_change: Sequence[str] = ()
    ) -> Resumed | None:
        """Load `latest()` into `state`; None, and nothing done, if there is no checkpoint.

        Arguments and errors as in `TrainingState.load`. What a killed run left half written is removed.
        """
        ranks.share(self._sweep)
        path = self.latest()
        if path is None:
            return None
        changes = state.load(path, on_change=on_change, may_change=may_change)
        return Resumed(path, state.step, changes)

    def _begin(self, step: int, needed: int) -> tuple[Path, Path]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise SaveFailed(self._failure(step, needed, f"only {free} bytes are free"))
            serial = max(map(_serial, self.all()), default=0) + 1
            part = self.folder / f"{SAVING}{serial:05}"
            part.mkdir()
        except OSError as error:
            raise SaveFailed(self._failure(step, needed, _reason(error))) from error
        return part, self.folder / f"save-{serial:05}-step-{step}"

    def _finish(self, part: Path, target: Path, about: dict[str, Any], logs: Sequence[Path]) -> None:
        for log in logs:
            manifest.sync(log)
        manifest.seal(part, about)
        os.rename(part, target)
        manifest.sync(self.folder)

    def _failure(self, step: int, needed: int, reason: str) -> str:
        before = self.all()
        kept = f"the one before, {before[-1].name}, is kept" if before else "there is none before it"
        return (
            f"the checkpoint of step {step} was not saved in {self.folder}: {reason}; it needs about "
            f"{needed} bytes; {kept}; free some space"
        )

    def _latest(self) -> Path | None:
        found = self.all()
        for path in reversed(found):
            try:
                manifest.verify(path)
            except DamagedCheckpoint as error:
                self._damaged.add(path)
                self._say(f"the checkpoint {path.name} is damaged and passed over: {error}")
            else:
                return path
        if found:
            raise DamagedCheckpoint(
                f"none of the {len(found)} checkpoints in {self.folder} is whole; to start over, move them "
                "away"
            )
        return None

    def _best(self, paths: Sequence[Path]) -> Path | None:
        sign = -1.0 if self.keep_best == "min" else 1.0
        scored: list[tuple[float, int, Path]] = []
        for path in paths:
            try:
                metric = manifest.read(path)["metric"]
            except DamagedCheckpoint:
                continue
            if metric is not None:
                scored.append((sign * metric, _serial(path), path))
        return max(scored)[2] if scored else None

    def _prune(self) -> None:
        sound = [path for path in self.all() if path not in self._damaged]
        keep = set(sound[-self.keep_last :])
        if self.keep_best and (best := self._best(sound)):
            keep.add(best)
        for path in self.all():
            if path not in keep:
                gone = path.with_name(REMOVING + path.name)
                try:
                    os.rename(path, gone)  # a kill while removing leaves no half checkpoint under its name
                except OSError as error:
                    self._say(f"the old checkpoint {path} could not be removed: {_reason(error)}")
                shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self) -> None:
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name.startswith((SAVING, REMOVING)):
                shutil.rmtree(path, ignore_errors=True)


def _serial(path: Path) -> int:
    match = KEPT.fullmatch(path.name)
    return int(match[1]) if match else 0


def _is_disk(error: Exception) -> bool:
    """Whether it came from writing, by Python or by the safetensors library, and not from what was given."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
