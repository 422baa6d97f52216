"""Statistics of softmax(z) from hidden states: the logits of a tile exist in registers and nowhere else.

    z = map(hidden @ weight.T + bias),    map and statistics as in `token_stats`

Two launches: one program per (block of rows, vocabulary split) makes its logits tile by tile on the tensor
cores and reduces each tile at once to the numbers of `_tiles`; `token_stats.merge` joins the splits. Rank
and varentropy have a launch before them, for the logits of the targets. The number of splits depends on the
vocabulary only, and a row is summed alike wherever it stands in a block: it has the same bits alone and in
any batch.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raise_kernels._backward import LinearEngine
from raise_kernels._checks import LogitMap
from raise_kernels._gemm import matmul, same_dtype
from raise_kernels._layout import Layout, alignment, fold_leading_axes
from raise_kernels._tiles import column, row_start, to_z
from raise_kernels.linear_stats_backward import collect, linear_stats_backward
from raise_kernels.linear_tiles import GROUP, Tile, is_wide, logits_tile, program_of, tile_for
from raise_kernels.token_stats import FIELDS, LEVELS, Partials, _reduce_tile, level_of, merge
from raise_kernels.token_topk import topk_logp_mean

SPLITS = 152  # programs that one block of rows is cut into, about; fewer only where the vocabulary is small
MULTIPLE = 256  # columns; of every tile of `linear_tiles`
TARGET_ROWS = 16  # rows of one program of `_target_kernel`
TARGET_COLUMNS = 256


@triton.jit
def scored_rows(p_y, p_rows, o_t, T, N, V, first, has_rows, ignore):
    """(row of hidden, target, whether there is anything to score) of tokens o_t; without rows, from first."""
    m_t = o_t < T
    y = tl.load(p_y + o_t, mask=m_t, other=-1).to(tl.int64)
    i_n = tl.load(p_rows + o_t, mask=m_t & (has_rows != 0), other=0).to(tl.int64)
    i_n = tl.where(has_rows != 0, i_n, o_t + first)
    known = m_t & (y != ignore) & (y >= 0) & (y < V) & (i_n >= 0) & (i_n < N)
    # Rows without a result read row 0, whose numbers they do not store.
    return tl.where(known, i_n, 0), tl.where(known, y, -1).to(tl.int32), known


@triton.jit(
    do_not_specialize=[
        "T", "N", "size1", "size2", "stride0", "stride1", "stride2",
        "first", "has_rows", "has_bias", "ignore",
    ]
)  # fmt: skip
def _target_kernel(
    p_h,  # [N, D] through the strides of its leading axes
    p_w,  # [V, D]
    p_bias,  # [V], or unused
    p_y,  # [T]
    p_rows,  # [T], or unused
    p_x,  # [T]
    T,
    N,
    V,
    D,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    h_stride_d,
    w_stride_v,
    w_stride_d,
    first,
    has_rows,
    has_bias,
    ignore,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_n, y, known = scored_rows(p_y, p_rows, o_t, T, N, V, first, has_rows, ignore)
    p_row = row_start(p_h, i_n, size1, size2, stride0, stride1, stride2, ALIGN)
    p_v = p_w + y.to(tl.int64) * w_stride_v
    x = tl.load(p_bias + y, mask=known & (has_bias != 0), other=0.0)
    for d in range(0, D, COLUMNS):
        o_d = d + tl.arange(0, COLUMNS)
        m = known[:, None] & (o_d < D)[None, :]
        h = tl.load(p_row[:, None] + column(o_d, h_stride_d, UNIT)[None, :], mask=m, other=0.0)
        w = tl.load(p_v[:, None] + column(o_d, w_stride_d, UNIT)[None, :], mask=m, other=0.0)
        x += tl.sum(h.to(tl.float32) * w.to(tl.float32), 1)
    tl.store(p_x + o_t, x, mask=known)


@triton.jit
def _reduce_columns(
    x,
    v,
    p_bias,
    y,
    guess,
    sums,
    z_y,
    V,
    has_bias,
    a,
    b,
    CAPPED: tl.constexpr,
    LEVEL: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Add products x [BT, BV] of the columns from v on to the running numbers, PIECE columns at a time.

    Smaller pieces keep fewer exponentials in registers beside x.
    """
    if BV > PIECE:
        left, right = tl.split(tl.permute(tl.reshape(x, (BT, 2, BV // 2)), (0, 2, 1)))
        sums, z_y = _reduce_columns(
            left, v, p_bias, y, guess, sums, z_y, V, has_bias, a, b, CAPPED, LEVEL, BT, BV // 2, PIECE
        )
        return _reduce_columns(
            right,
            v + BV // 2,
            p_bias,
            y,
            guess,
            sums,
            z_y,
            V,
            has_bias,
            a,
            b,
            CAPPED,
            LEVEL,
            BT,
            BV // 2,
            PIECE,
        )
    else:
        o_v = v + tl.arange(0, BV)
        x += tl.load(p_bias + o_v, mask=(o_v < V) & (has_bias != 0), other=0.0)[None, :]
        z = tl.where((o_v < V)[None, :], to_z(x, a, b, CAPPED), -float("inf"))
        z_y += tl.sum(tl.where(o_v[None, :] == y[:, None], z, 0.0), 1)
        m, s0, s1, sd, n, m2, rank = sums
        return _reduce_tile(z, guess[:, None], m, s0, s1, sd, n, m2, rank, LEVEL, 1), z_y


@triton.jit(
    do_not_specialize=[
        "T", "N", "size1", "size2", "stride0", "stride1", "stride2",
        "first", "width", "splits", "has_rows", "has_bias", "ignore",
    ]
)  # fmt: skip
def _linear_kernel(
    p_h,  # [N, D] through the strides of its leading axes
    p_w,  # [V, D]
    p_bias,  # [V], or unused
    p_y,  # [T]
    p_rows,  # [T], or unused
    p_guess,  # [T] logit of the target, at level 2
    p_part,  # [fields, splits, T]
    p_zy,  # [T]
    T,
    N,
    V,
    D,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    h_stride_d,
    w_stride_v,
    w_stride_d,
    first,
    width,  # columns of a split
    splits,
    has_rows,
    has_bias,
    ignore,
    a,
    b,
    CAPPED: tl.constexpr,
    LEVEL: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    PIECE: tl.constexpr,
):
    i_b, i_s = program_of(tl.program_id(0), tl.cdiv(T, BT), splits, GROUP)
    o_t = i_b * BT + tl.arange(0, BT)
    i_n, y, known = scored_rows(p_y, p_rows, o_t, T, N, V, first, has_rows, ignore)
    if tl.max(known.to(tl.int32), 0) > 0:
        p_row = row_start(p_h, i_n, size1, size2, stride0, stride1, stride2, ALIGN)
        guess = tl.zeros([BT], tl.float32)
        if LEVEL >= 2:
            guess = to_z(tl.load(p_guess + o_t, mask=known, other=0.0), a, b, CAPPED)
        m = tl.full([BT], -float("inf"), tl.float32)
        z_y = tl.zeros([BT], tl.float32)
        sums = (m, z_y, z_y, z_y, z_y, z_y, z_y)
        lo = i_s * width
        hi = tl.minimum(lo + width, V)
        for v in range(lo, hi, BV):
            o_v = v + tl.arange(0, BV)
            x = logits_tile(
                p_row, p_w, o_v, V, D, h_stride_d, w_stride_v, w_stride_d, UNIT, EVEN, WIDE, BT, BV, BD
            )
            sums, z_y = _reduce_columns(
                x, v, p_bias, y, guess, sums, z_y, V, has_bias, a, b, CAPPED, LEVEL, BT, BV, PIECE
            )
        m, s0, s1, sd, n, m2, rank = sums
        plane = splits.to(tl.int64) * T
        p = p_part + i_s.to(tl.int64) * T + o_t
        tl.store(p, m, mask=known)
        tl.store(p + plane, s0, mask=known)
        if LEVEL >= 1:
            tl.store(p + 2 * plane, s1, mask=known)
            tl.store(p + 3 * plane, sd, mask=known)
            tl.store(p + 4 * plane, n, mask=known)
        here = known & (y >= lo) & (y < hi)
        if LEVEL >= 2:
            tl.store(p + 5 * plane, m2, mask=known)
            # The target's own column may round to more here than in `guess`; it never outranks itself.
            tl.store(p + 6 * plane, rank - tl.where(here & (z_y > guess), 1.0, 0.0), mask=known)
        tl.store(p_zy + o_t, z_y, mask=here)


def split_width(vocab: int) -> int:
    """Columns of one split: from the vocabulary alone, so that no batch changes the bits of a row."""
    return -(-vocab // (SPLITS * MULTIPLE)) * MULTIPLE


def partial_bytes(tokens: int, vocab: int, level: int) -> int:
    """Bytes that the vocabulary splits of this many tokens leave between two launches."""
    return 4 * FIELDS[level] * -(-vocab // split_width(vocab)) * tokens


class _Launch(NamedTuple):
    """What every launch of one call has in common."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    how: LogitMap
    layout: Layout
    columns: int
    level: int
    tile: Tile


def _prepare(hidden: Tensor, weight: Tensor, bias: Tensor | None, how: LogitMap, level: int) -> _Launch:
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f'{name} is {x.dtype}; give fp32, bf16 or fp16, or use impl="native" or "reference"'
            )
    columns = how.columns(len(weight))
    tile = tile_for(hidden, weight, f"level {level}", how.softcap is not None)
    layout = fold_leading_axes(hidden)
    return _Launch(hidden, weight, None if bias is None else bias.float(), how, layout, columns, level, tile)


def _reduce(call: _Launch, y: Tensor, rows: Tensor | None, first: int) -> Partials:
    """First launch for targets y [T], T at least 1, of `rows` or of the rows from `first` on."""
    hidden, weight, bias, how, layout, columns, level, tile = call
    width = split_width(columns)
    splits = triton.cdiv(columns, width)
    count = len(y)
    if splits * triton.cdiv(count, tile.rows) >= 2**31:
        raise ValueError(f"{count} rows x {splits} vocabulary splits exceed 2^31 programs; score fewer rows")
    device = hidden.device
    part = torch.empty(FIELDS[level], splits, count, dtype=torch.float32, device=device)
    z_y = torch.empty(count, dtype=torch.float32, device=device)
    depth = hidden.shape[-1]
    sizes = (
        count, layout.rows, columns, depth, *layout.sizes[1:], *layout.strides,
        hidden.stride(-1), weight.stride(0), weight.stride(1), first,
    )  # fmt: skip
    flags = {
        "ALIGN": alignment(hidden, layout),
        "UNIT": hidden.stride(-1) == 1 and weight.stride(1) == 1,
    }
    # Where something is absent any pointer does: its loads are masked.
    tensors = (hidden, weight, z_y if bias is None else bias, y, y if rows is None else rows)
    absent = (int(rows is not None), int(bias is not None), how.ignore_index)
    guess = z_y
    if level >= 2:
        guess = torch.empty_like(z_y)
        _target_kernel[(triton.cdiv(count, TARGET_ROWS),)](
            *tensors, guess, *sizes, *absent, **flags, ROWS=TARGET_ROWS, COLUMNS=TARGET_COLUMNS, num_warps=4
        )
    _linear_kernel[(triton.cdiv(count, tile.rows) * splits,)](
        *tensors, guess, part, z_y, *sizes, width, splits, *absent, *how.factors, **flags,
        CAPPED=how.softcap is not None,
        LEVEL=level,
        WIDE=is_wide(hidden, weight),
        **tile.constants(depth),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return Partials(part, z_y, y, rows, layout.rows, columns, how.ignore_index, level)


def partial_linear_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    rows: Tensor | None,
    how: LogitMap,
    level: int,
) -> Partials:
    """First launch for all T rows at once: what `token_stats.merge` and the span rewards join in the second.

    hidden [..., D] and weight [V, D] fp32, bf16 or fp16 with any strides, never copied; bias [V] of any float
    dtype; y, rows [T] int64, T at least 1. Makes fields x splits x T fp32 numbers, at most 152 splits.
    """
    call = _prepare(hidden, weight, bias, how, level)
    return _reduce(call, y.contiguous(), None if rows is None else rows.contiguous(), 0)


def _row_chunks(count: int, rows: int) -> Iterator[slice]:
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def linear_stats_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    rows: Tensor | None,
    how: LogitMap,
    names: tuple[str, ...],
    topk: int,
    memory: int,
) -> dict[str, Tensor]:
    """Every name of the level that `names` needs, [T] fp32 each. y, rows [T] int64.

    memory: bytes for what the splits of a block of rows leave; at least one block is taken at a time.
    """
    level = level_of(names)
    made = [name for level_names in LEVELS[: level + 1] for name in level_names]
    call = _prepare(hidden, weight, bias, how, level)
    # Whole groups of blocks, so that a chunk ends where the reuse of the weight ends anyway.
    step = GROUP * call.tile.rows
    size = max(memory // partial_bytes(1, call.columns, level) // step * step, step)
    y = y.contiguous()
    rows = None if rows is None else rows.contiguous()
    parts = [
        merge(_reduce(call, y[chunk], None if rows is None else rows[chunk], chunk.start))
        for chunk in _row_chunks(len(y), size)
    ]
    empty = torch.empty(0, device=hidden.device)
    alone = len(parts) == 1
    out = parts[0] if alone else {name: torch.cat([p[name] for p in parts] or [empty]) for name in made}
    if "topk_logp_mean" in names:
        out["topk_logp_mean"] = _topk_mean(call, y, rows, topk, out["top"], out["max_logp"], memory)
    return out


def _topk_mean(
    call: _Launch, y: Tensor, rows: Tensor | None, topk: int, top: Tensor, max_logp: Tensor, memory: int
) -> Tensor:
    """`token_topk.topk_logp_mean` of tiles of rows whose fp32 logits fit `memory`: two launches a tile."""
    flat, weight = call.hidden.reshape(-1, call.hidden.shape[-1]), call.weight[: call.columns]
    n = torch.arange(len(y), device=y.device) if rows is None else rows
    # A row number outside hidden has no max_logp; what is read in its place must exist all the same.
    n = n.clamp(0, max(len(flat) - 1, 0))
    how = replace(call.how, valid_vocab=None)
    size = max(1, memory // (4 * call.columns))
    out = torch.empty(len(y), dtype=torch.float32, device=y.device)
    buffer = torch.empty(min(size, len(y)), call.columns, dtype=torch.float32, device=y.device)
    for chunk in _row_chunks(len(y), size):
        h = flat[n[chunk]] if len(flat) else flat.new_zeros(len(n[chunk]), flat.shape[1])
        logits = matmul(*same_dtype(h, weight.T), out=buffer[: len(h)])
        if call.bias is not None:
            logits += call.bias[: call.columns]
        out[chunk] = topk_logp_mean(logits, y[chunk], None, how, topk, top[chunk], max_logp[chunk])
    return out


ENGINE = LinearEngine(linear_stats_forward, linear_stats_backward, collect)
