"""Drawings of an analysis and of rewards in all-right groups: for the page, and as files."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from ..errors import UserError
from ..pages import INK, RIGHT, STYLE, WRONG
from .analysis import HISTOGRAM_BINS, Analysis, Separation
from .discrimination import Discrimination
from .statistics import Bin, Interval

LONG_NAME = 10  # characters of a reward, which is written slanting from there on
ARM_COLOURS = (INK, WRONG, RIGHT, "#8a5ca8", "#c79a1b", "#3d8fb8")


def told(interval: Interval, digits: int = 3) -> str:
    """A figure with its interval, as text."""
    if interval.value is None:
        return "–"
    bounds = ""
    if interval.low is not None and interval.high is not None:
        bounds = f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return f"{interval.value:.{digits}f}{bounds}"


def draw_confidence(analysis: Analysis) -> Any:
    """Histograms of right and wrong answers by answer-token and by whole-sequence confidence."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.9), layout="constrained")
    named = (("the answer's tokens", analysis.answer), ("all tokens", analysis.sequence))
    for axis, (title, found) in zip(axes, named, strict=True):
        _histogram(axis, found)
        axis.set_title(f"Confidence in {title}", loc="left", fontweight="bold")
        axis.set_xlabel(f"AUROC {told(found.auroc)}, overlap {told(found.overlap)}")
    axes[0].set_ylabel("share of right, of wrong answers")
    return figure


def _histogram(axis: Any, found: Separation) -> None:
    edges = [b / HISTOGRAM_BINS for b in range(HISTOGRAM_BINS + 1)]
    sides = (("right", found.histogram_right, RIGHT), ("wrong", found.histogram_wrong, WRONG))
    for name, counts, colour in sides:
        total = sum(counts)
        heights = [count / total if total else 0.0 for count in counts]
        axis.stairs(heights, edges, fill=True, color=colour, alpha=0.55, label=f"{name} ({total})")
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


def draw_reliability(analysis: Analysis) -> Any:
    """Share of right answers by confidence, of both confidences; the diagonal is calibrated."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    named = (("answer's tokens", analysis.answer), ("all tokens", analysis.sequence))
    for axis, (title, found) in zip(axes, named, strict=True):
        axis.plot([0, 1], [0, 1], color="#9aa3ad", linewidth=1, linestyle="--")
        _shares(axis, found.reliability, INK)
        axis.set_title(f"Reliability, {title}", loc="left", fontweight="bold")
        axis.set_xlabel(f"mean confidence in bin; calibration error {told(found.calibration_error)}")
    axes[0].set_ylabel("share right")
    return figure


def draw_min_prob(analysis: Analysis) -> Any:
    """Share of answers that follow from their chain, by the probability of the least certain token."""
    figure, axis = plt.subplots(figsize=(6, 2.9), layout="constrained")
    _shares(axis, analysis.min_prob_match, RIGHT)
    axis.set_title("Match by the answer's least certain token", loc="left", fontweight="bold")
    axis.set_xlabel(f"its probability, mean in bin; AUROC {told(analysis.min_prob_auroc)}")
    axis.set_ylabel("share that match")
    return figure


def _shares(axis: Any, bins: Sequence[Bin], colour: str) -> None:
    """A dot for each bin that has answers, with their number."""
    filled = [b for b in bins if b.count]
    axis.plot([b.mean for b in filled], [b.share for b in filled], color=colour, marker="o", markersize=5)
    for b in filled:
        axis.annotate(
            str(b.count),
            (b.mean, b.share),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=7,
        )
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.05, 1.15)


def draw_rewards(arms: Mapping[str, Mapping[str, Discrimination]]) -> Any:
    """For each reward and arm, how often a supported completion earns more than another of its group."""
    rewards = list(dict.fromkeys(name for arm in arms.values() for name in arm))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    width = 0.8 / max(len(arms), 1)
    slant: Any = {"rotation": 20, "ha": "right"} if max(map(len, rewards)) > LONG_NAME else {}
    parts: tuple[tuple[Any, str, Callable[[Discrimination], Interval]], ...] = (
        (axes[0], "Pairs in order (AUROC in all-right groups)", lambda d: d.auroc),
        (axes[1], "Supported less unsupported, mean reward", lambda d: d.difference),
    )
    for axis, title, of in parts:
        for number, found in enumerate(arms.values()):
            for place, reward in enumerate(rewards):
                interval = of(found[reward]) if reward in found else Interval(None)
                if interval.value is None:
                    continue
                x = place + (number - (len(arms) - 1) / 2) * width
                colour = ARM_COLOURS[number % len(ARM_COLOURS)]
                axis.plot(x, interval.value, "o", color=colour, markersize=5)
                if interval.low is not None and interval.high is not None:
                    axis.plot([x, x], [interval.low, interval.high], color=colour, linewidth=1.5)
        axis.set_xticks(range(len(rewards)), rewards, parse_math=False, **slant)
        axis.set_xlim(-0.5, len(rewards) - 0.5)
        axis.set_title(title, loc="left", fontweight="bold")
    axes[0].axhline(0.5, color="#9aa3ad", linewidth=1, linestyle="--")
    axes[1].axhline(0.0, color="#9aa3ad", linewidth=1, linestyle="--")
    if len(arms) > 1:
        _name_arms(figure, list(arms))
    return figure


def _name_arms(figure: Any, arms: Sequence[str]) -> None:
    """Below the axes, as written: a folder's name may hold a `$`, or begin with `_`."""
    dots = [
        Line2D([], [], color=ARM_COLOURS[i % len(ARM_COLOURS)], marker="o", linestyle="", markersize=5)
        for i in range(len(arms))
    ]
    legend = figure.legend(dots, ["arm"] * len(arms), loc="outside lower center", ncols=4, frameon=False)
    for text, arm in zip(legend.get_texts(), arms, strict=True):
        text.set_parse_math(False)
        text.set_text(arm)


DRAWINGS: dict[str, Callable[[Analysis], Any]] = {
    "confidence": draw_confidence,
    "reliability": draw_reliability,
    "min_prob": draw_min_prob,
}


def figures(analysis: Analysis, folder: Path, *, prefix: str = "") -> list[Path]:
    """Write the drawings of an analysis, PREFIXname.svg and .png; returns the files.

    name: confidence, reliability, min_prob. UserError where one cannot be written.
    """
    written = list[Path]()
    for name, draw in DRAWINGS.items():
        with plt.rc_context(STYLE):
            written += save(draw(analysis), folder / f"{prefix}{name}")
    return written


def save(figure: Any, base: Path) -> list[Path]:
    """Write a drawing as BASE.svg and BASE.png and close it. UserError where that cannot be."""
    written = list[Path]()
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, bbox_inches="tight", dpi=150, metadata=metadata)
        file = base.with_name(f"{base.name}.{kind}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(buffer.getvalue())
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}); name another folder") from None
        written.append(file)
    plt.close(figure)
    return written
