"""Drawings of rewards and confidence for names and figures that are not the usual ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raise_trainer.consistency.analysis import confidence_analysis
from raise_trainer.consistency.discrimination import Discrimination, discrimination
from raise_trainer.consistency.figures import draw_confidence, draw_rewards, plt, save


@pytest.fixture(autouse=True)
def _closed() -> Any:
    yield
    plt.close("all")


def found(*support: bool) -> Discrimination:
    """Of two groups of two, all right."""
    return discrimination([1.0, 0.5, 1.0, 0.2], support, [True] * 4, [0, 0, 1, 1], [0, 0, 1, 1], resamples=4)


@pytest.mark.parametrize("support", [(True, False, True, False), (True,) * 4], ids=["mixed", "all supported"])
def test_arms_are_named_as_they_are_and_below_the_dots(support: tuple[bool, ...], tmp_path: Path) -> None:
    """A `$` begins no formula, a `_` hides no name, and there are names where there is no dot."""
    names = [r"a$\foo$", "_run", "base"]
    figure = draw_rewards(
        {name: {"scre": found(*support), "a-long-reward-name": found(*support)} for name in names}
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    figure.draw_without_rendering()
    boxes = [part.get_tightbbox() for part in (legend, *figure.axes)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for axis in figure.axes:
        left, right = (label.get_window_extent() for label in axis.get_xticklabels())
        assert left.x1 < right.x1 and left.y0 > right.y0  # slanting, not over each other
    assert {file.suffix for file in save(figure, tmp_path / "rewards")} == {".svg", ".png"}


def test_shares_begin_at_nothing() -> None:
    """Also where no confidence is known."""
    for p in (np.full(2, np.nan), np.array([0.2, 0.9])):
        figure = draw_confidence(
            confidence_analysis([True, False], [True, False], p, p, p, [0, 1], resamples=2)
        )
        assert all(axis.get_ylim()[0] == 0 for axis in figure.axes)
