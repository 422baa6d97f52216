"""Checkpoints that a run can be killed around: everything it is, whole or not there, back bit for bit.

state = TrainingState(model, optimizer, scheduler, reference, sampler, config=..., data=...)
checkpoints = Checkpoints(out / "checkpoints", keep_last=2)
resumed = checkpoints.resume(state, may_change=["out", "steps"])
with graceful_stop() as stop:
    for step in range(state.step, steps):
        ...
        if (step + 1) % every == 0 or stop.agreed():
            checkpoints.save(state, step + 1, logs=[out / "metrics.jsonl"])
"""

from .changes import changed_fields
from .errors import DamagedCheckpoint, ResumeRefused, SaveFailed, TooManyBadSteps
from .folder import Checkpoints, Resumed
from .guard import StepGuard
from .logs import truncate_log
from .state import Stateful, TrainingState
from .stopping import Stop, graceful_stop

__all__ = [
    "Checkpoints",
    "DamagedCheckpoint",
    "ResumeRefused",
    "Resumed",
    "SaveFailed",
    "Stateful",
    "StepGuard",
    "Stop",
    "TooManyBadSteps",
    "TrainingState",
    "changed_fields",
    "graceful_stop",
    "truncate_log",
]
