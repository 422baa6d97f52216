"""Mean of the k largest log-probabilities of each scored row: DeepConf's confidence (arXiv 2508.15260).

Two launches beside those of `token_stats`. One program per (row, block of columns) holds its logits as
integers that are ordered like them, finds the k-th largest bit by bit, and keeps what is not below it. One
program per row does the same with what the blocks kept. z rises with the logit, so logits are compared.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raise_kernels._checks import LogitMap
from raise_kernels._layout import alignment, fold_leading_axes
from raise_kernels._tiles import column, mean_of, row_start, to_z

BLOCK = 4096  # columns of one program of the first launch
KEPT = 8192  # logits of a row that the second launch can take
WARPS = 8
# Leading bits of a logit, widened to fp32, that can differ between two logits of a dtype.
BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 19}


@triton.jit
def _ordered(x, BITS: tl.constexpr):
    """Unsigned integers that are ordered like the fp32 numbers x, whose last 32 - BITS bits are 0."""
    bits = x.to(tl.uint32, bitcast=True)
    flip = tl.where((bits >> 31) == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return (bits ^ flip) >> (32 - BITS)


@triton.jit
def _kth(key, k, BITS: tl.constexpr):
    """The k-th largest of the integers `key`, of which there are at least k."""
    t = tl.zeros([], tl.uint32)
    bit = tl.full([], 1, tl.uint32) << (BITS - 1)
    for _ in range(0, BITS):
        higher = t | bit
        t = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= k, higher, t)
        bit = bit >> 1
    return t


@triton.jit(
    do_not_specialize=["N", "size1", "size2", "stride0", "stride1", "stride2", "blocks", "ignore", "k"]
)
def _select_kernel(
    p_x,  # [N, V] through the strides of its leading axes
    p_y,  # [T]
    p_rows,  # [T]
    p_kept,  # [T, blocks, k]
    N,
    V,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    stride_v,
    blocks,
    ignore,
    k,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_t = tl.program_id(0) // blocks
    y = tl.load(p_y + i_t).to(tl.int64)
    i_n = tl.load(p_rows + i_t).to(tl.int64)
    if (y != ignore) & (y >= 0) & (y < V) & (i_n >= 0) & (i_n < N):
        p_row = row_start(p_x, i_n, size1, size2, stride0, stride1, stride2, ALIGN)
        o_v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(p_row + column(o_v, stride_v, UNIT), mask=o_v < V, other=-float("inf")).to(tl.float32)
        key = _ordered(x, BITS)
        t = _kth(key, k, BITS)
        above = key > t
        place = tl.cumsum(above.to(tl.int32), 0)
        p_out = p_kept + tl.program_id(0).to(tl.int64) * k
        tl.store(p_out + place - 1, x, mask=above)
        # The others are all equal.
        count = tl.sum(above.to(tl.int32), 0)
        least = tl.max(tl.where(key == t, x, -float("inf")), 0)
        for i in range(count, k):
            tl.store(p_out + i, least)


@triton.jit(do_not_specialize=["count", "ignore", "k"])
def _finish_kernel(
    p_kept,  # [T, count]
    p_y,  # [T]
    p_top,  # [T] largest z
    p_max_logp,  # [T] p_top - lse
    p_out,  # [T]
    count,
    ignore,
    k,
    a,
    b,
    CAPPED: tl.constexpr,
    KEPT: tl.constexpr,
):
    i_t = tl.program_id(0)
    top = tl.load(p_top + i_t)
    max_logp = tl.load(p_max_logp + i_t)
    mean = max_logp
    # A row without a result is NaN there, and one that is not scored 0; neither has kept logits.
    if (tl.load(p_y + i_t) != ignore) & (max_logp == max_logp):
        o_c = tl.arange(0, KEPT)
        x = tl.load(p_kept + i_t.to(tl.int64) * count + o_c, mask=o_c < count, other=-float("inf"))
        key = _ordered(x, 32)
        t = _kth(key, k, 32)
        log_p = tl.minimum(to_z(x, a, b, CAPPED) - top, 0.0) + max_logp
        above = key > t
        n = tl.sum(above.to(tl.float32), 0)
        total = tl.sum(tl.where(above, log_p, 0.0), 0)
        # The rest of the k are equal; masked columns do not count.
        least = tl.max(tl.where(key == t, log_p, -float("inf")), 0)
        rest = tl.where(least == -float("inf"), 0.0, k - n)
        mean = mean_of(total + rest * tl.where(rest == 0.0, 0.0, least), n + rest)
    tl.store(p_out + i_t, mean)


def topk_logp_mean(
    logits: Tensor,
    y: Tensor,
    rows: Tensor | None,
    how: LogitMap,
    topk: int,
    top: Tensor,
    max_logp: Tensor,
) -> Tensor:
    """Mean of the `topk` largest log p of each row, [T] fp32 nats. y, rows, top (largest z), max_logp: [T].

    Fewer unmasked columns than that: the mean over them.
    """
    layout = fold_leading_axes(logits)
    columns = how.columns(logits.shape[-1])
    k, blocks, count = min(topk, columns), triton.cdiv(columns, BLOCK), len(y)
    if k * blocks > KEPT:
        raise ValueError(
            f"topk is {topk}; with {columns} columns Triton takes at most {KEPT // blocks}: give less, or "
            'use impl="reference"'
        )
    if blocks * count >= 2**31:
        raise ValueError(f"{count} rows x {blocks} column blocks exceed 2^31 programs; score fewer rows")
    if rows is None:
        rows = torch.arange(count, device=logits.device)
    kept = torch.empty(count, blocks, k, dtype=torch.float32, device=logits.device)
    out = torch.empty(count, dtype=torch.float32, device=logits.device)
    _select_kernel[(blocks * count,)](
        logits,
        y,
        rows,
        kept,
        layout.rows,
        columns,
        *layout.sizes[1:],
        *layout.strides,
        logits.stride(-1),
        blocks,
        how.ignore_index,
        k,
        UNIT=logits.stride(-1) == 1,
        ALIGN=alignment(logits, layout),
        BITS=BITS[logits.dtype],
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    a, b = how.factors
    _finish_kernel[(count,)](
        kept,
        y,
        top,
        max_logp,
        out,
        blocks * k,
        how.ignore_index,
        k,
        a,
        b,
        CAPPED=how.softcap is not None,
        KEPT=KEPT,
        num_warps=WARPS,
    )
    return out
