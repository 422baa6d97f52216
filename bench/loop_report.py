"""What the records of `python -m bench loop` say: limits, a table, a figure of where the time goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.limits import Verdict
from bench.loop_sides import PHASES

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "loop.svg"
COLOURS = dict(zip(PHASES, ("#2a7f62", "#c9a227", "#4a6fa5", "#999999"), strict=True))
Record = dict[str, Any]


def last_run(file: Path) -> list[Record]:
    """The records of the run that began last."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    begun = max(r["begun"] for r in records)
    return [r for r in records if r["begun"] == begun]


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Of each shape: do the results agree, and is ours fast enough; a wrong result has no ratio."""
    found = []
    for ours, theirs in pairs(records):
        case, agree = ours["case"], True
        for what, budget in ours["budget"].items():
            error = ours["error"][what]
            ok = error <= budget
            agree &= ok
            found.append(Verdict(case, f"{what} against TRL", f"{error:.1e}", f"≤ {budget:g}", ok))
        wanted = ours["shape"]["at_least"]
        if wanted and not ours["quick"]:
            ratio = theirs["median_s"] / ours["median_s"]
            text = f"{ratio:.2f} × faster" if agree else "not judged: the results differ"
            found.append(Verdict(case, "step", text, f"≥ {wanted:g} ×", agree and ratio >= wanted))
    return found


def pairs(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Ours and TRL's of each shape."""
    by = {(r["case"], r["implementation"]): r for r in records}
    return [(by[case, "raise_core"], by[case, "TRL"]) for case in dict.fromkeys(r["case"] for r in records)]


def table(records: Sequence[Record]) -> str:
    """Markdown: seconds of a step and of its phases, then the limits."""
    lines = [
        "| case | implementation | step s | quartiles | " + " | ".join(f"{p} s" for p in PHASES) + " |",
        "|---|---|--:|--:|" + "--:|" * len(PHASES),
    ]
    for r in (side for pair in pairs(records) for side in pair):
        phases = " | ".join(f"{r['phases_s'][p]:.3f}" for p in PHASES)
        spread = f"{r['low_s']:.3f} to {r['high_s']:.3f}"
        lines.append(f"| {r['case']} | {r['implementation']} | {r['median_s']:.3f} | {spread} | {phases} |")
    lines += ["", "| case | what | found | wanted | |", "|---|---|---|---|---|"]
    for v in verdicts(records):
        lines.append(f"| {v.case} | {v.what} | {v.found} | {v.wanted} | {'' if v.ok else 'SHORT'} |")
    return "\n".join(lines)


def draw(records: Sequence[Record], path: Path) -> None:
    """A bar for each side of each shape, its phases one after the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [side for pair in pairs(records) for side in pair]
    labels = [f"{r['implementation']}, {r['case']}" for r in rows]
    style = {
        "svg.hashsalt": "raise-core",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 8,
    }
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(7, 0.6 + 0.4 * len(rows)), layout="constrained")
        left = [0.0] * len(rows)
        for phase, colour in COLOURS.items():
            widths = [r["phases_s"][phase] for r in rows]
            axis.barh(labels, widths, left=left, color=colour, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel("seconds of a step, by phase (medians)")
        axis.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
