"""Statistics of softmax(z) for each scored row, from one read of the logits.

    z = b * tanh(a * x), or a * x;    logp = z[y] - lse, entropy, ... as defined in `reference.token_stats`

Two launches: one program per (row, vocabulary split) reduces its columns to the numbers of `_tiles`; one
program per block of rows joins the splits in a fixed order. The number of splits depends on the vocabulary
only, so a row gives the same bits alone and in any batch.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raise_kernels import _operator
from raise_kernels._backward import Engine
from raise_kernels._checks import PLAIN, LogitMap
from raise_kernels._layout import WARPS, alignment, fold_leading_axes
from raise_kernels._tiles import (
    column,
    exp,
    finish,
    join_m2,
    log_from_one,
    mean_of,
    merge_partials,
    rebase,
    row_start,
    settle,
    shift_to,
    to_z,
)
from raise_kernels.token_stats_backward import stats_backward
from raise_kernels.token_topk import topk_logp_mean

SPLIT = 16384  # columns of one program; a power of two and a multiple of every tile
ROWS = 64  # rows that one merging program joins
# Columns of a lane in one tile, by threads of a warp, softcap and level: more share the exponential of one
# rescaling and need more registers, of gfx9's scalar ones two for each column that is tested for a mask.
COLUMNS = {
    (32, False): (8, 8, 4),
    (32, True): (8, 8, 2),
    (64, False): (8, 2, 2),
    (64, True): (4, 2, 2),
}

# What each level computes; a level includes those below it.
LEVELS = (("logp", "lse", "max_logp", "top"), ("entropy", "self_certainty", "count"), ("varentropy", "rank"))
FIELDS = (2, 5, 7)


@triton.jit
def _reduce_tile(z, z_y, m, s0, s1, sd, n, m2, rank, LEVEL: tl.constexpr, AXIS: tl.constexpr = 0):
    """Add a tile z to running numbers over its AXIS: of z [U, W], to those of W lanes.

    Lanes run along W and each thread owns whole lanes, so the loop exchanges nothing between threads and
    rescales once per U columns.
    """
    m_new = tl.maximum(m, tl.max(z, AXIS))
    base = tl.where(m_new == -float("inf"), 0.0, m_new)  # a lane of masked columns must not make inf - inf
    d = z - tl.expand_dims(base, AXIS)
    e = exp(d)  # [U, W]
    shift = shift_to(m, m_new)
    t0 = tl.sum(e, AXIS)
    if LEVEL >= 1:
        seen = z > -float("inf")
        d = tl.where(seen, d, 0.0)
        sd = sd + n * shift + tl.sum(d, AXIS)
        n += tl.sum(seen.to(tl.float32), AXIS)
        t1 = tl.sum(e * d, AXIS)
    else:
        t1 = t0
    s0, s1 = rebase(s0, s1, shift)
    if LEVEL >= 2:
        off = d - tl.expand_dims(mean_of(t1, t0), AXIS)
        m2 = join_m2(s0, s1, exp(shift) * m2, t0, t1, tl.sum(e * off * off, AXIS))
        rank += tl.sum((z > z_y).to(tl.float32), AXIS)
    return m_new, s0 + t0, s1 + t1, sd, n, m2, rank


@triton.jit(
    do_not_specialize=["T", "N", "size1", "size2", "stride0", "stride1", "stride2", "splits", "ignore"]
)
def _stats_kernel(
    p_x,  # [N, V] through the strides of its leading axes
    p_y,  # [T]
    p_rows,  # [T], or unused
    p_part,  # [fields, splits, T]
    p_zy,  # [T]
    T,
    N,
    V,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    stride_v,
    splits,
    ignore,
    a,
    b,
    HAS_ROWS: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    LEVEL: tl.constexpr,
    SPLIT: tl.constexpr,
    U: tl.constexpr,
    W: tl.constexpr,
):
    i_t = tl.program_id(0) // splits
    i_s = tl.program_id(0) % splits
    y = tl.load(p_y + i_t).to(tl.int64)
    i_n = i_t.to(tl.int64)
    if HAS_ROWS:
        i_n = tl.load(p_rows + i_t).to(tl.int64)
    if (y != ignore) & (y >= 0) & (y < V) & (i_n >= 0) & (i_n < N):
        p_row = row_start(p_x, i_n, size1, size2, stride0, stride1, stride2, ALIGN)
        z_y = to_z(tl.load(p_row + y * stride_v), a, b, CAPPED)
        lo = i_s * SPLIT
        hi = tl.minimum(lo + SPLIT, V)
        o_v = tl.arange(0, U)[:, None] * W + tl.arange(0, W)[None, :]  # [U, W]
        m = tl.full([W], -float("inf"), tl.float32)
        s0 = tl.zeros([W], tl.float32)
        s1, sd, n, m2, rank = s0, s0, s0, s0, s0
        # Only the last tile needs a mask, which would cost the others their wide loads when V is odd.
        full = lo + (hi - lo) // (U * W) * (U * W)
        for v in range(lo, full, U * W):
            x = tl.load(p_row + column(v + o_v, stride_v, UNIT))
            z = to_z(x, a, b, CAPPED)
            m, s0, s1, sd, n, m2, rank = _reduce_tile(z, z_y, m, s0, s1, sd, n, m2, rank, LEVEL)
        if full < hi:
            x = tl.load(p_row + column(full + o_v, stride_v, UNIT), mask=full + o_v < hi, other=-float("inf"))
            z = to_z(x, a, b, CAPPED)
            m, s0, s1, sd, n, m2, rank = _reduce_tile(z, z_y, m, s0, s1, sd, n, m2, rank, LEVEL)

        top = tl.max(m, 0)
        shift = shift_to(m, top)
        s0, s1 = rebase(s0, s1, shift)
        all0 = tl.sum(s0, 0)
        plane = splits.to(tl.int64) * T
        p = p_part + i_s.to(tl.int64) * T + i_t
        tl.store(p, top)
        tl.store(p + plane, all0)
        if LEVEL >= 1:
            all1 = tl.sum(s1, 0)
            tl.store(p + 2 * plane, all1)
            tl.store(p + 3 * plane, tl.sum(sd + n * shift, 0))
            tl.store(p + 4 * plane, tl.sum(n, 0))
            if LEVEL >= 2:
                gap = mean_of(s1, s0) - mean_of(all1, all0)
                within = exp(shift) * m2 + tl.where(s0 == 0.0, 0.0, gap * gap * s0)
                tl.store(p + 5 * plane, tl.sum(within, 0))
                tl.store(p + 6 * plane, tl.sum(rank, 0))
        if i_s == 0:
            tl.store(p_zy + i_t, z_y)


@triton.jit(do_not_specialize=["T", "N", "splits", "ignore"])
def _merge_kernel(
    p_y,  # [T]
    p_rows,  # [T], or unused
    p_part,  # [fields, splits, T]
    p_zy,  # [T]
    p_out,  # [outputs of the level, T]
    T,
    N,
    V,
    splits,
    ignore,
    HAS_ROWS: tl.constexpr,
    LEVEL: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_t = o_t < T
    y = tl.load(p_y + o_t, mask=m_t, other=0).to(tl.int64)
    scored = y != ignore
    known = m_t & scored & (y >= 0) & (y < V)
    if HAS_ROWS:
        i_n = tl.load(p_rows + o_t, mask=m_t, other=0).to(tl.int64)
        known = known & (i_n >= 0) & (i_n < N)
    m, s0, s1, sd, n, m2, rank = merge_partials(p_part, o_t, known, T, splits, LEVEL)
    logp, log_s = finish(m, s0, tl.load(p_zy + o_t, mask=known, other=0.0))
    # A row of masked columns has s0 = 0; NaN and +inf logits make s0 NaN.
    good = known & (s0 > 0.0)
    p = p_out + o_t
    plane = tl.zeros([ROWS], tl.int64) + T
    tl.store(p, settle(logp, good, scored), mask=m_t)
    tl.store(p + plane, settle(m + log_s, good, scored), mask=m_t)
    tl.store(p + 2 * plane, settle(-log_s, good, scored), mask=m_t)
    # A row without an unmasked column has no statistics, but as a part of a longer row it has a top.
    tl.store(p + 3 * plane, settle(m, good | (known & (s0 == 0.0)), scored), mask=m_t)
    if LEVEL >= 1:
        tl.store(p + 4 * plane, settle(log_s - mean_of(s1, s0), good, scored), mask=m_t)
        certainty = log_s - mean_of(sd, n) - log_from_one(n)
        tl.store(p + 5 * plane, settle(certainty, good, scored), mask=m_t)
        tl.store(p + 6 * plane, settle(n, good, scored), mask=m_t)
    if LEVEL >= 2:
        tl.store(p + 7 * plane, settle(mean_of(m2, s0), good, scored), mask=m_t)
        tl.store(p + 8 * plane, settle(rank, good, scored), mask=m_t)


class Partials(NamedTuple):
    """Per-split numbers of T scored rows, before they are joined."""

    values: Tensor  # [fields, splits, T]
    z_y: Tensor  # [T]
    targets: Tensor  # [T]
    rows: Tensor | None  # [T]
    row_count: int
    columns: int
    ignore_index: int
    level: int


def level_of(want: Sequence[str]) -> int:
    """The cheapest level that gives every name in `want`; topk_logp_mean needs what the lowest gives."""
    return max((k for k, names in enumerate(LEVELS) if set(names) & set(want)), default=0)


def tile(warp_size: int, capped: bool, level: int, item: int) -> tuple[int, int]:
    """(U, W) of a tile of logits of `item` bytes, such that each thread makes 128-bit loads."""
    return COLUMNS[warp_size, capped][level], WARPS * warp_size * (16 // item)


def partial_stats(
    logits: Tensor, targets: Tensor, rows: Tensor | None, how: LogitMap, level: int
) -> Partials:
    """First launch: reduce each (row, vocabulary split). targets [T] flat, T at least 1."""
    layout = fold_leading_axes(logits)
    columns = how.columns(logits.shape[-1])
    splits = triton.cdiv(columns, SPLIT)
    count = len(targets)
    if splits * count >= 2**31:
        raise ValueError(f"{count} rows x {splits} vocabulary splits exceed 2^31 programs; score fewer rows")
    part = torch.empty(FIELDS[level], splits, count, dtype=torch.float32, device=logits.device)
    z_y = torch.empty(count, dtype=torch.float32, device=logits.device)
    a, b = how.factors
    capped = how.softcap is not None
    u, w = tile(64 if torch.version.hip else 32, capped, level, logits.element_size())
    _stats_kernel[(splits * count,)](
        logits,
        targets,
        targets if rows is None else rows,
        part,
        z_y,
        count,
        layout.rows,
        columns,
        *layout.sizes[1:],
        *layout.strides,
        logits.stride(-1),
        splits,
        how.ignore_index,
        a,
        b,
        HAS_ROWS=rows is not None,
        CAPPED=capped,
        UNIT=logits.stride(-1) == 1,
        ALIGN=alignment(logits, layout),
        LEVEL=level,
        SPLIT=SPLIT,
        U=u,
        W=w,
        num_warps=WARPS,
    )
    return Partials(part, z_y, targets, rows, layout.rows, columns, how.ignore_index, level)


def merge(partials: Partials) -> dict[str, Tensor]:
    """Second launch: join the splits. One [T] fp32 tensor for each output of the level."""
    names = [name for names in LEVELS[: partials.level + 1] for name in names]
    count = len(partials.targets)
    out = torch.empty(len(names), count, dtype=torch.float32, device=partials.values.device)
    _merge_kernel[(triton.cdiv(count, ROWS),)](
        partials.targets,
        partials.targets if partials.rows is None else partials.rows,
        partials.values,
        partials.z_y,
        out,
        count,
        partials.row_count,
        partials.columns,
        partials.values.shape[1],
        partials.ignore_index,
        HAS_ROWS=partials.rows is not None,
        LEVEL=partials.level,
        ROWS=ROWS,
        num_warps=2,
    )
    return dict(zip(names, out, strict=True))


def stats_forward(
    logits: Tensor, y: Tensor, rows: Tensor | None, how: LogitMap, names: tuple[str, ...], topk: int
) -> dict[str, Tensor]:
    """Two launches, and two more for topk_logp_mean. y, rows [T] int64 -> at least `names`, [T] each."""
    if not len(y):
        return {name: torch.empty(0, device=logits.device) for name in names}
    rows = None if rows is None else rows.contiguous()
    out = merge(partial_stats(logits, y, rows, how, level_of(names)))
    if "topk_logp_mean" in names:
        best = topk_logp_mean(logits, y, rows, how, topk, out["top"], out["max_logp"])
        out["topk_logp_mean"] = best
    return out


ENGINE = Engine(stats_forward, stats_backward)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
    inplace_gradient: bool = False,
) -> dict[str, Tensor]:
    """As `reference.token_stats`; outputs fp32 with the shape of targets, differentiable once in logits.

    logits [..., V] fp32, bf16 or fp16 with any strides, never copied; targets and rows int64 or int32. The
    gradient has the dtype of logits. topk is at most 215 at 151936 columns (`token_topk`).
    """
    return _operator.token_stats(
        "triton", logits, targets, rows=rows, how=how, want=want, topk=topk, inplace_gradient=inplace_gradient
    )
