"""The drawings of `raise-core report`: curves of all runs over each other, and where the time goes."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt

from .pages import INK, STYLE, running_mean, svg
from .run_files import RunFiles, finite

COLOURS = (INK, "#c8553d", "#2a7f62", "#8a5ca8", "#c79a1b", "#3d8fb8", "#7a4b2a", "#6b7280")
DASHES = ("-", "--", ":")  # when the colours begin anew
CURVES = (  # metric, title, unit on the axis
    ("reward_mean", "Reward", "mean over completions"),
    ("text_score_mean", "Text score", "mean over completions"),
    ("confidence_mean", "Confidence", "mean over completions"),
    ("completion_tokens_mean", "Length", "tokens"),
    ("entropy", "Entropy", "nats per token"),
    ("kl", "KL to the reference", "nats per token"),
    ("loss", "Loss", ""),
    ("grad_norm", "Gradient norm, unclipped", ""),
    ("answer_missing_share", "Without an answer", "share of completions"),
    ("truncated_share", "Truncated", "share of completions"),
    ("equal_groups_share", "Groups of one reward", "share of groups"),
)
COSTS = (  # of timings.jsonl
    ("tokens_per_s", "Throughput", "tokens per second"),
    ("peak_gib", "Memory", "GiB, peak of a step"),
)
PHASE_COLOURS = ("#3d8fb8", "#1f3a5f", "#2a7f62", "#c8553d", "#c79a1b", "#8a5ca8", "#6b7280")


def style(number: int) -> tuple[str, str]:
    """Colour and line style of a run by its number; 24 differ."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def window(steps: int) -> int:
    """Odd width of the running mean: 9 steps, and a twentieth of a longer run."""
    return max(9, steps // 20 | 1)


def curves(runs: Sequence[RunFiles]) -> str | None:
    """Every metric that some run has, each in its own axes, and the evaluation's text score; None if none.

    Then tokens per second and memory.
    """
    drawn = [(curve, RunFiles.series) for curve in CURVES if any(run.series(curve[0])[0] for run in runs)]
    spent = [(curve, RunFiles.cost) for curve in COSTS if any(run.cost(curve[0])[0] for run in runs)]
    evaluated = any(run.evaluation()[0] for run in runs)
    if not drawn and not evaluated:
        return None
    panels = len(drawn) + evaluated + len(spent)
    with plt.rc_context(STYLE):
        rows = math.ceil(panels / 3)
        figure, axes = plt.subplots(rows, 3, figsize=(10, 2.3 * rows), layout="constrained", squeeze=False)
        for axis in axes.flat[panels:]:
            axis.set_visible(False)
        places = [*axes.flat[: len(drawn)], *axes.flat[panels - len(spent) : panels]]
        for axis, ((key, title, unit), read) in zip(places, drawn + spent, strict=True):
            _label(axis, title, unit)
            for number, run in enumerate(runs):
                _line(axis, *read(run, key), *style(number))
        if evaluated:
            axis = axes.flat[len(drawn)]
            _label(axis, "Evaluation", "mean text score")
            for number, run in enumerate(runs):
                colour, dash = style(number)
                axis.plot(*run.evaluation(), color=colour, linestyle=dash, marker="o", markersize=4)
        steps = [s for run in runs for line in (*run.training, *run.evaluations) for s in [line["step"] + 1]]
        last = max([*steps, *(s for run in runs for key, *_ in COSTS for s in run.cost(key)[0])])
        for axis in axes.flat[:panels]:
            axis.set_xlim(1 - last * 0.03, last * 1.03 + 0.01)
        for axis in axes.flat[max(panels - 3, 0) : panels]:
            axis.set_xlabel("step")
        return svg(figure)


def _label(axis: Any, title: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontweight="bold")
    axis.set_ylabel(unit)


def _line(axis: Any, steps: list[int], values: list[float], colour: str, dash: str) -> None:
    """Each step thin, the running mean thick; what is not finite is left out of both."""
    pairs = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if not pairs:
        return
    x, y = [s for s, _ in pairs], [v for _, v in pairs]
    if len(x) == 1:
        axis.plot(x, y, color=colour, marker="o", markersize=4)
        return
    axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(x, running_mean(y, window(len(y))), color=colour, linestyle=dash, linewidth=1.8)


def times(runs: Sequence[RunFiles]) -> str | None:
    """Mean seconds a step by phase, a bar for each run; None when no run has them."""
    known = [(run.name, run.phases()) for run in runs if run.phases()]
    if not known:
        return None
    phases = list(dict.fromkeys(phase for _, by in known for phase in by))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(10, 0.8 + 0.4 * len(known)), layout="constrained")
        left = [0.0] * len(known)
        for number, phase in enumerate(phases):
            values = [by.get(phase, 0.0) for _, by in known]
            colour = PHASE_COLOURS[number % len(PHASE_COLOURS)]
            axis.barh(range(len(known)), values, left=left, color=colour, label=phase, height=0.6)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axis.set_yticks(range(len(known)), [name for name, _ in known], parse_math=False)
        axis.invert_yaxis()
        axis.set_xlabel("seconds a step, mean")
        axis.legend(frameon=False, ncols=len(phases), loc="lower left", bbox_to_anchor=(0, 1))
        return svg(figure)


def last_mean(values: Sequence[float]) -> float | None:
    """Mean of the last `window` finite values; None when there are none."""
    last = finite(values)[-window(len(values)) :]
    return sum(last) / len(last) if last else None
