"""A decoding process and the end of it that the trainer holds.

It is a program of its own (`python -m raise_trainer.media.worker`), not a fork: it inherits no threads, no
CUDA context and no locks, does not run the trainer's main file again and imports PyTorch for torchcodec only.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from typing import Any

from ..errors import BadMedia, UserError
from .video import Decoded, Request

DECODE = "raise_trainer.media.video:decode"
START_SECONDS = 120.0
ORPHAN_SECONDS = 10.0  # beyond the time limit: then the trainer is gone and the process ends itself
log = logging.getLogger(__name__)


class Lost(Exception):
    """A decoding process that died or had to be killed, and why."""


class Worker:
    """One decoding process, started when it is first needed and again after it was lost.

    decode: "module:function" from Request to Decoded; a test gives its own. timeout_s: seconds one file may
    take. Not safe to call from two threads, `close` apart.
    """

    def __init__(self, decode: str = DECODE, *, timeout_s: float) -> None:
        self._decode = decode
        self._timeout = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process's id; None when none runs."""
        return self._process.pid if self._process else None

    def run(self, request: Request) -> Decoded:
        """Decode one file. Raises what `decode` does, and Lost when the process died or hung."""
        pipe = self._pipe or self._start()
        try:
            pipe.send(request)
            answered = pipe.poll(self._timeout)
            kind, value = pipe.recv() if answered else ("hung", None)
        except (EOFError, OSError):
            raise Lost(f"the decoding process died ({self._stop()})") from None
        if kind == "hung":
            self._stop()
            raise Lost(f"timed out after {self._timeout:g} s")
        return _answer(kind, value)

    def close(self) -> None:
        """Kill the process and wait for its end; a `run` in another thread ends with Lost."""
        with self._lock:
            self._closed = True
            process = self._process
        if process:
            process.kill()
            process.wait()

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        path = os.pathsep.join(p for p in sys.path if p)
        with self._lock:
            if self._closed:
                raise Lost("the loader was closed")
            # A session of its own: Ctrl-C reaches the trainer alone, which then ends its workers.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), self._decode, str(self._timeout)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        theirs.close()
        self._pipe = ours
        try:
            kind, value = ours.recv() if ours.poll(START_SECONDS) else ("hung", None)
        except (EOFError, OSError):
            raise Lost(f"the decoding process did not start ({self._stop()})") from None
        if kind == "hung":
            self._stop()
            raise Lost(f"the decoding process did not start in {START_SECONDS:g} s")
        if kind != "ready":
            self._stop()
            _answer(kind, value)
        return ours

    def _stop(self) -> str:
        """Kill the process if it still runs, and say how it ended."""
        assert self._process is not None and self._pipe is not None
        try:
            code = self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if not self._closed:
            log.warning(
                "decoding process %d ended (%s); another takes its place", self._process.pid, _ending(code)
            )
        self._pipe.close()
        self._process = self._pipe = None
        return _ending(code)


def named(decode: str) -> Callable[[Request], Decoded]:
    """The function of "module:function"."""
    module, _, function = decode.partition(":")
    found: Callable[[Request], Decoded] = getattr(import_module(module), function)
    return found


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _answer(kind: str, value: Any) -> Decoded:
    if kind == "bad":
        raise BadMedia(value)
    if kind == "user":
        raise UserError(value)
    if kind == "failed":
        raise RuntimeError(f"decoding failed in a way that is no fault of the file:\n{value}")
    assert isinstance(value, Decoded)
    return value


def _reply(decode: Any, request: Request) -> tuple[str, Any]:
    try:
        return "done", decode(request)
    except BadMedia as error:
        return "bad", str(error)
    except UserError as error:
        return "user", str(error)
    except Exception:
        return "failed", traceback.format_exc()


def main(descriptor: str, decode: str, timeout_s: str) -> None:
    """Answer requests from the pipe until it closes: also when the trainer was killed."""
    pipe = Connection(int(descriptor))
    try:
        decoder = named(decode)
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
        return
    try:
        pipe.send(("ready", os.getpid()))
        while True:
            request = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, float(timeout_s) + ORPHAN_SECONDS)
            pipe.send(_reply(decoder, request))
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, OSError):
        return


if __name__ == "__main__":
    main(*sys.argv[1:])
