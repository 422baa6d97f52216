"""The generated parts of the page: Markdown tables of what is recorded."""

import json
import statistics as plain
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from ..world import TASKS
from .arms import ARMS, BASE, EXPLORATORY, MAIN, Arm
from .records import Record
from .statistics import LEVEL, POWER, Paired, paired
from .world_shift import TEST_SETS

AGAINST = "grpo"  # what the main table's arms are compared with
METRICS = {
    "accuracy": "accuracy", "answer": "Answer: the chain alone gives the right answer",
    "match": "Match: the answer follows from the chain", "confidence": "confidence in the answer",
}  # fmt: skip
Cell = Callable[[Arm], str]


class Found:
    """Recorded runs by arm and seed; figures by test set and name."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.by = {(r["arm"], r["seed"]): r for r in records}

    def arms(self, among: Sequence[Arm]) -> list[Arm]:
        """Those with a run, in their order."""
        return [a for a in among if self.seeds(a.name)]

    def seeds(self, *names: str) -> list[int]:
        """Seeds that every arm of `names` has."""
        return sorted(
            {s for _, s in self.by} & set.intersection(*({s for a, s in self.by if a == n} for n in names))
        )

    def values(self, name: str, test: str, metric: str, seeds: Sequence[int] | None = None) -> list[float]:
        """A figure of an arm, seed by seed."""
        chosen = self.seeds(name) if seeds is None else seeds
        return [self.by[name, s]["figures"][test][metric] for s in chosen]

    def held_out(self, name: str, metric: str) -> list[float]:
        """As values, without the seeds that gave no right (no wrong) answer to have a confidence."""
        nothing = {"confidence_right": 0.0, "confidence_wrong": 1.0}.get(metric)
        values = (self.values(name, "held_out", m) for m in (metric, "accuracy"))
        return [value for value, accuracy in zip(*values, strict=True) if accuracy != nothing]

    def against(self, base: str, name: str, test: str, metric: str) -> Paired | None:
        """Difference to the base over the seeds that both have; None for the base itself, or without any."""
        seeds = self.seeds(base, name)
        if base == name or not seeds:
            return None
        return paired(*(self.values(n, test, metric, seeds) for n in (base, name)))


def difference(found: Paired | None) -> str:
    """`+0.012; -0.004 to +0.028`, bold where the interval leaves 0 out; the mean alone for one seed."""
    if found is None:
        return ""
    if found.n == 1:
        return f"{found.mean:+.3f}"
    text = f"{found.mean:+.3f}; {found.low:+.3f} to {found.high:+.3f}"
    return f"**{text}**" if found.clear else text


def table(head: Sequence[str], arms: Sequence[Arm], cells: Sequence[Cell], first: str = "") -> str:
    """One row per arm: its title, then a cell per column."""
    lines = [f"| {first} | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {a.title} | " + " | ".join(cell(a) for cell in cells) + " |" for a in arms]
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    return f"{plain.fmean(values):.3f}" if values else ""


def metric_table(found: Found, metric: str) -> str:
    """Means of a metric on every test set, with the paired difference to GRPO 0/1."""

    def cell(test: str) -> Cell:
        def of(a: Arm) -> str:
            change = difference(found.against(AGAINST, a.name, test, metric))
            return _mean(found.values(a.name, test, metric)) + (f" ({change})" if change else "")

        return of

    tests = {name: t.title for name, t in TEST_SETS.items()}
    return table(list(tests.values()), found.arms(MAIN), [cell(name) for name in tests], METRICS[metric])


def short(found: Found) -> str:
    """The README's table: held-out means, and what becomes of Match against GRPO 0/1."""
    columns = {"accuracy": "accuracy", "answer": "the chain gives the right answer",
               "match": "the answer follows from the chain"}  # fmt: skip

    def mean(metric: str) -> Cell:
        return lambda a: _mean(found.values(a.name, "held_out", metric))

    def change(a: Arm) -> str:
        return difference(found.against(AGAINST, a.name, "held_out", "match"))

    head = [*columns.values(), f"… against {ARMS[AGAINST].title}"]
    return table(head, found.arms(MAIN), [*(mean(m) for m in columns), change])


def gains(found: Found) -> str:
    """Paired differences to the warm start on held-out questions."""

    def cell(metric: str) -> Cell:
        return lambda a: difference(found.against("warm-start", a.name, "held_out", metric))

    arms = [a for a in found.arms(MAIN) if a.kind != "none"]
    names = ("accuracy", "answer", "match", "confidence")
    return table(
        [n.capitalize() for n in names], arms, [cell(m) for m in names], "change since the warm start"
    )


def consistency(found: Found) -> str:
    """The paper's consistency table in miniature, with greedy decoding and confidence beside it."""
    columns = {
        "accuracy": "accuracy", "answer": "Answer", "match": "Match", "accuracy_greedy": "accuracy, greedy",
        "answer_greedy": "Answer, greedy", "match_greedy": "Match, greedy",
        "confidence_right": "confidence, right", "confidence_wrong": "confidence, wrong",
    }  # fmt: skip

    def cell(metric: str) -> Cell:
        return lambda a: _mean(found.held_out(a.name, metric))

    return table(list(columns.values()), found.arms(MAIN), [cell(m) for m in columns], "held-out questions")


def rivals(found: Found) -> str:
    """Paired differences, on held-out questions, between the arms that reward confidence."""
    names = ("grpo-care", "scre", "scre-igsr", "scre-igsr-balanced")
    metrics = {
        "accuracy": "accuracy", "answer": "Answer", "match": "Match",
        "match/describe": "Match of descriptions", "confidence_wrong": "confidence, wrong",
    }  # fmt: skip
    asked = [r["figures"]["held_out"] for r in found.by.values()]
    metrics = {m: title for m, title in metrics.items() if all(m in one for one in asked)}
    lines = ["| difference | " + " | ".join(metrics.values()) + " |", "|---" * (len(metrics) + 1) + "|"]
    for base, other in combinations(names, 2):
        if found.seeds(base, other):
            cells = [difference(found.against(base, other, "held_out", m)) for m in metrics]
            lines.append(f"| {ARMS[other].title} − {ARMS[base].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tasks(found: Found) -> str:
    """Accuracy and Match by kind of question, held-out; the kinds that every seed was asked."""
    asked = [r["figures"]["held_out"] for r in found.by.values()]
    names = [t for t in TASKS if all(f"accuracy/{t}" in one for one in asked)]

    def cell(task: str) -> Cell:
        return lambda a: " · ".join(
            _mean(found.values(a.name, "held_out", f"{metric}/{task}")) for metric in ("accuracy", "match")
        )

    return table(names, found.arms(MAIN), [cell(n) for n in names], "accuracy · Match")


def smallest(found: Found) -> str:
    """The smallest difference to GRPO 0/1 that could have been seen: over the arms, smallest to largest."""
    arms = [a for a in found.arms(MAIN) if a.name != AGAINST and a.kind != "none"]
    lines = ["|  | " + " | ".join(t.title for t in TEST_SETS.values()) + " |", "|---" * 5 + "|"]
    for metric in METRICS:
        cells = []
        for test in TEST_SETS:
            all_found = [found.against(AGAINST, a.name, test, metric) for a in arms]
            values = [f.detectable for f in all_found if f is not None and f.n > 1]
            cells.append(f"{min(values):.3f} to {max(values):.3f}" if values else "")
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def base_of(arm: Arm) -> Arm:
    """The arm of the main table that an exploratory one differs from in one thing."""
    return ARMS[AGAINST if arm.method.get("reward") == "accuracy" else BASE]


def exploratory(found: Found) -> str:
    """Exploratory arms, each against its base with the same seeds, on held-out questions; "" without any."""
    arms = found.arms(EXPLORATORY)
    if not arms:
        return ""
    metrics = ("accuracy", "match", "confidence")
    head = ["arm", "compared with", *(m for name in metrics for m in (name, f"{name}, difference"))]
    lines = ["| question | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for a in arms:
        base = base_of(a)
        cells = [a.topic, f"{a.title} ({len(found.seeds(a.name))} seeds)", base.title]
        for metric in metrics:
            cells += [
                _mean(found.values(a.name, "held_out", metric)),
                difference(found.against(base.name, a.name, "held_out", metric)),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compute(found: Found, operations: dict[str, dict[str, float]]) -> str:
    """What a step costs each arm, and how many it had."""

    def steps(a: Arm) -> int:
        return int(found.by[a.name, found.seeds(a.name)[0]]["settings"]["steps"])

    def gflop(a: Arm) -> str:
        parts = operations.get(a.name, {})
        return " + ".join(f"{value / 1e9:.1f} {phase}" for phase, value in parts.items())

    def total(a: Arm) -> str:
        return f"{steps(a) * sum(operations.get(a.name, {}).values()) / 1e12:.2f}"

    def seconds(a: Arm) -> str:
        return f"{plain.median(found.by[a.name, s]['processor_seconds'] for s in found.seeds(a.name)):.0f}"

    head = [
        "GFLOP of a step",
        "steps",
        "TFLOP in all",
        "processor seconds of a run, evaluation included (median)",
    ]
    return table(head, found.arms([*MAIN, *EXPLORATORY]), [gflop, lambda a: str(steps(a)), total, seconds])


def settings(records: Sequence[Record], sizes: dict[str, Any]) -> str:
    """Sizes, seeds, questions and what the results were made from."""
    questions = {test: sorted({r["questions"][test] for r in records}) for test in TEST_SETS}
    lines = ["- " + ", ".join(f"{name} {value}" for name, value in sizes.items())]
    lines.append(
        "- questions: "
        + ", ".join(f"{TEST_SETS[t].title} {n[0]} to {n[-1]}" for t, n in questions.items())
        + "; each is answered several times (eval_samples), at temperature 1"
    )
    return "\n".join([*lines, *made_lines(records)])


def made_lines(records: Sequence[Record]) -> list[str]:
    """What the runs were made from, a line for each command, commit and machine."""
    made = sorted({json.dumps(r["made_from"], sort_keys=True) for r in records})
    lines = [f"- {len(records)} runs; intervals {LEVEL:.0%}, power {POWER:.0%}"]
    for one in map(json.loads, made):
        count = sum(json.loads(json.dumps(r["made_from"])) == one for r in records)
        changed = " with changes" if one["changed"] else ""
        versions = ", ".join(f"{name} {one[name]}" for name in ("python", "torch", "transformers"))
        lines.append(
            f"- {count} runs: `{one['command']}`, commit {one['commit'][:9]}{changed}, {versions}, "
            f"{one['processor']}, one thread a run"
        )
    return lines
