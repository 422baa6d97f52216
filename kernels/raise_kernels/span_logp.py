"""Weighted log-probability of each span and its gradient; one program per block of spans, as in `scre`.

sum_j w_j * logp_j,    w_j = exp(-eta * j)    d / d logp_j = w_j
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from raise_kernels import _span_operator
from raise_kernels._backward import SpanEngine
from raise_kernels._checks import Scre
from raise_kernels._tiles import add_token, exp, no_tokens
from raise_kernels.scre import bounds, launch_backward, launch_forward


@triton.jit(do_not_specialize=["T", "S", "first"])
def _span_logp_kernel(
    p_logp,  # [T]
    p_off,  # [S + 1]
    p_out,  # [S]
    T,
    S,
    stride,
    eta,
    first,
    NORMALIZE: tl.constexpr,
    SPANS: tl.constexpr,
):
    o_s = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    lo, n, fits = bounds(p_off, o_s, S, T)
    sums = no_tokens(o_s)
    lost = o_s < 0
    for j in range(0, tl.max(n, 0)):
        live = j < n
        logp = tl.load(p_logp + (lo + j) * stride, mask=live, other=0.0).to(tl.float32)
        sums = add_token(sums, logp, j, live, eta, first, -1.0)
        lost = lost | (live & ((logp < float("inf")) == 0))
    w, wl, _, _, _ = sums
    if NORMALIZE:
        wl = wl / tl.where(n > 0, w, 1.0)
    tl.store(p_out + o_s, tl.where(fits & (lost == 0), wl, float("nan")), mask=o_s < S)


@triton.jit(do_not_specialize=["T", "S", "first"])
def _span_logp_grad_kernel(
    p_up,  # [S] gradient of the result
    p_out,  # [S] the result
    p_logp,  # [T]
    p_off,  # [S + 1]
    p_grad,  # [T] contiguous, zeros
    T,
    S,
    stride,
    stride_up,
    eta,
    first,
    NORMALIZE: tl.constexpr,
    SPANS: tl.constexpr,
):
    o_s = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    lo, n, _ = bounds(p_off, o_s, S, T)
    out = tl.load(p_out + o_s, mask=o_s < S, other=0.0)
    # A NaN span has no gradient: its tokens keep their zeros.
    n = tl.where(out == out, n, 0)
    up = tl.load(p_up + o_s.to(tl.int64) * stride_up, mask=o_s < S, other=0.0).to(tl.float32)
    most = tl.max(n, 0)
    if NORMALIZE:
        total = tl.zeros([SPANS], tl.float32)
        for j in range(0, most):
            total += tl.where(j < n, exp(-eta * (j + first)), 0.0)
        up = up / tl.where(n > 0, total, 1.0)
    for j in range(0, most):
        live = j < n
        logp = tl.load(p_logp + (lo + j) * stride, mask=live, other=0.0).to(tl.float32)
        d = tl.where(logp == -float("inf"), 0.0, up * exp(-eta * (j + first)))
        tl.store(p_grad + lo + j, d.to(p_grad.dtype.element_ty), mask=live)


def _forward(logp: Tensor, offsets: Tensor, how: Scre) -> Tensor:
    return launch_forward(_span_logp_kernel, logp, offsets, how.eta, how.start, normalize=how.normalize)


def _backward(grad: Tensor, out: Tensor, logp: Tensor, offsets: Tensor, how: Scre) -> Tensor:
    options = how.eta, how.start
    return launch_backward(
        _span_logp_grad_kernel, grad, out, logp, offsets, *options, normalize=how.normalize
    )


ENGINE = SpanEngine(_forward, _backward)


def span_logp(logp: Tensor, offsets: Tensor, how: Scre) -> Tensor:
    """As `reference.span_logp`: logp [T] in nats, offsets [S+1] -> [S] fp32, differentiable once in logp.

    Bounds that only the device knows give NaN where they leave [0, T], and no gradient where they do or fall.
    """
    return _span_operator.run("span_logp", logp, offsets, how)
