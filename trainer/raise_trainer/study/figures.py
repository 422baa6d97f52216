"""The study's drawings: accuracy against Match, and what training did over its steps."""

from collections.abc import Callable
from pathlib import Path

from matplotlib import pyplot as plt

from ..pages import STYLE, running_mean
from .arms import MAIN
from .tables import Found

COLOURS = ("#555555", "#c9a227", "#c8553d", "#3d8fb8", "#8a5ca8", "#7a4b2a", "#2a7f62", "#1f3a5f")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<")  # for those who cannot tell the colours apart
CURVES = (  # of the runs' curves, with the unit on the axis
    ("accuracy", "accuracy of the step's completions"),
    ("match", "Match of the step's completions"),
    ("confidence_mean", "confidence under the reference"),
    ("completion_tokens_mean", "tokens of a completion"),
    ("entropy", "entropy, nats a token"),
    ("kl", "KL to the reference, nats a token"),
)
WINDOW = 7  # steps of the running mean


def scatter(found: Found, path: Path) -> None:
    """Accuracy against Match: every seed pale, its arm's mean on top."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.6, 4.4), layout="constrained")
        for arm, colour, marker in zip(MAIN, COLOURS, MARKERS, strict=True):
            x, y = (found.values(arm.name, "held_out", m) for m in ("accuracy", "match"))
            if x:
                axis.scatter(x, y, color=colour, marker=marker, alpha=0.3, s=16, linewidths=0)
                mean = (sum(x) / len(x), sum(y) / len(y))
                axis.scatter(*mean, color=colour, marker=marker, s=64, label=arm.title, zorder=3)
        axis.set_xlabel("held-out accuracy, sampled at temperature 1")
        axis.set_ylabel("Match: the answer follows from the chain")
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def training(found: Found, path: Path) -> None:
    """Means over seeds of what a step saw, against the share of the arm's compute that is spent."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(10, 5.4), layout="constrained")
        for axis, (metric, unit) in zip(axes.flat, CURVES, strict=True):
            for arm, colour in zip(MAIN, COLOURS, strict=True):
                runs = [found.by[arm.name, s]["curve"] for s in found.seeds(arm.name)]
                curves = [run[metric] for run in runs if len(run.get(metric, ())) > 1]
                if arm.kind == "grpo" and curves:
                    mean = [sum(values) / len(curves) for values in zip(*curves, strict=True)]
                    share = [step / (len(mean) - 1) for step in range(len(mean))]
                    axis.plot(share, running_mean(mean, WINDOW), color=colour, label=arm.title, linewidth=1.3)
            axis.set_title(unit, fontsize=9)
        for axis in axes[1]:
            axis.set_xlabel("share of the compute")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


FIGURES: dict[str, Callable[[Found, Path], None]] = {
    "study-accuracy-match": scatter,
    "study-training": training,
}
