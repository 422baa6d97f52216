"""What the figures of `python -m bench scoring` have to be, judged from the records alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.limits import Record, Verdict, judge, ratio
from bench.scoring_cases import GRADIENT, GROWTH, MOST, REPEATED, REWARDS, STATS, UPDATE


@dataclass(frozen=True)
class AtLeast:
    """Times faster, and times less extra memory, than the repeated prompt. vocabulary: None is any."""

    case: str
    vocabulary: int | None
    faster: float | None = None
    smaller: float | None = None


LARGE = 151936
LIMITS = (
    AtLeast(REWARDS, LARGE, faster=8.0, smaller=10.0),
    AtLeast(STATS, 512, faster=4.0),
    AtLeast(STATS, LARGE, faster=2.0, smaller=5.0),
    AtLeast(UPDATE, None, faster=3.5, smaller=3.0),
)


def collapsed(record: Record) -> dict[str, object]:
    """The record with the gradients' errors as one: the largest relative to its weight's largest entry."""
    error, budget = dict(record.get("error", {})), dict(record.get("budget", {}))
    keys = [k for k in error if k.startswith(GRADIENT)]
    if keys:
        parts = [MOST * error.pop(k) / b if (b := budget.pop(k)) else float("inf") for k in keys]
        error["gradients, relative"], budget["gradients, relative"] = max(parts), MOST
    return {**record, "error": error, "budget": budget}


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """A verdict for the error of each of our rows, and for each limit of a case that was run."""
    found = [
        replace(v, what=v.what.replace("fp64", REPEATED)) if v.case.startswith(GROWTH) else v
        for v in judge(records, ())
    ]
    for row in records:
        if row["role"] != "ours" or row.get("quick"):
            continue
        other = next(
            r
            for r in records
            if r["implementation"] == REPEATED and (r["case"], r["dtype"]) == (row["case"], row["dtype"])
        )
        for limit in LIMITS:
            if limit.case == row["case"] and limit.vocabulary in (None, row["shape"]["V"]):
                label = f"{row['case']}, {row['dtype']}"
                for what, wanted, got in (
                    ("time", limit.faster, faster(row, other)),
                    ("extra memory", limit.smaller, smaller(row, other)),
                ):
                    if wanted is not None:
                        text = "not judged: no right result of both" if got is None else f"{got:.2f} × less"
                        ok = got is not None and got >= wanted
                        found.append(Verdict(label, what, text, f"≥ {wanted:g} × less", ok))
    return found


def faster(row: Record, other: Record) -> float | None:
    """How many times less time than `other`; None where either did not run or is wrong."""
    return ratio(other, row)


def smaller(row: Record, other: Record) -> float | None:
    """How many times less extra memory than `other`; None where either is wrong or unknown."""
    if ratio(row, other) is None or not row["extra_bytes"] or other["extra_bytes"] is None:
        return None
    return float(other["extra_bytes"] / row["extra_bytes"])
