"""Accuracy against the number of samples, drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .votes import TITLES

COLOURS = {"pass": "#9a9a9a", "vote": "#c27c0e", "best": "#2f6fb2", "weighted": "#7a4fa3", "beam": "#1f8a4c"}


def draw_curves(points: Sequence[dict[str, Any]], file: Path, title: str = "") -> None:
    """A line for each method of `votes.curves`, with a band of one standard error; the file's name says SVG
    or PNG. ImportError, with what to install, where there is no matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the figure needs matplotlib; run: pip install matplotlib") from None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for method, name in TITLES.items():
        own = sorted((p for p in points if p["method"] == method), key=lambda p: p["n"])
        if not own:
            continue
        n, y = [p["n"] for p in own], [p["accuracy"] for p in own]
        low, high = ([p["accuracy"] + sign * p["standard_error"] for p in own] for sign in (-1, 1))
        axes.fill_between(n, low, high, color=COLOURS[method], alpha=0.12, linewidth=0)
        style = "--" if method == "pass" else "-"
        axes.plot(n, y, style, marker="o", markersize=4, color=COLOURS[method], label=name)
    axes.set_xscale("log", base=2)
    counts = sorted({p["n"] for p in points})
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set(xlabel="N, chains sampled for a question", ylabel="accuracy", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    with rc_context({"svg.hashsalt": "raise-core"}):  # the same bytes each time
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
