"""Frames of a batch of files, decoded in worker processes, in order, each distinct file once."""

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TypeAlias

from ..errors import BadMedia, UserError
from .cache import FrameCache
from .frames import Frames
from .quarantine import Quarantine
from .video import Decoded, Request
from .worker import DECODE, Lost, Worker, named

log = logging.getLogger(__name__)
_Job: TypeAlias = "tuple[Request, Future[Decoded]] | None"


class MediaLoader:
    """Decodes files for a training loop. Use it in a `with` statement, or call `close`.

    workers: decoding processes; 0 decodes in this process, without a time limit and without prefetch.
    timeout_s: seconds a file may take; then its process is killed and another takes its place.
    retries: further tries of a file whose process was killed or died; after them it is BadMedia.
    cache: where decoded frames are kept between epochs and runs, if anywhere.
    quarantine: its paths are answered with BadMedia and not tried again. The loader does not add to it:
    the caller knows the rows.
    decode: "module:function" that the processes run, or with workers=0 this one.

    Not safe to call from two threads.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout_s: float = 60.0,
        retries: int = 1,
        cache: FrameCache | None = None,
        quarantine: Quarantine | None = None,
        decode: str = DECODE,
    ) -> None:
        if workers < 0 or retries < 0 or not timeout_s > 0:
            raise UserError(
                f"media loader: workers={workers}, retries={retries}, timeout_s={timeout_s}; "
                "expected workers >= 0, retries >= 0, timeout_s > 0"
            )
        self._tries = retries + 1
        self._cache = cache
        self._quarantine = quarantine
        self._decode = decode
        self._pending: dict[Request, Future[Decoded]] = {}
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._workers = [Worker(decode, timeout_s=timeout_s) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=_serve, args=(worker, self._jobs, self._tries, cache), daemon=True)
            for worker in self._workers
        ]
        self._finish = weakref.finalize(self, _close, self._jobs, self._workers, self._threads)
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def prefetch(self, requests: Iterable[Request]) -> None:
        """Start on the next batch; what an earlier prefetch asked for and no `load` took is dropped."""
        wanted = dict.fromkeys(requests)
        for request, future in self._pending.items():
            if request not in wanted:
                future.cancel()
        self._pending = {r: f for r, f in self._pending.items() if r in wanted}
        if self._workers:
            for request in wanted:
                self._submit(request)

    def load(self, requests: Sequence[Request]) -> list[Frames | BadMedia]:
        """Frames of every request, in order; BadMedia, with path and reason, where there are none.

        Equal requests give the same object. Raises UserError for a missing decoder and RuntimeError for a
        fault that is not the file's.
        """
        if not self._finish.alive:
            raise RuntimeError("the media loader is closed; make another")
        distinct = list(dict.fromkeys(requests))
        if self._workers:
            for request in distinct:
                self._submit(request)
        found = {request: self._result(request) for request in distinct}
        return [found[request] for request in requests]

    def close(self) -> None:
        """Kill the workers and wait for their end; a second call does nothing."""
        self._finish()

    def _submit(self, request: Request) -> None:
        if request not in self._pending and self._refused(request) is None:
            self._pending[request] = Future()
            self._jobs.put((request, self._pending[request]))

    def _refused(self, request: Request) -> BadMedia | None:
        reason = self._quarantine.reason(request.path) if self._quarantine else None
        return None if reason is None else BadMedia(reason)

    def _result(self, request: Request) -> Frames | BadMedia:
        if (refused := self._refused(request)) is not None:
            return refused
        try:
            future = self._pending.pop(request, None)
            return Frames.of(
                _cached(request, self._cache, named(self._decode)) if future is None else future.result()
            )
        except BadMedia as error:
            return error

    def __enter__(self) -> "MediaLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _cached(request: Request, cache: FrameCache | None, run: Callable[[Request], Decoded]) -> Decoded:
    file = cache.file(request) if cache else None
    if cache is None or file is None:
        return run(request)
    found = cache.get(file)
    if found is None:
        found = run(request)
        cache.put(file, found)
    return found


def _serve(worker: Worker, jobs: "queue.SimpleQueue[_Job]", tries: int, cache: FrameCache | None) -> None:
    """One worker's thread: jobs from the shared queue until it gives None."""
    while (job := jobs.get()) is not None:
        request, future = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(_cached(request, cache, lambda r: _insist(worker, r, tries)))
        except BaseException as error:
            future.set_exception(error)


def _insist(worker: Worker, request: Request, tries: int) -> Decoded:
    for left in reversed(range(tries)):
        try:
            return worker.run(request)
        except Lost as lost:
            log.warning("%s: %s; %d tries left", request.path, lost, left)
            reason = str(lost)
    raise BadMedia(f"{request.path}: {reason}, {tries} time(s); re-encode it or drop the row")


def _close(jobs: "queue.SimpleQueue[_Job]", workers: list[Worker], threads: list[threading.Thread]) -> None:
    while True:
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            break
        if job is not None:
            job[1].cancel()
    for worker in workers:
        worker.close()
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        thread.join()
