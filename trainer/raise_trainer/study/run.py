"""All runs of a study, shared out over processes of one thread each; killed, it goes on where it was."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import UserError
from .arms import BASE, Arm
from .compute import equal_steps
from .one import Job, do
from .records import Record, Results, provenance
from .seeds import is_warm
from .sizes import Sizes

Do = Callable[[Sequence[Job]], Iterator[tuple[Job, Record]]]
S = TypeVar("S", bound=Any)  # a dataclass of sizes


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[S]):
    """What is run: arms with their seeds 0, 1, …, where results and intermediate files go.

    seeds: at most so many per arm; None for each arm's own number. command: kept with every result.
    """

    arms: Sequence[Arm]
    sizes: S
    results: Path
    work: Path
    processes: int = 1
    seeds: int | None = None
    command: str = "raise-core study"

    def runs(self) -> list[tuple[Arm, int]]:
        """Every (arm, seed), seed by seed."""
        most = max((self._seeds(a) for a in self.arms), default=0)
        return [(a, seed) for seed in range(most) for a in self.arms if seed < self._seeds(a)]

    def _seeds(self, one: Arm) -> int:
        return one.seeds if self.seeds is None else min(one.seeds, self.seeds)


def run_study(plan: Plan[Sizes], say: Callable[[str], None] = print) -> Results:
    """Do what is missing of a plan: warm starts, operations, runs. UserError for folders of other sizes."""
    results, missing = opened(plan, say)
    if not missing:
        return results
    made_from = provenance() | {"command": plan.command}
    with workers(plan.processes, do, plan.work, plan.sizes) as work:
        warm(work, sorted({s for _, s in missing if not is_warm(plan.work, s)}), say)
        counted = results.operations()
        names = [BASE, *(a.name for a, _ in missing)]
        uncounted = [Job("count", missing[0][1], n) for n in dict.fromkeys(names) if n not in counted]
        for job, record in work(uncounted):
            results.add_operations(job.arm, record["operations"])
        counted = results.operations()
        jobs = [Job("run", s, a.name, equal_steps(counted, a, plan.sizes.grpo_steps)) for a, s in missing]
        finish(work, jobs, plan, results, made_from, say)
    return results


def opened(plan: Plan[S], say: Callable[[str], None]) -> tuple[Results, list[tuple[Arm, int]]]:
    """The results folder, and the runs that it lacks. UserError for folders of other sizes."""
    results = Results(plan.results)
    results.open(plan.sizes)
    Results(plan.work, "--work").open(plan.sizes)  # weights of other sizes must not be gone on from
    missing = [(a, seed) for a, seed in plan.runs() if not results.has(a.name, seed)]
    say(f"{len(missing)} of {len(plan.runs())} runs to do, {plan.processes} process(es)")
    return results, missing


def warm(work: Do, seeds: Sequence[int], say: Callable[[str], None]) -> None:
    """Make what the arms of these seeds share."""
    for number, (job, record) in enumerate(work([Job("warm start", s) for s in seeds]), 1):
        say(f"[{number}/{len(seeds)}] {job}: {record['processor_seconds']:.0f} s of processor time")


def finish(
    work: Do, jobs: Sequence[Job], plan: Plan[S], results: Results, made_from: Record,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Do the runs of a plan, each kept as soon as it is finished."""
    begun, titles = time.monotonic(), {a.name: a.title for a in plan.arms}
    for number, (job, record) in enumerate(work(jobs), 1):
        results.write(record | {"made_from": made_from})
        left = (time.monotonic() - begun) / number * (len(jobs) - number)
        accuracy = record["figures"]["held_out"]["accuracy"]
        say(
            f"[{number}/{len(jobs)}] {titles[job.arm]}, seed {job.seed}: accuracy {accuracy:.3f}, "
            f"{record['processor_seconds']:.0f} s of processor time; about {left / 60:.0f} min left"
        )


@contextmanager
def workers(processes: int, do: Callable[..., Record], *shared: Any) -> Iterator[Do]:
    """`do(job, *shared)` of each job, with the job, as they come; in this process when one is asked for."""
    if processes == 1:
        yield lambda jobs: ((job, do(job, *shared)) for job in jobs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when a worker starts
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent) as pool:

        def work(jobs: Sequence[Job]) -> Iterator[tuple[Job, Record]]:
            running = {pool.submit(do, job, *shared): job for job in jobs}
            for done in as_completed(running):
                yield running[done], done.result()

        try:
            yield work
        except BrokenProcessPool:
            raise UserError(
                "a process of the study was killed, perhaps for want of memory; run the same command again: "
                "finished runs are kept. --processes 1 needs least memory"
            ) from None
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A worker whose parent was killed ends too, in the middle of a run if need be."""
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
