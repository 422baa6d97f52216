"""SCRE of each span and its gradient, one program per block of spans, tokens in order.

    w_j = exp(-eta * j)    r = exp(sum_j w_j * logp_j - lam * var(p))
    d r / d logp_j = r * (w_j - lam * 2/n * p_j * (p_j - mean p))

A span is one lane and walks its tokens one after another, so that its bits do not depend on its neighbours.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from raise_kernels import _span_operator
from raise_kernels._backward import SpanEngine
from raise_kernels._checks import SCRE, Scre
from raise_kernels._tiles import add_token, exp, no_tokens, one_minus_exp, scre_of

SPANS = 32  # spans of one program


@triton.jit
def bounds(p_off, o_s, S, T):
    """(first token, tokens, whether the bounds fit) of spans o_s; where they do not, no tokens."""
    m_s = o_s < S
    lo = tl.load(p_off + o_s, mask=m_s, other=0).to(tl.int64)
    hi = tl.load(p_off + o_s + 1, mask=m_s, other=0).to(tl.int64)
    fits = (lo >= 0) & (lo <= hi) & (hi <= T)
    return lo, tl.where(m_s & fits, hi - lo, 0).to(tl.int32), fits


@triton.jit(do_not_specialize=["T", "S", "first"])
def _scre_kernel(
    p_logp,  # [T]
    p_off,  # [S + 1]
    p_out,  # [S]
    T,
    S,
    stride,
    eta,
    lam,
    first,
    NORMALIZE: tl.constexpr,
    SPANS: tl.constexpr,
):
    o_s = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    lo, n, fits = bounds(p_off, o_s, S, T)
    sums = no_tokens(o_s)
    for j in range(0, tl.max(n, 0)):
        live = j < n
        logp = tl.load(p_logp + (lo + j) * stride, mask=live, other=0.0).to(tl.float32)
        sums = add_token(sums, logp, j, live, eta, first, -1.0)
    r, _, _ = scre_of(sums, n.to(tl.float32), lam, NORMALIZE)
    tl.store(p_out + o_s, tl.where(fits, r, float("nan")), mask=o_s < S)


@triton.jit(do_not_specialize=["T", "S", "first"])
def _scre_grad_kernel(
    p_up,  # [S] gradient of the result
    p_r,  # [S] the result
    p_logp,  # [T]
    p_off,  # [S + 1]
    p_grad,  # [T] contiguous, zeros
    T,
    S,
    stride,
    stride_up,
    eta,
    lam,
    first,
    NORMALIZE: tl.constexpr,
    SPANS: tl.constexpr,
):
    o_s = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    lo, n, _ = bounds(p_off, o_s, S, T)
    r = tl.load(p_r + o_s, mask=o_s < S, other=0.0)
    # A span without a reward, NaN or 0, has no gradient: its tokens keep their zeros.
    n = tl.where(r > 0.0, n, 0)
    up = tl.load(p_up + o_s.to(tl.int64) * stride_up, mask=o_s < S, other=0.0).to(tl.float32) * r
    sums = no_tokens(o_s)
    for j in range(0, tl.max(n, 0)):
        live = j < n
        logp = tl.load(p_logp + (lo + j) * stride, mask=live, other=0.0).to(tl.float32)
        sums = add_token(sums, logp, j, live, eta, first, -1.0)
    w, _, _, mean, _ = sums
    total = tl.where(n > 0, w, 1.0) if NORMALIZE else 1.0
    slope = 2.0 * lam / tl.maximum(n.to(tl.float32), 1.0)
    for j in range(0, tl.max(n, 0)):
        live = j < n
        logp = tl.load(p_logp + (lo + j) * stride, mask=live, other=0.0).to(tl.float32)
        # p - mean p, from 1 - p: exact near p = 1
        d = exp(-eta * (j + first)) / total - slope * exp(logp) * (mean - one_minus_exp(logp))
        tl.store(p_grad + lo + j, (up * d).to(p_grad.dtype.element_ty), mask=live)


def launch_forward(kernel: Any, logp: Tensor, offsets: Tensor, *options: Any, normalize: bool) -> Tensor:
    """[S] fp32 by a kernel of one number a span: logp [T] nats, offsets [S+1]."""
    count = len(offsets) - 1
    out = torch.empty(count, dtype=torch.float32, device=logp.device)
    if count:
        kernel[(triton.cdiv(count, SPANS),)](
            logp, offsets.contiguous(), out, len(logp), count, logp.stride(0), *options,
            NORMALIZE=normalize, SPANS=SPANS, num_warps=1,
        )  # fmt: skip
    return out


def launch_backward(
    kernel: Any, grad: Tensor, out: Tensor, logp: Tensor, offsets: Tensor, *options: Any, normalize: bool
) -> Tensor:
    """Gradient of logp [T], in its dtype, from that of the result `out` [S] of `launch_forward`."""
    into = torch.zeros(len(logp), dtype=logp.dtype, device=logp.device)
    if len(out):
        # Two spans that only the device sees to overlap would write to the same tokens.
        clean = torch.where(offsets == offsets.cummax(0).values, offsets, -1)
        kernel[(triton.cdiv(len(out), SPANS),)](
            grad, out, logp, clean, into, len(logp), len(out), logp.stride(0), grad.stride(0), *options,
            NORMALIZE=normalize, SPANS=SPANS, num_warps=1,
        )  # fmt: skip
    return into


def _forward(logp: Tensor, offsets: Tensor, how: Scre) -> Tensor:
    options = how.eta, how.lam, how.start
    return launch_forward(_scre_kernel, logp, offsets, *options, normalize=how.normalize)


def _backward(grad: Tensor, out: Tensor, logp: Tensor, offsets: Tensor, how: Scre) -> Tensor:
    options = how.eta, how.lam, how.start
    return launch_backward(_scre_grad_kernel, grad, out, logp, offsets, *options, normalize=how.normalize)


ENGINE = SpanEngine(_forward, _backward)


def scre(logp: Tensor, offsets: Tensor, how: Scre = SCRE) -> Tensor:
    """As `reference.scre`: logp [T] in nats, offsets [S+1] -> [S] fp32, differentiable once in logp.

    Bounds that only the device knows give NaN where they leave [0, T], and no gradient where they do or fall.
    """
    return _span_operator.run("scre", logp, offsets, how)
