"""What can go wrong with a checkpoint, for the command line: one line each, with the way out."""

from __future__ import annotations

from ..errors import UserError


class SaveFailed(UserError):
    """A checkpoint could not be written; the ones before are as they were."""


class DamagedCheckpoint(UserError):
    """A checkpoint's files are not those that were written, with the file and the reason."""


class ResumeRefused(UserError):
    """The run that was saved is not the one that is to go on, with the fields that differ."""


class TooManyBadSteps(UserError):
    """Several steps in a row had a loss or gradient that is not finite."""
