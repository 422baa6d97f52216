"""Gradient of the statistics with respect to hidden states, weight and bias, some columns at a time.

    dz = (p * (A + B * log p) + C + [v = y] * H) * dz/dx,    log p = z - lse,    A, B, C, H as in `_backward`
    d hidden = dz @ weight,    d weight = dz.T @ hidden,    d bias = sum of dz over the rows

One launch makes the logits of all scored rows and some columns again and writes dz, rounded once to the
dtype of the operands, into a buffer that every such chunk reuses. Chunks run along the vocabulary: a row of
d weight is then one product, and only d hidden adds up over chunks, in fp32.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raise_kernels._backward import Coefficients, LinearGradient, Normaliser
from raise_kernels._checks import LogitMap
from raise_kernels._gemm import matmul_rounded, same_dtype
from raise_kernels._layout import fold_leading_axes
from raise_kernels._tiles import exp, to_z
from raise_kernels.linear_tiles import Tile, is_wide, logits_tile, program_of, stored, tile_for

BLOCK = 256  # columns of hidden of one program of `_collect_kernel`


@triton.jit
def _store_columns(
    x,
    c,
    from_v,
    at,
    tokens,
    p_bias,
    p_dz,
    p_db,
    V,
    width,
    has_bias,
    want_bias,
    a,
    b,
    CAPPED: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Store dz of products x [BT, BV], whose first column is the c-th of the buffer, PIECE columns at a time.

    at [BT]: row of the buffer, -1 for none. Smaller pieces hold fewer masks, of which gfx9 has few registers.
    """
    if BV > PIECE:
        left, right = tl.split(tl.permute(tl.reshape(x, (BT, 2, BV // 2)), (0, 2, 1)))
        _store_columns(
            left, c, from_v, at, tokens, p_bias, p_dz, p_db, V, width, has_bias, want_bias, a, b,
            CAPPED, BT, BV // 2, PIECE,
        )  # fmt: skip
        _store_columns(
            right, c + BV // 2, from_v, at, tokens, p_bias, p_dz, p_db, V, width, has_bias, want_bias, a, b,
            CAPPED, BT, BV // 2, PIECE,
        )  # fmt: skip
    else:
        y, live, top, max_logp, on_p, on_p_logp, everywhere, on_target = tokens
        o_c = c + tl.arange(0, BV)
        o_v = from_v + o_c
        x += tl.load(p_bias + o_v, mask=(o_v < V) & (has_bias != 0), other=0.0)[None, :]
        z = to_z(x, a, b, CAPPED)
        seen = live[:, None] & (o_v < V)[None, :] & (z > -float("inf"))
        # lse in two parts: rounded to one number it would cost p its precision.
        log_p = tl.where(seen, (z - top[:, None]) + max_logp[:, None], 0.0)
        dz = exp(log_p) * (on_p[:, None] + on_p_logp[:, None] * log_p) + everywhere[:, None]
        dz += tl.where(o_v[None, :] == y[:, None], on_target[:, None], 0.0)
        if CAPPED:
            bent = z / b
            dz = dz * (a * b) * (1.0 - bent * bent)
        else:
            dz = dz * a
        dz = tl.where(seen, dz, 0.0)
        inside = o_c < width
        p = p_dz + at.to(tl.int64)[:, None] * width + o_c[None, :]
        tl.store(p, dz.to(p_dz.dtype.element_ty), mask=(at >= 0)[:, None] & inside[None, :])
        if want_bias != 0:
            tl.store(p_db + o_c, tl.sum(dz, 0), mask=inside)


@triton.jit(do_not_specialize=["T", "V", "blocks", "from_v", "want_bias", "has_bias"])
def _dlogits_kernel(
    p_h,  # [T, D] contiguous
    p_w,  # [V, D]
    p_bias,  # [V], or unused
    p_y,  # [T]
    p_top,  # [T] largest z
    p_max_logp,  # [T] p_top - lse
    p_weights,  # [4, T]: A, B, C, H
    p_dz,  # [T, width]
    p_db,  # [blocks of rows, width] sums of dz, or unused
    T,
    V,
    D,
    w_stride_v,
    w_stride_d,
    from_v,  # column of the first dz
    width,
    blocks,  # blocks of columns
    want_bias,
    has_bias,
    a,
    b,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    PIECE: tl.constexpr,
):
    i_b, i_c = program_of(tl.program_id(0), tl.cdiv(T, BT), blocks, GROUP)
    o_t = i_b * BT + tl.arange(0, BT)
    m_t = o_t < T
    plane = tl.zeros([], tl.int64) + T
    on_p = tl.load(p_weights + o_t, mask=m_t, other=0.0)
    on_p_logp = tl.load(p_weights + plane + o_t, mask=m_t, other=0.0)
    everywhere = tl.load(p_weights + 2 * plane + o_t, mask=m_t, other=0.0)
    on_target = tl.load(p_weights + 3 * plane + o_t, mask=m_t, other=0.0)
    # A row without a result has weights 0, and no log-normaliser to compute with.
    live = (on_p != 0.0) | (on_p_logp != 0.0) | (everywhere != 0.0) | (on_target != 0.0)
    x = tl.zeros([BT, BV], tl.float32)
    if tl.max(live.to(tl.int32), 0) > 0:
        p_row = p_h + tl.where(m_t, o_t, 0).to(tl.int64) * D
        o_v = from_v + i_c * BV + tl.arange(0, BV)
        x = logits_tile(p_row, p_w, o_v, V, D, 1, w_stride_v, w_stride_d, UNIT, EVEN, WIDE, BT, BV, BD)
    y = tl.load(p_y + o_t, mask=m_t, other=-1).to(tl.int32)
    top = tl.load(p_top + o_t, mask=live, other=0.0)
    max_logp = tl.load(p_max_logp + o_t, mask=live, other=0.0)
    tokens = (y, live, top, max_logp, on_p, on_p_logp, everywhere, on_target)
    p_db += i_b.to(tl.int64) * width
    _store_columns(
        x, i_c * BV, from_v, tl.where(m_t, o_t, -1), tokens, p_bias, p_dz, p_db, V, width, has_bias,
        want_bias, a, b, CAPPED, BT, BV, PIECE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def _collect_kernel(
    p_in,  # [T, D] fp32
    p_out,  # [N, D] contiguous
    p_order,  # [T] tokens sorted by row
    p_bounds,  # [N + 1] bounds into p_order
    D,
    blocks,
    BLOCK: tl.constexpr,
):
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(p_bounds + i_n).to(tl.int32), tl.load(p_bounds + i_n + 1).to(tl.int32)):
        total += tl.load(p_in + tl.load(p_order + i).to(tl.int64) * D + o_d, mask=o_d < D, other=0.0)
    tl.store(p_out + i_n * D + o_d, total.to(p_out.dtype.element_ty), mask=o_d < D)


def _scored(hidden: Tensor, rows: Tensor, live: Tensor) -> Tensor:
    """The rows [T, D] of hidden that are scored, zeros for the others: their NaN must not reach a product."""
    layout = fold_leading_axes(hidden)
    folded = hidden.as_strided((*layout.sizes, hidden.shape[-1]), (*layout.strides, hidden.stride(-1)))
    n = torch.where(live, rows, 0)
    taken = folded[n // layout.sizes[2] // layout.sizes[1], n // layout.sizes[2] % layout.sizes[1],
                   n % layout.sizes[2]]  # fmt: skip
    return taken.masked_fill_(~live[:, None], 0.0)


def collect(per_token: Tensor, hidden: Tensor, rows: Tensor | None) -> Tensor:
    """Gradient of hidden [..., D], in its dtype, from that of each token [T, D]; see `LinearEngine`."""
    if rows is None:
        return per_token.to(hidden.dtype).view(hidden.shape)
    per_token = per_token.float().contiguous()
    grad = torch.empty(hidden.shape, dtype=stored(hidden.dtype), device=hidden.device)
    depth = hidden.shape[-1]
    count = grad.numel() // depth
    if not count:
        return grad.to(hidden.dtype)
    named, order = torch.sort(rows, stable=True)
    bounds = torch.searchsorted(named, torch.arange(count + 1, device=rows.device))
    blocks = triton.cdiv(depth, BLOCK)
    _collect_kernel[(count * blocks,)](
        per_token, grad, order, bounds, depth, blocks, BLOCK=BLOCK, num_warps=2
    )
    return grad.to(hidden.dtype)


class _Logits(NamedTuple):
    """What makes dz of any columns."""

    hidden: Tensor  # [T, D]
    weight: Tensor
    bias: Tensor | None  # fp32
    y: Tensor
    norm: Normaliser
    weights: Tensor  # [4, T]
    how: LogitMap
    tile: Tile

    def gradient(self, dz: Tensor, start: int, stop: int, bias: Tensor | None) -> None:
        """Fill dz [T, width] with the columns from start to stop, then zeros; bias [stop - start] too."""
        hidden, weight, _, y, norm, _, how, tile = self
        count, depth = hidden.shape
        rows, columns = triton.cdiv(count, tile.rows), triton.cdiv(stop - start, tile.columns)
        if rows * columns >= 2**31:
            raise ValueError(f"{rows} x {columns} blocks exceed 2^31 programs; give a smaller memory")
        sums = self.weights
        if bias is not None:
            sums = torch.empty(rows, dz.shape[1], dtype=torch.float32, device=dz.device)
        _dlogits_kernel[(rows * columns,)](
            hidden,
            weight,
            norm.top if self.bias is None else self.bias,
            y,
            norm.top,
            norm.max_logp,
            self.weights,
            dz,
            sums,
            count,
            stop,
            depth,
            *weight.stride(),
            start,
            dz.shape[1],
            columns,
            int(bias is not None),
            int(self.bias is not None),
            *how.factors,
            CAPPED=how.softcap is not None,
            UNIT=weight.stride(1) == 1,
            WIDE=is_wide(hidden, weight),
            **tile.constants(depth),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if bias is not None:
            bias.copy_(sums[:, : stop - start].sum(0))


def linear_stats_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    rows: Tensor | None,
    norm: Normaliser,
    weights: Coefficients,
    how: LogitMap,
    needs: tuple[bool, bool, bool],
    memory: int,
) -> LinearGradient:
    """Gradients in the dtypes of hidden, weight and bias, contiguous, for the `weights` of `_backward`.

    memory: bytes for dz [T, some columns], at least one tile wide. Beside it and the results there are the
    scored rows [T, D] in the dtype of hidden and, with several chunks or named rows, their gradient in fp32.
    """
    columns, depth, count = how.columns(len(weight)), hidden.shape[-1], len(y)
    grad_w = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    grad_b = torch.zeros_like(bias) if needs[2] and bias is not None else None
    if not count or not hidden.numel():
        return LinearGradient(hidden.new_zeros(hidden.shape) if needs[0] else None, grad_w, grad_b)
    stacked = torch.stack(weights).float()
    live = (stacked != 0.0).any(0)
    taken = _scored(hidden, torch.arange(count, device=y.device) if rows is None else rows, live)
    tile = tile_for(hidden, weight, "gradient", how.softcap is not None)
    call = _Logits(
        taken, weight, None if bias is None else bias.float(), y.contiguous(), norm, stacked, how, tile
    )
    dtype = hidden.dtype if hidden.dtype == weight.dtype else torch.float32
    width = triton.cdiv(min(columns, max(memory // (count * dtype.itemsize), 1)), tile.columns) * tile.columns
    buffer = torch.empty(count, width, dtype=stored(dtype), device=hidden.device)
    once = width >= columns and rows is None
    grad_h = torch.empty(count, depth, dtype=hidden.dtype if once else torch.float32, device=hidden.device)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        call.gradient(buffer, start, stop, None if grad_b is None else grad_b[start:stop])
        dz = buffer[:, : stop - start].to(dtype)
        if needs[0]:
            matmul_rounded(*same_dtype(dz, weight[start:stop]), out=grad_h, accumulate=start > 0)
        if grad_w is not None:
            matmul_rounded(*same_dtype(dz.T, taken), out=grad_w[start:stop])
    if not needs[0]:
        return LinearGradient(None, grad_w, grad_b)
    grad_h.masked_fill_(~live[:, None], 0.0)
    return LinearGradient(collect(grad_h, hidden, rows), grad_w, grad_b)
