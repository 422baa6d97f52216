"""The recorded compilations: complete, without a fault, and what docs/kernels.md says of them."""

from __future__ import annotations

from pathlib import Path

from bench.micro import aot_tables
from raise_kernels.aot_table import TARGETS, variants

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_the_record_has_the_whole_table_and_no_fault() -> None:
    records = aot_tables.read()
    table = {(t, v.name): v for t in TARGETS for v in variants(t, False)}
    assert set(records) == set(table)
    assert all(r["faults"] == [] and r["spills"] <= table[key].spills for key, r in records.items())
    assert not any(r["commit"].endswith("+") for r in records.values())


def test_the_page_states_what_was_recorded() -> None:
    page, records = PAGE.read_text(encoding="utf-8"), aot_tables.read()
    lines = [aot_tables.summary(records), *aot_tables.of_logits(records), *aot_tables.of_tiles(records)]
    missing = [line for line in lines if line not in page]
    assert not missing, f"print them anew by python -m bench.micro.aot_tables: {missing}"


def test_tables_by_hand() -> None:
    names = {(t, v.name) for t in TARGETS for v in variants(t, False)}
    blank = {"registers": 9, "shared": 16, "exponentials": 0, "faults": [], "commit": "c", "triton": "t"}
    records = {key: dict(blank) for key in names}
    records["sm_90", "stats bf16 level 0 rows"] |= {"registers": 80, "exponentials": 72}
    records["sm_80", "groups of 64 from logp sorted"]["registers"] = 116
    records["gfx942", "linear bf16 gradient"]["faults"] = ["no v_mfma"]
    assert aot_tables.summary(records) == f"{len(names)} variants ({len(names)} at c), triton t: 1 refused"
    table = aot_tables.of_logits(records)
    assert table[2] == "| statistics, level 0 | 9 | 80 | 9 | 9 | 1.125 |  |"
    assert table[-1] == "| group of 64 | 116 | 9 | 9 | 9 |  |  |"
    assert aot_tables.of_tiles(records)[2].startswith("| level 0 | 128×128×32, 8, 4; 9 / 16 | ")
