"""Margins at step tags and their gradients: one program a tag forward, the order of every sum fixed.

    margin_s = z[good] - z[bad]    z = a * x, or b * tanh(a * x)    x = hidden[rows_s] . weight[v] + bias[v]

Only the two rows of the head are loaded. Tags that name one row add up in their order.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raise_kernels._checks import LogitMap
from raise_kernels._step_operator import StepEngine
from raise_kernels._tiles import tanh

BLOCK = 1024  # hidden columns a program reads at a time
TAGS = 128  # tags of which a program looks for its own row at a time
COLUMNS = 128  # columns of the head whose gradient one program sums


@triton.jit(do_not_specialize=["N", "S"])
def _margin_kernel(
    p_h,  # [N, D]
    p_plus,  # [D] of good
    p_minus,  # [D] of bad
    p_up,  # [1] bias of good
    p_down,  # [1] bias of bad
    p_rows,  # [S]
    p_out,  # [S]
    p_slope,  # [2, S]
    N,
    S,
    D,
    stride_n,
    stride_d,
    stride_w,
    a,
    b,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0)
    n = tl.load(p_rows + s).to(tl.int64)
    known = (n >= 0) & (n < N)
    p_row = p_h + tl.where(known, n, 0) * stride_n
    plus = tl.zeros([BLOCK], tl.float32)
    minus = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        o_d = start + tl.arange(0, BLOCK).to(tl.int64)
        m_d = o_d < D
        x = tl.load(p_row + o_d * stride_d, mask=m_d & known, other=0.0).to(tl.float32)
        w_plus = tl.load(p_plus + o_d * stride_w, mask=m_d, other=0.0).to(tl.float32)
        w_minus = tl.load(p_minus + o_d * stride_w, mask=m_d, other=0.0).to(tl.float32)
        if CAPPED:
            plus += x * w_plus
            minus += x * w_minus
        else:
            plus += x * (w_plus - w_minus)
    x_plus, x_minus = tl.sum(plus, 0), tl.sum(minus, 0)
    if BIASED:
        up, down = tl.load(p_up).to(tl.float32), tl.load(p_down).to(tl.float32)
        x_plus = x_plus + up if CAPPED else x_plus + (up - down)
        x_minus += down
    if CAPPED:
        # tanh makes a number of an infinity, and a NaN would reach the gradient through its slope.
        fine = known & (tl.abs(x_plus) < float("inf")) & (tl.abs(x_minus) < float("inf"))
        t_plus, t_minus = tanh(a * tl.where(fine, x_plus, 0.0)), tanh(a * tl.where(fine, x_minus, 0.0))
        margin = b * (t_plus - t_minus)
        tl.store(p_slope + s, a * b * (1.0 - t_plus * t_plus))
        tl.store(p_slope + S + s, a * b * (1.0 - t_minus * t_minus))
    else:
        margin = a * x_plus
        fine = known & (tl.abs(margin) < float("inf"))
        tl.store(p_slope + s, a)
        tl.store(p_slope + S + s, a)
    tl.store(p_out + s, tl.where(fine, margin, float("nan")))


@triton.jit(do_not_specialize=["N", "S"])
def _hidden_grad_kernel(
    p_on,  # [2, S]
    p_plus,  # [D]
    p_minus,  # [D]
    p_rows,  # [S]
    p_grad,  # [N, D] contiguous, zeros
    N,
    S,
    D,
    stride_w,
    CAPPED: tl.constexpr,
    TAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0)
    n = tl.load(p_rows + s).to(tl.int64)
    plus = tl.zeros([TAGS], tl.float32)
    minus = tl.zeros([TAGS], tl.float32)
    for start in range(0, S, TAGS):
        o_s = start + tl.arange(0, TAGS)
        same = (o_s < S) & (tl.load(p_rows + o_s, mask=o_s < S, other=0).to(tl.int64) == n)
        plus += tl.load(p_on + o_s, mask=same, other=0.0)
        minus += tl.load(p_on + S + o_s, mask=same, other=0.0)
    on_plus, on_minus = tl.sum(plus, 0), tl.sum(minus, 0)
    # Tags of one row write the same bits to it; row numbers outside write nothing.
    if (n >= 0) & (n < N):
        for start in range(0, D, BLOCK):
            o_d = start + tl.arange(0, BLOCK).to(tl.int64)
            m_d = o_d < D
            w_plus = tl.load(p_plus + o_d * stride_w, mask=m_d, other=0.0).to(tl.float32)
            w_minus = tl.load(p_minus + o_d * stride_w, mask=m_d, other=0.0).to(tl.float32)
            grad = on_plus * (w_plus - w_minus)
            if CAPPED:
                grad = on_plus * w_plus + on_minus * w_minus
            tl.store(p_grad + n * D + o_d, grad.to(p_grad.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["N", "S"])
def _pair_grad_kernel(
    p_on,  # [2, S]
    p_h,  # [N, D]
    p_rows,  # [S]
    p_grad,  # [2, D] fp32
    N,
    S,
    D,
    stride_n,
    stride_d,
    COLUMNS: tl.constexpr,
):
    o_d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    m_d = o_d < D
    plus = tl.zeros([COLUMNS], tl.float32)
    minus = tl.zeros([COLUMNS], tl.float32)
    for s in range(0, S):
        n = tl.load(p_rows + s).to(tl.int64)
        on_plus, on_minus = tl.load(p_on + s), tl.load(p_on + S + s)
        live = (n >= 0) & (n < N) & ((on_plus != 0.0) | (on_minus != 0.0))
        at = p_h + tl.where(live, n, 0) * stride_n + o_d * stride_d
        x = tl.load(at, mask=m_d & live, other=0.0).to(tl.float32)
        plus += on_plus * x
        minus += on_minus * x
    tl.store(p_grad + o_d, plus, mask=m_d)
    tl.store(p_grad + D + o_d, minus, mask=m_d)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, good: int, bad: int, how: LogitMap
) -> tuple[Tensor, Tensor]:
    count = len(rows)
    margin = torch.empty(count, dtype=torch.float32, device=hidden.device)
    slopes = torch.empty(2, count, dtype=torch.float32, device=hidden.device)
    a, b = how.factors
    up, down = (weight, weight) if bias is None else (bias[good : good + 1], bias[bad : bad + 1])
    if count:
        _margin_kernel[(count,)](
            hidden, weight[good], weight[bad], up, down, rows, margin, slopes, len(hidden), count,
            hidden.shape[1], *hidden.stride(), weight.stride(1), a, b,
            CAPPED=how.softcap is not None, BIASED=bias is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return margin, slopes


def _backward(
    on: Tensor, capped: bool, hidden: Tensor, weight: Tensor, rows: Tensor, good: int, bad: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    count, (size, width) = len(rows), hidden.shape
    dx = pair = None
    if needs[0]:
        dx = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if count:
            _hidden_grad_kernel[(count,)](
                on, weight[good], weight[bad], rows, dx, size, count, width, weight.stride(1),
                CAPPED=capped, TAGS=TAGS, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    if needs[1]:
        pair = torch.empty(2, width, dtype=torch.float32, device=hidden.device)
        _pair_grad_kernel[(triton.cdiv(width, COLUMNS),)](
            on, hidden, rows, pair, size, count, width, *hidden.stride(), COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return dx, pair


ENGINE = StepEngine(_forward, _backward)
