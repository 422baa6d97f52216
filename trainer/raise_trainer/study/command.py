"""`raise-core study`: its arguments."""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from .arms import EXPLORATORY, MAIN, QUICK_ARMS, STEP_ARMS, Arm, arm
from .sizes import FULL, QUICK, SMOKE

SUMMARY = "published rewards on the demo world, paired by seed, at equal compute; writes docs/study.md"
QUICK_SEEDS = 2


def run_command(arguments: Sequence[str]) -> int:
    """Run what is missing, then write the page; with --report the page alone."""
    given = _parser().parse_args(arguments)
    if given.steps:
        return _run_steps(given, arguments)
    small = "smoke" if given.smoke else "quick" if given.quick else ""
    results = given.results or Path(f"runs/study-{small}/results" if small else "bench/results/study")
    page = given.page or (results / "study.md" if small else Path("docs/study.md"))
    if not given.report:
        from .run import Plan, run_study

        plan = Plan(
            arms=_arms(given.arms, small=bool(small), exploratory=given.exploratory),
            sizes=SMOKE if given.smoke else QUICK if given.quick else FULL,
            results=results,
            work=given.work or Path(f"runs/study-{small}/work" if small else "runs/study"),
            processes=given.processes or len(os.sched_getaffinity(0)),
            command=shlex.join(["raise-core", "study", *arguments]),
        )
        seeds = given.seeds if given.seeds is not None else QUICK_SEEDS if small else None
        run_study(replace(plan, seeds=seeds), lambda line: print(line, flush=True))
    from .page import write_page

    print(f"Page: {write_page(results, page)}")
    return 0


def _run_steps(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    """The same for `--steps`."""
    if given.quick or given.exploratory:
        raise UserError("--steps: goes with --smoke, not with --quick or --exploratory; run those without it")
    small, runs = given.smoke, Path("runs/study-steps-smoke" if given.smoke else "runs/study-steps")
    results = given.results or (runs / "results" if small else Path("bench/results/study-steps"))
    page = given.page or (results / "study.md" if small else Path("docs/study.md"))
    if not given.report:
        from .run import Plan
        from .steps_run import run_steps
        from .steps_seed import FULL_STEPS, SMOKE_STEPS

        names = STEP_ARMS if given.arms is None else [name.strip() for name in given.arms.split(",")]
        plan = Plan(
            arms=[arm(name, STEP_ARMS) for name in names],
            sizes=SMOKE_STEPS if small else FULL_STEPS,
            results=results,
            work=given.work or (runs / "work" if small else runs),
            processes=given.processes or len(os.sched_getaffinity(0)),
            command=shlex.join(["raise-core", "study", *arguments]),
            seeds=given.seeds if given.seeds is not None else 1 if small else None,
        )
        run_steps(plan, lambda line: print(line, flush=True))
    from .page import write_steps

    print(f"Page: {write_steps(results, page)}")
    return 0


def _arms(names: str | None, *, small: bool, exploratory: bool) -> list[Arm]:
    if names is not None:
        return [arm(name.strip()) for name in names.split(",")]
    main = [arm(name) for name in QUICK_ARMS] if small else list(MAIN)
    return [*main, *EXPLORATORY] if exploratory else main


def _count(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise UserError(f"got {text!r}, expected a whole number, 1 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raise-core study", description=SUMMARY)
    add = parser.add_argument
    add("--exploratory", action="store_true", help="the exploratory arms too, with three seeds each")
    add("--quick", action="store_true", help="four arms, two seeds and small runs: minutes")
    add("--smoke", action="store_true", help="the same in seconds; its figures mean nothing")
    add(
        "--steps",
        action="store_true",
        help="Chain-of-Step's exploratory arms instead, in other folders",
    )
    add("--arms", metavar="A,B", help="these arms alone; exploratory ones are compared with scre-igsr")
    add("--seeds", type=_count, metavar="N", help="at most N seeds of each arm (8, exploratory 3)")
    add("--processes", type=_count, metavar="N", help="runs at a time, one thread each (one per core)")
    add("--results", type=Path, help="folder of the results, kept (bench/results/study)")
    add("--work", type=Path, help="folder of data, warm starts and logs, may go (runs/study)")
    add("--page", type=Path, help="page to write or to fill anew (docs/study.md)")
    add("--report", action="store_true", help="run nothing: write the page from the results")
    return parser
