"""How a view of logits is addressed without a copy, and how many of its rows the CPU takes at a time."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

WARPS = 4  # of every program that streams logits
BLOCK = 4 * 151936  # elements in flight on the CPU, unless that is fewer than 4 or more than MOST_ROWS rows
MOST_ROWS = 256


class Layout(NamedTuple):
    """Leading axes of a logits view, folded to at most three."""

    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    rows: int


def fold_leading_axes(logits: Tensor) -> Layout:
    """Address [..., V] without a copy: adjacent leading axes with compatible strides become one."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 3:
        raise ValueError(
            f"logits {tuple(logits.shape)} with strides {logits.stride()} has {len(axes)} leading axes that "
            "do not fold into each other; 3 can be addressed without a copy: pass logits.contiguous()"
        )
    axes = [(1, 0)] * (3 - len(axes)) + axes
    rows = axes[0][0] * axes[1][0] * axes[2][0]
    return Layout((axes[0][0], axes[1][0], axes[2][0]), (axes[0][1], axes[1][1], axes[2][1]), rows)


def alignment(logits: Tensor, layout: Layout) -> int:
    """Elements that the start of every row is a multiple of, as far as 128-bit loads care; 1 when unknown."""
    item = logits.element_size()
    aligned = logits.data_ptr() % 16 == 0 and all(s * item % 16 == 0 for s in layout.strides)
    return 16 // item if aligned else 1


def block_rows(columns: int) -> int:
    """Rows in flight, by the vocabulary alone; docs/kernels.md has the measurement."""
    return min(max(BLOCK // columns, 4), MOST_ROWS)
