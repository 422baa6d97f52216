"""How scoring a group grows with completions, frames, prompt and completion length, by way of running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import raise_core as rc
from bench.cases import Truth, errors, gate
from bench.measure import Cpu, rounds, timing
from bench.scoring_cases import GROWTH, MOST, REPEATED, by_logits
from bench.scoring_models import repeated, text, text_prompt, video_prompt

WAYS = ("packed", "suffix", "plain")
SPEND = (1.5, 3)  # seconds of timed calls for each way, and the least number of them


@dataclass(frozen=True)
class Point:
    """One group: `frames` of 16 x 16 patches, or a prompt of `tokens` text tokens; its place on an axis."""

    axis: str
    x: int
    group: int = 8
    length: int = 128
    frames: int = 0
    tokens: int = 0


FULL = (
    *(Point("completions", g, group=g, frames=16) for g in (1, 2, 4, 8, 16, 32)),
    *(Point("frames", t, frames=t) for t in (2, 8, 32)),
    *(Point("prompt tokens", p, tokens=p) for p in (256, 1024, 8192)),
    *(Point("completion tokens, prompt of 64", c, tokens=64, length=c) for c in (32, 256, 1024)),
)
QUICK = (Point("completions", 2, group=2, length=4, tokens=8),)


def run_point(point: Point, model: Any, machine: Cpu, about: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each way, and what "auto" chose. Log-probabilities of all completion tokens."""
    v = model.config.text_config.vocab_size
    prompt = video_prompt(point.frames, 16, v) if point.frames else text_prompt(point.tokens, v)
    rows = torch.tensor([text(point.length, v, 10 + g) for g in range(point.group)])
    ids, batch = [rows.tolist()], repeated(prompt, rows)
    scorers = {way: rc.Scorer(model, packing=way, self_check=False) for way in WAYS}
    chosen = rc.Scorer(model).plan([prompt], ids)[0]
    calls: dict[str, Callable[[], Tensor]] = {REPEATED: lambda: by_logits(model, batch, rows).flatten()}
    for way, scorer in scorers.items():
        calls[way] = lambda scorer=scorer: torch.cat(
            [s.logp for s in scorer.token_stats([prompt], ids)[0] if s.logp is not None]
        )
    made, first = {}, {}
    with torch.no_grad():
        for name, call in calls.items():
            kept: list[Tensor] = []
            first[name] = machine.seconds(lambda call=call, kept=kept: kept.append(call()))
            made[name] = kept[0]
        spent: dict[str, list[float]] = {name: [] for name in calls}
        quick = bool(about.get("quick"))
        plan = [list(calls)] if quick else rounds({n: (first[n], *SPEND) for n in calls})
        for name in (name for names in plan for name in names):
            spent[name].append(machine.seconds(calls[name]))
    truth = {"logp": Truth(made[REPEATED].double(), MOST / 2)}
    shape = {"P": prompt["input_ids"].shape[1], "G": point.group, "C": point.length, "V": v}
    records = []
    for name in calls:
        found, took = errors({"logp": made[name]}, truth), timing(spent[name])
        green, budget = gate(found, truth, None)
        records.append(
            about
            | {
                "case": GROWTH, "dtype": f"{point.axis} = {point.x}", "axis": point.axis, "x": point.x,
                "shape": shape, "implementation": name, "role": "unit" if name == REPEATED else "ours",
                "status": "ran", "reason": "", "chosen": chosen, "median_s": took.median, "low_s": took.low,
                "high_s": took.high, "samples": took.samples, "error": found.error, "budget": budget,
                "extra_bytes": None,
                "gate": "none" if name == REPEATED else "green" if green else "red",
            }
        )  # fmt: skip
    return records


def by_point(records: Sequence[Any]) -> list[list[Any]]:
    """The records of each point, in the order they were run."""
    keys = dict.fromkeys((r["axis"], r["x"]) for r in records)
    return [[r for r in records if (r["axis"], r["x"]) == key] for key in keys]
