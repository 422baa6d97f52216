"""The tables of registers in docs/kernels.md, from the recorded compilations alone.

python -m bench.micro.aot_tables        reads bench/results/aot.jsonl, which `raise_kernels.aot --json` writes
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from raise_kernels import linear_tiles
from raise_kernels.aot_table import TARGETS, variants

RECORD = Path(__file__).parents[1] / "results" / "aot.jsonl"
Records = dict[tuple[str, str], dict[str, Any]]


def read(path: Path = RECORD) -> Records:
    """Every record by (target, variant)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {(r["target"], r["variant"]): r for r in map(json.loads, lines)}


def summary(records: Records) -> str:
    """What was compiled, from which commit, and how much of it was refused."""
    commits = Counter(r["commit"] for r in records.values())
    (triton,) = {r["triton"] for r in records.values()}
    bad = sum(bool(r["faults"]) for r in records.values())
    made = ", ".join(f"{count} at {commit}" for commit, count in commits.most_common())
    return f"{len(records)} variants ({made}), triton {triton}: {bad or 'none'} refused"


def of_logits(records: Records) -> list[str]:
    """Registers of a thread, the worst of each kernel's forms without softcap; exponentials of a logit."""
    logits = {(t, v.name): v.logits for t in TARGETS for v in variants(t, False)}
    lines = [
        f"| bf16, no softcap | {' | '.join(TARGETS)} | exponentials, NVIDIA | gfx942 |",
        "|---" * (3 + len(TARGETS)) + "|",
    ]
    for title, start in (
        *((f"statistics, level {k}", f"stats bf16 level {k}") for k in range(3)),
        ("gradient", "gradient bf16"),
        ("group of 64", "groups of 64 "),
    ):
        names = [n for t, n in records if t == "sm_80" and n.startswith(start)]
        if not start.startswith("groups"):
            names = [start, f"{start} rows"]
        registers = [max(records[t, n]["registers"] for n in names) for t in TARGETS]
        shares = {
            t: max((records[t, n]["exponentials"] / logits[t, n] for n in names if logits[t, n]), default=0.0)
            for t in TARGETS
        }
        both = (max(s for t, s in shares.items() if t != "gfx942"), shares["gfx942"])
        cells = [title, *map(str, registers), *(f"{s:.4g}" if s else "" for s in both)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def of_tiles(records: Records) -> list[str]:
    """Rows x columns x depth, warps, stages; registers / bytes of shared memory, from hidden states."""
    lines = [f"| bf16, no softcap | {' | '.join(TARGETS)} |", "|---" * (1 + len(TARGETS)) + "|"]
    for use in ("level 0", "level 1", "level 2", "gradient"):
        cells = [use]
        for t in TARGETS:
            tile, r = linear_tiles.choose(t, True, use, False), records[t, f"linear bf16 {use}"]
            size = f"{tile.rows}×{tile.columns}×{tile.depth}, {tile.warps}, {tile.stages}"
            cells.append(f"{size}; {r['registers']} / {r['shared']}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    every = read()
    print(summary(every), *of_logits(every), *of_tiles(every), sep="\n")
