"""Tables and the figure of `python -m bench scoring`, from its records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.limits import MIB, Record, ratio
from bench.report import clock, groups, heading, verdicts_table
from bench.scoring_cases import GROWTH, REPEATED
from bench.scoring_growth import WAYS, by_point
from bench.scoring_limits import faster, smaller, verdicts

START, STOP = "<!-- scoring -->", "<!-- /scoring -->"
TREE = (
    "TRL's tree packing is not among them: its attention (`trl.experimental.async_grpo.packing`) calls a "
    "FlashAttention 3 kernel that exists for GPUs alone, and takes text alone."
)
COLOURS = {REPEATED: "#c8553d", "packed": "#2a7f62", "suffix": "#c9a227", "plain": "#6d7fb0"}


def body(records: Sequence[Record]) -> str:
    """Verdicts, a table for each case, the growth."""
    main = [r for r in records if r["case"] != GROWTH]
    grown = [r for r in records if r["case"] == GROWTH]
    parts = [verdicts_table(verdicts(records)), *(_table(rows) for rows in groups(main)), f"\n{TREE}"]
    return "\n".join([*parts, _growth(grown)] if grown else parts)


def _table(rows: Sequence[Record]) -> str:
    shape = ", ".join(f"{name} = {size}" for name, size in rows[0]["shape"].items())
    base = next(r for r in rows if r["implementation"] == REPEATED)
    lines = [f"\n**{rows[0]['case']}** ({shape})\n"]
    lines += ["| | median | 25 to 75 % | × faster | extra memory | × less | error against fp64 |"]
    lines += ["|---|--:|--:|--:|--:|--:|---|"]
    for r in rows:
        name = f"{r['implementation']} {r['version']}".strip()
        if r["status"] != "ran":
            lines.append(f"| {name} | | | | | | did not run: {r['reason']} |")
            continue
        times, less = faster(r, base), smaller(r, base)
        wrong = "; ".join(f"{key} {value:.1e}" for key, value in r["error"].items())
        cells = (
            f"{clock(r['median_s'])} (n = {r['samples']})",
            f"{clock(r['low_s'])} to {clock(r['high_s'])}",
            "" if times is None else f"{times:.2f}",
            "" if r["extra_bytes"] is None else f"{r['extra_bytes'] / MIB:.1f} MiB",
            "" if less is None else f"{less:.2f}",
            wrong + ("; **wrong: no ratio is given**" if r["gate"] == "red" else ""),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _growth(records: Sequence[Record]) -> str:
    """Each way in units of the repeated prompt's time; below 1 packing does not pay."""
    lines = ["\n**growth of token_stats**: times faster than the repeated prompt\n"]
    lines += [
        f"| | prompt tokens | repeated | {' | '.join(WAYS)} | auto chose |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for rows in by_point(records):
        by = {r["implementation"]: r for r in rows}
        base = by[REPEATED]
        ratios = (faster(by[way], base) for way in WAYS)
        cells = ["wrong" if x is None else f"{x:.2f}" for x in ratios]
        lines.append(
            f"| {rows[0]['dtype']} | {base['shape']['P']} | {clock(base['median_s'])} | "
            f"{' | '.join(cells)} | {base['chosen']} |"
        )
    return "\n".join(lines)


def draw(records: Sequence[Record], path: Path) -> None:
    """Seconds of each way along each axis; a ring around what "auto" chose. A wrong result has no point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axes_of = list(dict.fromkeys(r["axis"] for r in records))
    style = {
        "svg.hashsalt": "raise-core",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 8,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, len(axes_of), figsize=(3 * len(axes_of), 3), squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes.flat, axes_of, strict=True):
            mine = [r for r in records if r["axis"] == name and ratio(r, r) is not None]
            for way, colour in COLOURS.items():
                points = [(r["x"], r["median_s"]) for r in mine if r["implementation"] == way]
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=way, ms=3, lw=1)
            auto = [(r["x"], r["median_s"]) for r in mine if r["implementation"] == r["chosen"]]
            if auto:
                axis.scatter(*zip(*auto, strict=True), s=50, facecolors="none", edgecolors="k", label="auto")
            axis.set(xscale="log", yscale="log", xlabel=name)
            places = sorted({r["x"] for r in mine})
            axis.set_xticks(places, [str(x) for x in places])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        axes.flat[0].set_ylabel("seconds")
        axes.flat[0].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def written(text: str, records: Sequence[Record], docs: Path) -> str:
    """The document with the last run between its markers; the figure is drawn beside it."""
    if START not in text or STOP not in text:
        raise ValueError(f"the document has no {START} … {STOP}; add both lines where the tables belong")
    begun = max(r["begun"] for r in records)
    last = [r for r in records if r["begun"] == begun]
    parts = [heading(last[0]), body(last)]
    grown = [r for r in last if r["case"] == GROWTH]
    if grown:
        (docs / "figures").mkdir(exist_ok=True)
        draw(grown, docs / "figures" / "scoring-growth.svg")
        parts.append("\n![growth of scoring a group](figures/scoring-growth.svg)")
    head, _, rest = text.partition(START)
    return f"{head}{START}\n" + "\n".join(parts) + f"\n{STOP}{rest.partition(STOP)[2]}"
