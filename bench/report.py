"""Tables and figures of `python -m bench ops`, from its records alone.

python -m bench report [--results FILE]      the last run of each device, into docs/bench.md and docs/figures

A scoring.jsonl beside FILE (`python -m bench scoring`) goes into its own section.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.limits import FIRST_CALLS, MIB, Record, Verdict, judge, ratio
from bench.record import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = {"unit": "#9a9a9a", "ours": "#2a7f62", "floor": "#7fb8a4", "eager": "#c8553d", "peer": "#6d7fb0"}
HEADER = "| {} | median | 25 to 75 % | {} | {} | extra memory | error against fp64 | |"
RULE = "|---|--:|--:|--:|--:|--:|---|---|"


def groups(records: Sequence[Record]) -> list[list[Record]]:
    """Records by case and dtype, in the order they were run."""
    keys = dict.fromkeys((r["case"], r["dtype"]) for r in records)
    return [[r for r in records if (r["case"], r["dtype"]) == key] for key in keys]


def records_table(records: Sequence[Record]) -> str:
    """One Markdown table for each case and dtype, and under it what was faster than we."""
    return "\n".join(_case_table(rows) for rows in groups(records))


def _case_table(rows: Sequence[Record]) -> str:
    first = rows[0]
    unit = next((r for r in rows if r["implementation"] == r["unit"]), first)
    shape = ", ".join(f"{name} = {size}" for name, size in first["shape"].items())
    rate = "GFLOP/s" if any(r.get("gflop_per_s") for r in rows) else "GB/s"
    title = ", ".join(x for x in (first["case"], first["dtype"]) if x)
    lines = [f"\n**{title}** ({shape})\n", HEADER.format("implementation", f"× {unit['unit']}", rate), RULE]
    lines += [_line(row, unit, rate) for row in rows]
    behind = _behind(rows)
    return "\n".join([*lines, "", behind] if behind else lines)


def _line(row: Record, unit: Record, rate: str) -> str:
    name = f"{row['implementation']} {row['version']}".strip()
    if row["status"] != "ran":
        return f"| {name} | | | | | | | did not run: {row['reason']} |"
    times = ratio(row, unit)
    speed = row.get("gflop_per_s" if rate == "GFLOP/s" else "gb_per_s")
    share = row["share_of_limit"]
    rated = "" if not speed or row["gate"] == "red" else f"{speed:.1f}"
    rated += f" ({100 * share:.0f} %)" if rated and share is not None else ""
    extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / MIB:.1f} MiB"
    wrong = "; ".join(f"{key} {value:.1e}" for key, value in row["error"].items())
    note = "**wrong result: no ratio is given**" if row["gate"] == "red" else row["note"]
    cells = [
        f"{clock(row['median_s'])} (n = {row['samples']})",
        f"{clock(row['low_s'])} to {clock(row['high_s'])}",
        "" if times is None else f"{times:.2f}",
        *(rated, extra, wrong, note),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def clock(seconds: float) -> str:
    """Seconds as text: ms below one second."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def plain(value: float) -> str:
    """A number of a figure in three digits or more, without an exponent; what is below 0.01 is 0."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "0"


def _behind(rows: Sequence[Record]) -> str:
    """A line that names what was faster than raise-core; nothing without such, or without a right result."""
    ours = next((r for r in rows if r["role"] == "ours"), None)
    if ours is None or ours["case"] in FIRST_CALLS or ours.get("quick"):
        return ""
    found = [
        f"{row['implementation']} ({share:.2f} of our time)"
        for row in rows
        if row["role"] in ("eager", "peer") and (share := ratio(row, ours)) is not None and share < 1
    ]
    return f"Faster than raise-core here: {', '.join(found)}." if found else ""


def verdicts_table(verdicts: Sequence[Verdict]) -> str:
    """What `--check` judges."""
    lines = ["\n| limit | of | found | wanted | |", "|---|---|---|---|---|"]
    for v in verdicts:
        lines.append(
            f"| {v.case} | {v.what} | {v.found} | {v.wanted} | {'holds' if v.ok else '**falls short**'} |"
        )
    return "\n".join(lines)


def last_runs(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The last run of each kind of device: "cpu", "cuda"."""
    runs: dict[str, list[Record]] = {}
    for kind in dict.fromkeys(r["device_kind"] for r in records):
        mine = [r for r in records if r["device_kind"] == kind]
        begun = max(r["begun"] for r in mine)
        runs[kind] = [r for r in mine if r["begun"] == begun]
    return runs


def heading(first: Record) -> str:
    """What a run was made with, in a sentence."""
    dirty = ", with changes that are not committed" if first["dirty"] else ""
    compiled = "with" if first["compiled"] else "without"
    packages = ", ".join(f"{name} {v}" for name, v in first["packages"].items() if v)
    return (
        f"Run of {first['begun']} at commit `{first['commit'][:12]}`{dirty}: {first['device']}, "
        f"{first['threads']} threads, {first['memory_bytes'] / 2**30:.0f} GiB, "
        f"Python {first['python']}, {packages}; {compiled} compiled C code."
    )


def written(text: str, kind: str, body: str) -> str:
    """The text with `body` between the markers of a device."""
    start, stop = f"<!-- ops:{kind} -->", f"<!-- /ops:{kind} -->"
    if start not in text or stop not in text:
        raise ValueError(f"the document has no {start} … {stop}; add both lines where the table belongs")
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(stop)
    return f"{head}{start}\n{body}\n{stop}{tail}"


def draw(records: Sequence[Record], path: Path, value: str) -> None:
    """Bars of "median_s" (seconds) or "extra_bytes" for each case. A wrong result has no bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = [rows for rows in groups(records) if any(r["role"] == "eager" for r in rows)]
    order = list(dict.fromkeys(rows[0]["case"] for rows in drawn))
    drawn.sort(key=lambda rows: order.index(rows[0]["case"]))
    style = {
        "svg.hashsalt": "raise-core",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 8,
    }
    height = sum(0.9 + 0.19 * len(rows) for rows in drawn[::2])
    ratios = [2 + len(rows) for rows in drawn[::2]]
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(ratios), 2, figsize=(9.5, height), squeeze=False, layout="constrained", height_ratios=ratios
        )
        for axis in axes.flat[len(drawn) :]:
            axis.axis("off")
        for axis, rows in zip(axes.flat, drawn, strict=False):
            _bars(axis, rows, value)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _bars(axis: Any, rows: Sequence[Record], value: str) -> None:
    scale = 1e-3 if value == "median_s" else MIB
    kept = [r for r in rows if r["status"] == "ran" and r["gate"] != "red" and r[value] is not None]
    lengths = [r[value] / scale for r in kept]
    bars = axis.barh(range(len(kept)), lengths, color=[COLOURS[r["role"]] for r in kept])
    if value == "median_s":
        spread = [
            [(r["median_s"] - r["low_s"]) / scale for r in kept],
            [(r["high_s"] - r["median_s"]) / scale for r in kept],
        ]
        axis.errorbar(lengths, range(len(kept)), xerr=spread, fmt="none", ecolor="#333333", lw=0.8)
    axis.bar_label(bars, fmt=plain, padding=6)
    axis.set_yticks(range(len(kept)), [r["implementation"] for r in kept])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(
        f"{rows[0]['case']}, {rows[0]['dtype']} [{'ms' if value == 'median_s' else 'MiB beside the results'}]"
    )


def main(arguments: Sequence[str]) -> int:
    """Draw the last run of each device."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "ops.jsonl", help="records of python -m bench ops"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of bench.md and figures/")
    options = parser.parse_args(arguments)
    if not options.results.exists():
        parser.error(f"{options.results} does not exist; run python -m bench ops first")
    records = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    document = options.docs / "bench.md"
    text = document.read_text(encoding="utf-8")
    for kind, run in last_runs(records).items():
        parts = [heading(run[0]), verdicts_table(judge(run)), records_table(run)]
        (options.docs / "figures").mkdir(exist_ok=True)
        for value, name in (("median_s", "time"), ("extra_bytes", "memory")):
            figure = f"figures/ops-{name}-{kind}.svg"
            draw(run, options.docs / figure, value)
            parts.append(f"\n![{name} of each implementation]({figure})")
        body = "\n".join(parts)
        text = written(text, kind, body)
        print(body)
    scoring = options.results.with_name("scoring.jsonl")
    if scoring.exists():
        from bench.scoring_report import written as scored

        recorded = [json.loads(line) for line in scoring.read_text(encoding="utf-8").splitlines()]
        text = scored(text, recorded, options.docs)
    document.write_text(text, encoding="utf-8")
    return 0
