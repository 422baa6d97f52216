"""SIGTERM and SIGINT end a run between two steps, with a checkpoint and exit code 0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from . import ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """What came so far. signal: the first signal's name, or None."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    def agreed(self) -> bool:
        """Whether any process was: the same answer on all ranks, which call it after the same step."""
        return ranks.on_any(self.asked)


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """`with graceful_stop() as stop:` and, after each step, `if stop.agreed(): save; break`.

    The first SIGTERM or SIGINT only sets the flag; a SIGINT after it raises KeyboardInterrupt at once. The
    handlers from before are back afterwards. RuntimeError outside the main thread, where Python sets none.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("graceful_stop: call it in the main thread; Python handles signals there alone")
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
