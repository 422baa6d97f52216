"""Checkpoints that a run can be killed around: everything it is, whole or not there, back bit for bit.

state = TrainingState(model, optimizer, scheduler, reference, sampler, config=..., data=...)
checkpoints = Checkpoints(out / "checkpoints", keep_last=2)
with graceful_stop() as stop:
    checkpoints.resume(state, may_change=["out", "steps"])
    truncate_log(out / "metrics.jsonl", state.step)
    while state.step < steps and not stop.agreed():
        ...
        state.step += 1
        if state.step % every == 0 or state.step == steps or stop.agreed():
            checkpoints.save(state, state.step, logs=[out / "metrics.jsonl"])
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
