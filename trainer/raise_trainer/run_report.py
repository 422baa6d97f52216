"""`raise-core report RUN…`: runs side by side in one page that needs no other file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .heat_map import DARKEST, chosen
from .pages import render
from .run_figures import curves, last_mean, style, times
from .run_files import RunFiles, differing, finite, read_runs

MOST_LEFT_OUT = 200  # rows listed for each run


def report_runs(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page; returns its path, `report.html` in the first run's folder unless `out` names another.

    Every part is shown for the runs that have it: a run may be under way, or have no evaluation. UserError
    for a folder that holds no run, and for a demo run without `out`, whose own page lies in that place.
    """
    if not folders:
        raise UserError("no run is named; name the `out` folders of runs")
    runs = read_runs(folders)
    if out is None:
        if runs[0].kind == "demo":
            raise UserError(f"{folders[0]}: has the demo's own report.html; name another file with --out")
        out = folders[0] / "report.html"
    return render(
        "run_report.html",
        out,
        runs=[_summary(number, run) for number, run in enumerate(runs)],
        settings=differing(runs),
        curves=curves(runs),
        times=times(runs),
        costs=_costs(runs),
        left_out=[
            (run.name, run.left_out[:MOST_LEFT_OUT], len(run.left_out)) for run in runs if run.left_out
        ],
        cases=[(run.name, chosen(run.completions)) for run in runs if run.completions],
        darkest=DARKEST,
    )


def _summary(number: int, run: RunFiles) -> dict[str, Any]:
    """A row of the first table, with all settings."""
    at, scores = run.evaluation()
    best = max(finite(scores), default=None)
    return {
        "name": run.name,
        "kind": run.kind,
        "colour": style(number)[0],
        "steps": max((line["step"] + 1 for line in run.training), default=0),
        "reward": last_mean(run.series("reward_mean")[1]),
        "text_score": last_mean(run.series("text_score_mean")[1]),
        "confidence": last_mean(run.series("confidence_mean")[1]),
        "loss": last_mean(run.series("loss")[1]),
        "evaluation": None if best is None else (best, at[scores.index(best)]),
        "left_out": len({str(entry.get("id")) for entry in run.left_out}),
        "skipped": sum(line.get("skipped", 0) > 0 for line in run.training),
        "settings": run.settings,
    }


def _costs(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Seconds a step by phase with their shares, figures per second and memory; {} when nothing is known."""
    phases = {run.name: run.phases() for run in runs}
    rates = {run.name: run.rates() for run in runs}
    peaks = {run.name: run.peak_gib() for run in runs}
    if (
        not any(phases.values())
        and not any(rates.values())
        and not any(p is not None for p in peaks.values())
    ):
        return {}
    names = list(dict.fromkeys(name for by in phases.values() for name in by))
    rows = [(name, [_with_share(by.get(name), sum(by.values())) for by in phases.values()]) for name in names]
    rows.append(("all phases", [f"{sum(by.values()):.3f} s" if by else "–" for by in phases.values()]))
    for name in dict.fromkeys(name for by in rates.values() for name in by):
        shown = name.replace("_per_s", "/s").replace("_", " ")
        rows.append((shown, [f"{by[name]:.1f}" if name in by else "–" for by in rates.values()]))
    if any(p is not None for p in peaks.values()):
        rows.append(("peak memory", ["–" if p is None else f"{p:.2f} GiB" for p in peaks.values()]))
    return {"runs": list(phases), "rows": rows}


def _with_share(seconds: float | None, whole: float) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.3f} s" + (f" ({seconds / whole:.0%})" if whole else "")
