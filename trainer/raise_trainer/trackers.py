"""A run's figures in TensorBoard, trackio or Weights & Biases, by accelerate; JSON lines stay the truth."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import UserError

PROJECT = "raise-core"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def check_tracker(kind: str) -> None:
    """UserError, with the command that installs it, when the package of a tracker is missing."""
    packages = PACKAGES.get(kind, ())
    if packages and not any(find_spec(package) for package in packages):
        raise UserError(f"tracker={kind}: its package is not installed; pip install {packages[0]}")


class Tracker:
    """One tracker of accelerate's that gets what metrics.jsonl and timings.jsonl get.

    kind: "tensorboard", "trackio" or "wandb". folder: the run's; `tracker.json` there holds the name under
    which the tracker knows the run. settings: shown with it. step: finished steps of a run that goes on;
    TensorBoard drops what a killed process wrote after them, W&B keeps the first of a repeated step (its
    figures are the same). say: who is told when something cannot be sent.

    Made by one process alone. Nothing but its making raises: UserError when a new run's tracker does not
    start. A resumed run goes on without it, and a record that is not taken is counted in `failures`.
    """

    def __init__(
        self, kind: str, folder: Path, settings: Mapping[str, Any], *, step: int, say: Callable[[str], None]
    ) -> None:
        check_tracker(kind)
        self.kind, self.failures, self.records = kind, 0, 0
        self._say = say
        self._inner: Any = None
        try:
            self._inner = _started(kind, folder, settings, step)
        except Exception as error:
            if step == 0:
                raise UserError(
                    f"tracker={kind}: does not start ({_reason(error)}); mend that or set tracker=none"
                ) from error
            self._failed(error)
        self._first = int(getattr(getattr(self._inner, "tracker", None), "starting_step", 0))

    def log(self, part: str, step: int, figures: Mapping[str, float]) -> None:
        """Figures as `part/name` at a step; those that an earlier life of the run sent are not sent again."""
        if step < self._first:
            return
        self.records += 1
        try:
            if self._inner is None:
                raise RuntimeError("it did not start")
            self._inner.log({f"{part}/{name}": value for name, value in figures.items()}, step=step)
        except Exception as error:
            self._failed(error)

    def close(self) -> None:
        """Send what is left and end; says how many records were not taken."""
        try:
            if self._inner is not None:
                self._inner.finish()
        except Exception as error:
            self._failed(error)
        if self.failures:
            self._say(f"warning: tracker={self.kind}: {self.failures} failures, {self.records} records")

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            self._say(
                f"warning: tracker={self.kind}: {_reason(error)}; the run goes on, all is in metrics.jsonl"
            )


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _started(kind: str, folder: Path, settings: Mapping[str, Any], step: int) -> Any:
    from accelerate import tracking

    name = _name(folder)
    if kind == "tensorboard":
        # accelerate's own way to keep settings there makes a further run each time
        made = tracking.TensorBoardTracker("tensorboard", folder, purge_step=step)
        made.start()
        if step == 0:
            made.log({"settings": "    " + json.dumps(settings, indent=1).replace("\n", "\n    ")}, step=0)
        return made
    if kind == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        inner = {"id": name, "name": folder.resolve().name, "dir": str(folder), "resume": "allow"}
        made = tracking.WandBTracker(project, **inner)
    else:
        made = tracking.TrackioTracker(PROJECT, name=name, resume="allow")
    made.start()
    made.store_init_configuration(dict(settings))
    return made


def _name(folder: Path) -> str:
    """The run's name for a tracker: its folder's, and eight digits that no other run has."""
    file = folder / "tracker.json"
    if not file.exists():
        part = file.with_name(file.name + ".part")
        name = f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}"
        part.write_text(json.dumps({"name": name}) + "\n", encoding="utf-8")
        part.replace(file)
    return str(json.loads(file.read_text(encoding="utf-8"))["name"])
