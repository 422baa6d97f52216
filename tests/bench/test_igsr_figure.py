"""docs/igsr.md holds what bench/igsr_figure.py prints, and the figure is drawn the same twice."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench.igsr_figure as subject
from bench.igsr_figure import FIGURE, draw, main, outcomes, threshold

DOC = Path(__file__).resolve().parents[2] / "docs" / "igsr.md"


def test_the_page_holds_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path / "igsr.svg")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 20
    page = DOC.read_text(encoding="utf-8")
    assert [line for line in lines if line not in page] == []
    assert f"figures/{FIGURE.name}" in page
    assert FIGURE.is_file()


def test_the_figure_is_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "GROUPS", 3)
    for name in ("a.svg", "b.svg"):
        draw(tmp_path / name, outcomes())
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert b"singletons" in first


@pytest.mark.parametrize("turn", [0.15, 0.5, 0.95])
@pytest.mark.parametrize("rising", [True, False])
def test_threshold_finds_the_turn(turn: float, rising: bool) -> None:
    found = threshold(lambda x: (x >= turn) == rising, 0.1, 1.0)
    assert round(found, 9) == turn
