"""What a run says and keeps: a bar with time left, tables, `metrics.jsonl`, `timings.jsonl`, `rows.jsonl`.

Figures that depend on the clock go to timings.jsonl alone, so that metrics.jsonl of two runs with the same
seed on the same machine are the same bytes.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .json_lines import drop_torn_line
from .trackers import Tracker

QUIET_SECONDS = 10.0  # between two progress lines where there is no terminal to draw a bar on
QUIET_TABLE_SECONDS = 600.0  # between two tables of completions there


class Stage:
    """One bar; `advance` moves it and shows a few figures beside it."""

    def __init__(self, log: "Logbook", name: str, total: int, done: int, bar: Progress | None):
        self._log, self._name, self._total, self._bar = log, name, total, bar
        self._task = bar.add_task(name, total=total, completed=done, note="") if bar else None
        self._start = self._said = time.monotonic()
        self._before = self._done = done

    def advance(self, n: int = 1, **figures: float) -> None:
        """`n` more units are done."""
        self._done += n
        note = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=n, note=note)
            return
        now = time.monotonic()
        if now - self._said >= QUIET_SECONDS or self._done == self._total:
            left = (now - self._start) / (self._done - self._before) * (self._total - self._done)
            self._log.say(f"{self._name} {self._done}/{self._total}, {left:.0f} s left  {note}")
            self._said = now


class Logbook:
    """The run's folder and the console. silent: write and say nothing, as all processes but the first."""

    def __init__(self, out: Path, console: Console | None = None, *, silent: bool = False):
        self.out = out
        self.silent = silent
        self.console = console or Console(highlight=False, quiet=silent)
        self.tracker: Tracker | None = None
        self._started = time.monotonic()
        self._tabled = -math.inf
        if not silent:
            drop_torn_line(out / "timings.jsonl")  # the others are cut where a run goes on

    def say(self, text: str) -> None:
        """One line on the console."""
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, name: str, total: int, *, done: int = 0) -> Iterator[Stage]:
        """A named part of the run with `total` units of work, some of which may be done."""
        begun = time.monotonic()
        if self.console.is_terminal and not self.silent:
            columns = (
                TextColumn("{task.description:<22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.console) as bar:
                yield Stage(self, name, total, done, bar)
        else:
            yield Stage(self, name, total, done, None)
        self.time(name, units=total, seconds=time.monotonic() - begun)

    def time(self, stage: str, **figures: float) -> None:
        """One line of timings.jsonl. What has a `step` goes to the tracker as well."""
        self._append("timings.jsonl", {"stage": stage} | {k: _rounded(k, v) for k, v in figures.items()})
        if self.tracker is not None and "step" in figures:
            self.tracker.log("time", int(figures["step"]), {k: v for k, v in figures.items() if k != "step"})

    def write(self, stage: str, step: int, **figures: float) -> None:
        """One line of metrics.jsonl; the tracker gets it too."""
        self._append("metrics.jsonl", {"stage": stage, "step": step, **figures})
        if self.tracker is not None:
            self.tracker.log(stage, step, figures)

    def rows(self, step: int, used: Sequence[int], left_out: Sequence[int]) -> None:
        """One line of rows.jsonl: the rows of a step by their numbers, of which none is in both lists."""
        self._append("rows.jsonl", {"step": step, "used": sorted(used), "left_out": sorted(left_out)})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self.silent:
            return
        with (self.out / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def may_show_completions(self) -> bool:
        """Whether a table of completions is due: always on a terminal, now and then elsewhere."""
        now = time.monotonic()
        if self.silent or not (self.console.is_terminal or now - self._tabled >= QUIET_TABLE_SECONDS):
            return False
        self._tabled = now
        return True

    def table(self, title: str, header: list[str], rows: list[list[str]], *, texts: int = 1) -> None:
        """A table on the console; the first `texts` columns align left, the others right."""
        table = Table(title=Text(title), title_justify="left", show_edge=False)
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < texts else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # what a model wrote is no markup
        self.console.print(table)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._started


def _rounded(name: str, value: float) -> float:
    """Milliseconds; memory to the KiB, so that a slow growth shows."""
    return round(value, 6 if name.endswith("_gib") else 3)
