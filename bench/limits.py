"""What the figures have to be, judged from the records alone. A wrong result gets no ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

MIB = 1 << 20
FIRST_CALLS = ("first call", "first linear call")
EAGER = ("eager, reused memory", "eager, fresh memory", "eager")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Limit:
    """factor: time at most so many times that of the fastest of `against`.

    mebibytes: extra memory; "T * V": less than a byte for each logit. seconds: the time itself.
    dtype, device ("cpu", "cuda"): "" is any.
    """

    case: str
    factor: float | None = None
    against: tuple[str, ...] = ()
    mebibytes: float | str | None = None
    seconds: float | None = None
    dtype: str = ""
    device: str = "cpu"


THREE = "logp + entropy + self_certainty"
LIMITS = (
    Limit("logp", 3.0, ("amax",), dtype="float32"),
    Limit("logp", 6.0, ("amax",), dtype="bfloat16"),
    Limit("logp", 1.0, EAGER, device=""),
    Limit("logp", mebibytes="T * V", device=""),
    Limit(THREE, 0.5, EAGER),
    Limit("linear forward", 1.15, ("GEMM",)),
    Limit("linear forward", mebibytes=64),
    Limit("linear forward + backward", 1.1, ("4 GEMMs",)),
    Limit("linear forward + backward", mebibytes=64),
    Limit("linear policy loss", 1.1, EAGER),
    Limit("linear policy loss", mebibytes=128),
    Limit("first call", seconds=5.0),
    Limit("first linear call", seconds=5.0),
)


@dataclass(frozen=True)
class Verdict:
    """One limit of one case: what was found, what was wanted, and whether it holds."""

    case: str
    what: str
    found: str
    wanted: str
    ok: bool


def judge(records: Sequence[Record], limits: Sequence[Limit] = LIMITS) -> list[Verdict]:
    """A verdict for the error gate of each of our rows, and for each limit of a case that was run."""
    verdicts = []
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in records):
        rows = [r for r in records if (r["case"], r["dtype"]) == (case, dtype)]
        label = f"{case}, {dtype}" if dtype else case
        for row in rows:
            if row["role"] in ("ours", "floor") and (case not in FIRST_CALLS or row["status"] != "ran"):
                verdicts.append(_gate(label, row))
        if rows[0].get("quick"):
            continue
        for limit in limits:
            if (
                limit.case == case
                and limit.dtype in ("", dtype)
                and limit.device in ("", rows[0]["device_kind"])
            ):
                verdicts += [_verdict(label, limit, row, rows) for row in rows if row["role"] == "ours"]
    return verdicts


def ratio(row: Record, other: Record) -> float | None:
    """Time of `row` in units of `other`'s; None where either did not run or its results are wrong."""
    wrong = any(r["status"] != "ran" or r["gate"] == "red" for r in (row, other))
    return None if wrong else row["median_s"] / other["median_s"]


def _gate(label: str, row: Record) -> Verdict:
    what = f"{row['implementation']}: error against fp64"
    if row["status"] != "ran":
        return Verdict(label, what, row["reason"], "a result", False)
    if row["gate"] == "none":
        return Verdict(label, what, "no output to compare", "a result", False)
    found = ", ".join(f"{name} {value:.1e}" for name, value in row["error"].items())
    budget = ", ".join(f"{row['budget'][name]:.1e}" for name in row["error"])
    return Verdict(label, what, found, f"≤ {budget} + rounding", row["gate"] == "green")


def _verdict(label: str, limit: Limit, row: Record, rows: Sequence[Record]) -> Verdict:
    if row["status"] != "ran" or row["gate"] == "red":
        why = row["reason"] if row["status"] != "ran" else "not judged: the result is wrong"
        return Verdict(label, _what(limit), why, _wanted(limit, row), False)
    if limit.factor is not None:
        return _time(label, limit, row, rows)
    if limit.seconds is not None:
        found = f"{row['median_s']:.2f} s"
        return Verdict(label, "time", found, _wanted(limit, row), row["median_s"] <= limit.seconds)
    extra = row["extra_bytes"]
    if extra is None:
        return Verdict(label, "extra memory", "this system does not say", _wanted(limit, row), False)
    return Verdict(
        label, "extra memory", f"{extra / MIB:.1f} MiB", _wanted(limit, row), extra <= _bytes(limit, row)
    )


def _time(label: str, limit: Limit, row: Record, rows: Sequence[Record]) -> Verdict:
    others = [r for r in rows if r["implementation"] in limit.against and r["status"] == "ran"]
    best = min(others, key=lambda r: r["median_s"], default=None)
    found = None if best is None else ratio(row, best)
    if best is None or found is None or limit.factor is None:
        return Verdict(label, _what(limit), "nothing to compare with ran", _wanted(limit, row), False)
    text = f"{found:.2f} × {best['implementation']}"
    return Verdict(label, "time", text, _wanted(limit, row), found <= limit.factor)


def _bytes(limit: Limit, row: Record) -> float:
    if limit.mebibytes == "T * V":
        return float(prod(row["shape"].values())) - 1
    return float(limit.mebibytes or 0) * MIB


def _what(limit: Limit) -> str:
    return "extra memory" if limit.mebibytes is not None else "time"


def _wanted(limit: Limit, row: Record) -> str:
    if limit.factor is not None:
        return f"≤ {limit.factor:g} ×"
    if limit.seconds is not None:
        return f"≤ {limit.seconds:g} s"
    if isinstance(limit.mebibytes, str):
        return f"< {limit.mebibytes} bytes, {_bytes(limit, row) / MIB:.1f} MiB"
    return f"≤ {limit.mebibytes:g} MiB"
