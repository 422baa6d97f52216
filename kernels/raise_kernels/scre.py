"""SCRE of each span, one program per block of spans, tokens in order.

    w_j = exp(-eta * j)    r = exp(sum_j w_j * logp_j - lam * var(p))

A span is one lane and walks its tokens one after another, so that its bits do not depend on its neighbours.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raise_kernels._checks import SCRE, Scre, check_spans
from raise_kernels._tiles import add_token, no_tokens, scre_of

SPANS = 32  # spans of one program


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
    m_s = o_s < S
    lo = tl.load(p_off + o_s, mask=m_s, other=0).to(tl.int64)
    hi = tl.load(p_off + o_s + 1, mask=m_s, other=0).to(tl.int64)
    fits = (lo >= 0) & (lo <= hi) & (hi <= T)
    n = tl.where(m_s & fits, hi - lo, 0).to(tl.int32)
    sums = no_tokens(o_s)
    for j in range(0, tl.max(n, 0)):
        live = j < n
        logp = tl.load(p_logp + (lo + j) * stride, mask=live, other=0.0).to(tl.float32)
        sums = add_token(sums, logp, j, live, eta, first, -1.0)
    r, _, _ = scre_of(sums, n.to(tl.float32), lam, NORMALIZE)
    tl.store(p_out + o_s, tl.where(fits, r, float("nan")), mask=m_s)


def scre(logp: Tensor, offsets: Tensor, how: Scre = SCRE) -> Tensor:
    """As `reference.scre`: logp [T] in nats, offsets [S+1] -> [S] fp32; bounds outside [0, T] give NaN."""
    check_spans(logp, offsets)
    count = len(offsets) - 1
    out = torch.empty(count, dtype=torch.float32, device=logp.device)
    if count:
        _scre_kernel[(triton.cdiv(count, SPANS),)](
            logp,
            offsets.contiguous(),
            out,
            len(logp),
            count,
            logp.stride(0),
            how.eta,
            how.lam,
            how.first_index,
            NORMALIZE=how.normalize,
            SPANS=SPANS,
            num_warps=1,
        )
    return out
