"""Gradient of token statistics with respect to the logits: one read, one write, nothing else of their size.

    dx = (p * (A + B * log p) + C + [v = y] * H) * dz/dx,    log p = z - lse,    A, B, C, H as in `_backward`

One program per (row of logits, block of columns). It adds up the tokens scored on its row in their order, so
a row that is named twice needs no atomics, and a row that is not named is written as zeros.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raise_kernels._backward import Coefficients, Normaliser
from raise_kernels._checks import LogitMap
from raise_kernels._layout import WARPS, alignment, fold_leading_axes
from raise_kernels._tiles import column, exp, row_start, to_z

BLOCK = 2048  # columns of one program


@triton.jit(do_not_specialize=["T", "size1", "size2", "stride0", "stride1", "stride2", "blocks"])
def _grad_kernel(
    p_x,  # [N, V_all] through the strides of its leading axes
    p_grad,  # [N, V_all] contiguous
    p_y,  # [T]
    p_order,  # [T] tokens sorted by row, or unused
    p_bounds,  # [N + 1] bounds into p_order, or unused
    p_top,  # [T] largest z
    p_max_logp,  # [T] p_top - lse
    p_weights,  # [4, T]: A, B, C, H
    T,
    V,
    V_all,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    stride_v,
    blocks,
    a,
    b,
    HAS_ROWS: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if HAS_ROWS:
        lo = tl.load(p_bounds + i_n).to(tl.int32)
        hi = tl.load(p_bounds + i_n + 1).to(tl.int32)
    else:
        lo = i_n.to(tl.int32)
        hi = lo + 1
    dx = tl.zeros([BLOCK], tl.float32)
    if lo < hi:
        p_row = row_start(p_x, i_n, size1, size2, stride0, stride1, stride2, ALIGN)
        x = tl.load(p_row + column(o_v, stride_v, UNIT), mask=o_v < V, other=-float("inf"))
        z = to_z(x, a, b, CAPPED)
        seen = z > -float("inf")
        for i in range(lo, hi):
            i_t = i
            if HAS_ROWS:
                i_t = tl.load(p_order + i).to(tl.int32)
            y = tl.load(p_y + i_t).to(tl.int64)
            p_w = p_weights + i_t
            plane = tl.zeros([], tl.int64) + T
            on_p = tl.load(p_w)
            on_p_logp = tl.load(p_w + plane)
            everywhere = tl.load(p_w + 2 * plane)
            on_target = tl.load(p_w + 3 * plane)
            # A row without a result has weights 0, and no log-normaliser to compute with.
            if (on_p != 0.0) | (on_p_logp != 0.0) | (everywhere != 0.0) | (on_target != 0.0):
                # lse in two parts: rounded to one number it would cost p its precision.
                log_p = (z - tl.load(p_top + i_t)) + tl.load(p_max_logp + i_t)
                log_p = tl.where(seen, log_p, 0.0)
                one = exp(log_p) * (on_p + on_p_logp * log_p) + everywhere
                dx += tl.where(seen, one + tl.where(o_v == y, on_target, 0.0), 0.0)
        if CAPPED:
            bent = tl.where(seen, z, 0.0) / b
            dx = dx * (a * b) * (1.0 - bent * bent)
        else:
            dx = dx * a
    p_out = p_grad + i_n * V_all + o_v
    tl.store(p_out, dx.to(p_grad.dtype.element_ty), mask=o_v < V_all)


def stats_backward(
    logits: Tensor,
    y: Tensor,
    rows: Tensor | None,
    norm: Normaliser,
    weights: Coefficients,
    how: LogitMap,
    into: Tensor | None = None,
) -> Tensor:
    """Gradient of logits [..., V], contiguous and in their dtype, for the `weights` of `_backward`.

    into: where to write it; contiguous logits themselves will do, a program reads before it writes.
    """
    layout = fold_leading_axes(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if into is None else into
    if not grad.numel() or not len(y):
        return grad.zero_()
    columns = logits.shape[-1]
    blocks = triton.cdiv(columns, BLOCK)
    if layout.rows * blocks >= 2**31:
        raise ValueError(f"{layout.rows} rows x {blocks} column blocks exceed 2^31 programs; use fewer rows")
    order = bounds = y
    if rows is not None:
        named, order = torch.sort(rows, stable=True)
        bounds = torch.searchsorted(named, torch.arange(layout.rows + 1, device=rows.device))
    a, b = how.factors
    _grad_kernel[(layout.rows * blocks,)](
        logits,
        grad,
        y,
        order,
        bounds,
        norm.top,
        norm.max_logp,
        torch.stack(weights).float(),
        len(y),
        how.columns(columns),
        columns,
        *layout.sizes[1:],
        *layout.strides,
        logits.stride(-1),
        blocks,
        a,
        b,
        HAS_ROWS=rows is not None,
        CAPPED=how.softcap is not None,
        UNIT=logits.stride(-1) == 1,
        ALIGN=alignment(logits, layout),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return grad
