"""What a soak run shows: memory's slope, the rows of each epoch, the lines of each step; and its figure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "soak.svg"
WARM = 100  # first steps of each process that do not count: caches fill, allocators grow
BLOCK = 20  # steps averaged to a point; two checkpoints lie in each
FLAT = 0.01  # of the memory itself, in 1,000 steps: more is no flat memory
Record = dict[str, Any]


@dataclass(frozen=True)
class Slope:
    """MiB in 1,000 steps, with its 95 % interval; points: blocks of steps it is fitted to."""

    slope: float
    low: float
    high: float
    points: int


def slope(lives: Sequence[Sequence[float]]) -> Slope | None:
    """Common slope of memory [MiB] over the steps of several processes, each with a level of its own.

    Least squares through the means of blocks of 20 steps, after each process's first 100: neighbouring steps
    are no independent samples. Student's t with (points - processes - 1) degrees of freedom; None below 8.
    """
    found = [points for life in lives if len(points := list(_blocks(life))) > 1]
    count = sum(map(len, found))
    free = count - len(found) - 1
    if free < 8:
        return None
    centred = [(x - _mean(p, 0), y - _mean(p, 1)) for p in found for x, y in p]
    spread = sum(x * x for x, _ in centred)
    rise = sum(x * y for x, y in centred) / spread
    error = math.sqrt(sum((y - rise * x) ** 2 for x, y in centred) / free / spread)
    half = _t975(free) * error
    return Slope(1000 * rise, 1000 * (rise - half), 1000 * (rise + half), count)


def _blocks(life: Sequence[float]) -> Iterator[tuple[float, float]]:
    for begin in range(WARM, len(life) - BLOCK + 1, BLOCK):
        yield begin + BLOCK / 2, sum(life[begin : begin + BLOCK]) / BLOCK


def _mean(points: Sequence[tuple[float, float]], part: int) -> float:
    return sum(p[part] for p in points) / len(points)


def _t975(free: int) -> float:
    """97.5th percentile of Student's t: the normal's with two terms of Fisher's expansion."""
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)


def flat(memory: Slope | None, level: float) -> bool:
    """Whether the whole interval lies below 1 % of the level [MiB] in 1,000 steps."""
    return memory is not None and memory.high <= FLAT * level


def epoch_faults(lines: Sequence[Record], rows: int, bad: Sequence[int]) -> list[str]:
    """What is wrong with the rows: each epoch has every row once, the bad ones alone left out.

    lines: of rows.jsonl. rows: in the data; a whole number of steps makes an epoch.
    """
    faults, wrong = [], set(bad)
    taken = [(n, name) for line in lines for name in ("used", "left_out") for n in line[name]]
    for begin in range(0, len(taken), rows):
        part = taken[begin : begin + rows]
        numbers = [n for n, _ in part]
        twice = len(numbers) - len(set(numbers))
        lost = set(range(rows)) - set(numbers) if len(part) == rows else set()
        if twice or lost:
            faults.append(f"epoch {begin // rows}: {twice} rows twice, {len(lost)} lost")
        confused = [n for n, name in part if (n in wrong) != (name == "left_out")]
        if confused:
            faults.append(f"epoch {begin // rows}: rows {confused[:5]} used or left out wrongly")
    return faults


def step_faults(lines: Sequence[Record], steps: int, name: str) -> list[str]:
    """Steps that are not there exactly once, in order."""
    found = [line["step"] for line in lines if line.get("stage", "train") == "train"]
    return (
        []
        if found == list(range(steps))
        else [f"{name}: {len(found)} lines for {steps} steps, or not in order"]
    )


def last_run(file: Path) -> list[Record]:
    """The records of the run that began last."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    begun = max(r["begun"] for r in records)
    return [r for r in records if r["begun"] == begun]


def table(records: Sequence[Record]) -> str:
    """What was found, a line each."""
    (whole,) = (r for r in records if r["kind"] == "run")
    fitted = whole["memory_slope"]
    interval = (
        "too few steps"
        if fitted is None
        else f"{fitted['slope']:+.2f} MiB in 1,000 steps, 95 % {fitted['low']:+.2f} to {fitted['high']:+.2f}"
    )
    lines = [
        f"steps {whole['steps']}, finished: {whole['finished']}; {whole['seconds']:.0f} s",
        f"kills {whole['kills']}, of them during a save {whole['kills_in_save']}; decoders left behind "
        f"{whole['orphans']}",
        f"rows {whole['rows']}, {whole['bad_rows']} with bad media; epochs {whole['epochs']:.1f}",
        f"memory {whole['memory_mib']:.0f} MiB, {interval}; flat: {whole['flat']}",
        f"steps with a gradient: {whole['learned_share']:.0%}; {whole['tokens_per_s']:.0f} tokens/s",
        *whole["faults"],
    ]
    return "\n".join(lines)


def draw(records: Sequence[Record], path: Path) -> None:
    """Memory over the steps, a line for each process; kills as ticks, those during a save filled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lives = [r for r in records if r["kind"] == "process"]
    style = {
        "svg.hashsalt": "raise-core",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 8,
    }
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
        for life in lives:
            steps = [life["first_step"] + 1 + i for i in range(len(life["memory_mib"]))]
            axis.plot(steps, life["memory_mib"], color="#1f3a5f", linewidth=0.9)
        kills = [(r["first_step"] + len(r["memory_mib"]), r["in_save"]) for r in lives if r["killed"]]
        top = max(max(r["memory_mib"]) for r in lives if r["memory_mib"]) * 1.06
        for saving, colour in ((False, "#c79a1b"), (True, "#c8553d")):
            places = [step for step, in_save in kills if in_save == saving]
            label = f"{len(places)} kills {'during a save' if saving else 'elsewhere'}"
            axis.plot(places, [top] * len(places), "v", color=colour, markersize=5, label=label)
        axis.set_ylim(0, top * 1.06)
        axis.set_xlabel("step")
        axis.set_ylabel("peak memory of a step [MiB]")
        axis.legend(frameon=False, loc="lower right", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
