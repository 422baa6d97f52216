"""Statistics of softmax(hidden @ weight.T + bias) without the [T, V] logits: a few rows at a time.

Only the scored rows are multiplied. The product of a block of rows is kept in one fp32 buffer that is reused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raise_kernels._checks import PLAIN, LogitMap, check_index, check_want
from raise_kernels._layout import block_rows

ROWS = 32  # rows whose logits exist at one time, or more of a small vocabulary
COLUMNS = 8192  # vocabulary rows that are widened to fp32 at one time


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None
) -> None:
    """Refuse shapes, dtypes and devices that `linear_token_stats` cannot mean anything by."""
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}; give [..., D] and [V, D]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, weight {tuple(weight.shape)}; give [V]")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name} is on {other.device}, hidden on {hidden.device}; move one of them")
    check_index("targets", targets, hidden.device)
    if rows is None and targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, hidden {tuple(hidden.shape)}; "
            "give one target for each row, or name the scored rows with rows="
        )
    if rows is not None and (rows.dim() != 1 or rows.shape != targets.shape):
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}, targets {tuple(targets.shape)}; give both as [T]"
        )


def linear_token_stats(
    stats: Callable[..., dict[str, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
    want: Sequence[str] = ("logp",),
) -> dict[str, Tensor]:
    """As `reference.linear_token_stats`, with `stats` on each block of logits and without a gradient.

    hidden [..., D], weight [V, D], targets [...] or, with rows [T], [T]; products accumulate in fp32.
    """
    names = check_want(want)
    check_linear(hidden, weight, bias, targets, rows)
    flat = hidden.reshape(-1, hidden.shape[-1])
    y = targets.reshape(-1).long()
    n = torch.arange(len(flat), device=flat.device) if rows is None else rows.long()
    inside = (n >= 0) & (n < len(flat))
    vocab = how.columns(len(weight))
    # A row number outside hidden becomes a target outside the vocabulary, which has the same result.
    y = torch.where(inside | (y == how.ignore_index), y, vocab if vocab != how.ignore_index else -1)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = {name: torch.empty(len(y), dtype=wide, device=y.device) for name in names}
    size = max(ROWS, block_rows(vocab))
    buffer = torch.empty(min(size, len(y)), vocab, dtype=wide, device=y.device)
    cut = LogitMap(
        temperature=how.temperature,
        logit_scale=how.logit_scale,
        softcap=how.softcap,
        ignore_index=how.ignore_index,
    )
    for start in range(0, len(y), size):
        chunk = slice(start, start + size)
        h = flat[torch.where(inside, n, 0)[chunk]].to(wide)
        logits = buffer[: len(h)]
        for column in range(0, vocab, COLUMNS):
            w = weight[column : min(column + COLUMNS, vocab)]
            torch.matmul(h, w.to(wide).T, out=logits[:, column : column + len(w)])
        if bias is not None:
            logits += bias[:vocab]
        for name, value in stats(logits, y[chunk], how=cut, want=names).items():
            out[name][chunk] = value
    return {name: value.view(targets.shape) for name, value in out.items()}
