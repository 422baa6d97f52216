"""The tables and drawings of the study's page, from records made up here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raise_trainer.study import tables
from raise_trainer.study.arms import ARMS, EXPLORATORY, MAIN
from raise_trainer.study.figures import CURVES, FIGURES, plt
from raise_trainer.study.records import Results
from raise_trainer.study.world_shift import TEST_SETS

METRICS = ("accuracy", "answer", "match", "confidence", "confidence_right", "confidence_wrong")


def record(arm: str, seed: int, **held_out: float) -> dict[str, Any]:
    """A run; what is not given is 0.5."""
    names = (*METRICS, "accuracy_greedy", "answer_greedy", "match_greedy")
    figures = {test: dict.fromkeys(names, 0.5) for test in TEST_SETS}
    figures["held_out"] |= held_out
    return {"arm": arm, "seed": seed, "figures": figures}


def cells(table: str, row: str) -> list[str]:
    """The cells of the one row that has `row` in it."""
    (line,) = [line for line in table.splitlines() if row in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_exploratory_arm_differs_from_its_base_in_one_thing() -> None:
    for arm in EXPLORATORY:
        base = tables.base_of(arm)
        assert base in MAIN
        mine, other = (a.method | {"reference": a.reference} for a in (arm, base))
        mine = {"reward": "scre-igsr"} | mine  # the method's own default
        assert len({k for k in mine | other if mine.get(k) != other.get(k)}) == 1, arm.name


def test_an_exploratory_arm_is_compared_with_its_own_base() -> None:
    """T-GRPO's reward is 0 or 1, and so it is compared with GRPO 0/1, the others with Video-RAISE."""
    accuracy = {"grpo": (0.2, 0.3), "t-grpo": (0.3, 0.4), "scre-igsr": (0.5, 0.6), "kl-0.04": (0.45, 0.55)}
    found = tables.Found(
        [record(a, s, accuracy=v) for a, both in accuracy.items() for s, v in enumerate(both)]
    )
    table = tables.exploratory(found)
    assert cells(table, "question")[:4] == ["question", "arm", "compared with", "accuracy"]
    changes = {"T-GRPO, 0/1": ("GRPO 0/1", "+0.100"), "kl 0.04": ("Video-RAISE, IGSR paper", "-0.050")}
    for title, (base, change) in changes.items():
        row = cells(table, title)
        assert row[1:3] == [f"{title} (2 seeds)", base]
        assert row[4].strip("*").startswith(change)
    assert tables.exploratory(tables.Found([record("grpo", 0)])) == ""


def test_a_seed_without_a_right_answer_has_no_confidence_in_right_ones() -> None:
    """Such a seed is recorded as 0; the mean is over the others, and empty where there is none."""
    found = tables.Found([
        record("grpo", 0, accuracy=0.0, confidence_right=0.0, confidence_wrong=0.4),
        record("grpo", 1, accuracy=0.5, confidence_right=0.9, confidence_wrong=0.2),
        record("sft", 0, accuracy=1.0, confidence_right=0.7, confidence_wrong=0.0),
    ])  # fmt: skip
    table = tables.consistency(found)
    assert cells(table, ARMS["grpo"].title)[-2:] == ["0.900", "0.300"]
    assert cells(table, ARMS["sft"].title)[-2:] == ["0.700", ""]


@pytest.mark.parametrize("seeds", [1, 8])
def test_a_drawing_names_every_arm_beside_its_points(
    seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the points lie, neither the names nor another axis' labels are drawn over them."""
    records = [
        record(arm.name, seed, accuracy=i / 8, match=1 - i / 8 + seed / 99)
        | {"curve": {name: [0.1 * i, 0.2] for name, _ in CURVES} if arm.kind == "grpo" else {}}
        for i, arm in enumerate(MAIN)
        for seed in range(seeds)
    ]
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    for name, draw in FIGURES.items():
        draw(tables.Found(records), tmp_path / f"{name}.svg")
        figure = drawn.pop()
        figure.draw_without_rendering()  # boxes at its own resolution, not at the file's
        (legend,) = figure.legends
        wanted = MAIN if len(figure.axes) == 1 else [a for a in MAIN if a.kind == "grpo"]
        assert [text.get_text() for text in legend.get_texts()] == [a.title for a in wanted]
        boxes = [one.get_tightbbox() for one in (legend, *figure.axes)]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_rivals_are_compared_in_pairs() -> None:
    found = tables.Found(
        [record(a, s, match=m + 0.1 * s) for a, m in (("scre", 0.5), ("scre-igsr", 0.6)) for s in (0, 1)]
    )
    table = tables.rivals(found)
    (row,) = [line for line in table.splitlines() if "SCRE only" in line]
    assert row.startswith("| Video-RAISE, IGSR paper − Video-RAISE, SCRE only |")
    assert cells(table, "SCRE only")[3].strip("*").startswith("+0.100")
    assert len(cells(table, "SCRE only")) == 5 and len(table.splitlines()) == 3  # no description was asked


def test_the_readme_has_what_is_recorded() -> None:
    root = Path(__file__).resolve().parents[2]
    found = tables.Found(Results(root / "bench" / "results" / "study").records())
    assert len(found.by) >= 64
    assert tables.short(found) in (root / "README.md").read_text(encoding="utf-8")
