"""Device functions that kernels share, and how a launch is cut into tiles.

One row of z is described by six numbers that merge exactly, whatever the order of the pieces:

    m = max z   s0 = sum e   s1 = sum e*d   m2 = sum e*(d - s1/s0)^2   sd = sum d   n = columns with z > -inf

with d = z - m and e = exp(d). Sums over d run over the n unmasked columns.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1]: 2 atanh(t), t = x / (2 + x) <= 1/3; the series is cut below 1e-9."""
    t = x / (2.0 + x)
    w = t * t
    p = 2.0 / 13.0 + w * (2.0 / 15.0)
    p = 2.0 / 9.0 + w * (2.0 / 11.0 + w * p)
    p = 2.0 / 5.0 + w * (2.0 / 7.0 + w * p)
    return t * (2.0 + w * (2.0 / 3.0 + w * p))


@triton.jit
def log_from_one(x):
    """log x for x >= 1, with full relative precision near 1."""
    return tl.where(x < 2.0, log1p_unit(tl.minimum(x - 1.0, 1.0)), tl.log(x))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, with full relative precision near 0."""
    p = 1.0 / 720.0 + x * (1.0 / 5040.0 + x * (1.0 / 40320.0))
    p = 1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * p))
    series = -x * (1.0 + x * (0.5 + x * p))
    return tl.where(x > -0.4, series, 1.0 - exp(x))


@triton.jit
def tanh(x):
    """tanh x; near 0, where the quotient would cancel, a Chebyshev fit of (tanh x / x - 1) / x^2."""
    w = x * x
    p = 0.021769950166344643 + w * (-0.008346950635313988 + w * 0.0022958137560635805)
    p = -0.3333333432674408 + w * (0.13333304226398468 + w * (-0.053959403187036514 + w * p))
    t = exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(w < 0.390625, x + x * w * p, tl.where(x < 0, -far, far))


@triton.jit
def to_z(x, a, b, CAPPED: tl.constexpr):
    """A raw logit to z: a * x, or b * tanh(a * x) with -inf kept -inf (the mask comes after the softcap)."""
    x = x.to(tl.float32)
    if CAPPED:
        return tl.where(x == -float("inf"), x, b * tanh(a * x))
    else:
        return a * x


@triton.jit
def row_start(p_x, n, size1, size2, stride0, stride1, stride2, ALIGN: tl.constexpr):
    """Address of row n (int64) of logits with leading axes [size0, size1, size2]; a multiple of ALIGN."""
    i2 = n % size2
    i1 = (n // size2) % size1
    i0 = n // size2 // size1
    offset = i0 * stride0 + i1 * stride1 + i2 * stride2
    return p_x + tl.multiple_of(offset, ALIGN)


@triton.jit
def shift_to(m_from, m_to):
    """m_from - m_to, and 0 where nothing was seen yet: its sums are 0, and inf - inf is not a number."""
    return tl.where(m_from == -float("inf"), 0.0, m_from - m_to)


@triton.jit
def mean_of(total, count):
    """total / count, 0 where count is 0."""
    return total / tl.where(count == 0.0, 1.0, count)


@triton.jit
def join_m2(a_s0, a_s1, a_m2, b_s0, b_s1, b_m2):
    """Weighted squared deviations of two pieces that refer to one maximum (Chan, Golub, LeVeque)."""
    gap = mean_of(a_s1, a_s0) - mean_of(b_s1, b_s0)
    pooled = a_s0 * mean_of(b_s0, a_s0 + b_s0)
    # An empty piece may have a mean too large to square.
    return a_m2 + b_m2 + tl.where(pooled == 0.0, 0.0, gap * gap * pooled)


@triton.jit
def rebase(s0, s1, shift):
    """s0 and s1 of a piece, taken relative to a maximum that is higher by -shift."""
    w = exp(shift)
    # (w * shift) first: shift * s0 may overflow where w is 0.
    return w * s0, w * s1 + (w * shift) * s0


@triton.jit
def merge_partials(p_part, o_t, m_t, T, splits, LEVEL: tl.constexpr):
    """Join the vocabulary splits of rows o_t, one after another, so that the order never depends on a layout.

    p_part: [fields, splits, T]. Returns (m, s0, s1, sd, n, m2, rank), each shaped like o_t.
    """
    plane = splits.to(tl.int64) * T
    m = tl.full(o_t.shape, -float("inf"), tl.float32)
    s0 = tl.zeros(o_t.shape, tl.float32)
    s1, sd, n, m2, rank = s0, s0, s0, s0, s0
    p = p_part + o_t
    for _ in range(splits):
        b_m = tl.load(p, mask=m_t, other=-float("inf"))
        b_s0 = tl.load(p + plane, mask=m_t, other=0.0)
        m_new = tl.maximum(m, b_m)
        d_a, d_b = shift_to(m, m_new), shift_to(b_m, m_new)
        if LEVEL >= 1:
            b_s1 = tl.load(p + 2 * plane, mask=m_t, other=0.0)
            b_sd = tl.load(p + 3 * plane, mask=m_t, other=0.0)
            b_n = tl.load(p + 4 * plane, mask=m_t, other=0.0)
            sd = (sd + n * d_a) + (b_sd + b_n * d_b)
            n += b_n
        else:
            b_s1 = b_s0
        a_s0, a_s1 = rebase(s0, s1, d_a)
        b_s0, b_s1 = rebase(b_s0, b_s1, d_b)
        if LEVEL >= 2:
            b_m2 = exp(d_b) * tl.load(p + 5 * plane, mask=m_t, other=0.0)
            m2 = join_m2(a_s0, a_s1, exp(d_a) * m2, b_s0, b_s1, b_m2)
            rank += tl.load(p + 6 * plane, mask=m_t, other=0.0)
        s0 = a_s0 + b_s0
        s1 = a_s1 + b_s1
        m = m_new
        p += T
    return m, s0, s1, sd, n, m2, rank


@triton.jit
def settle(value, good, scored):
    """The documented result of rows without one: 0 where unscored, NaN where there is nothing to score."""
    return tl.where(scored, tl.where(good, value, float("nan")), 0.0)


@triton.jit
def finish(m, s0, z_y):
    """(logp, log s0) of merged rows; logp never exceeds 0."""
    log_s = log_from_one(s0)
    return tl.minimum(z_y - m, 0.0) - log_s, log_s


@triton.jit
def add_token(sums, logp, j, live, eta, first, log_delta):
    """Add each span's j-th token to (sum w, sum w*logp, sum -log(p + delta), mean q, m2 of q), q = 1 - p.

    Spans without a j-th token (not live) are left as they are.
    """
    w, wl, nll, mean, m2 = sums
    weight = exp(-eta * (j + first))
    # A weight that underflows to 0 must not turn log 0 into NaN.
    term = tl.where(logp == -float("inf"), logp, weight * logp)
    high = tl.maximum(logp, log_delta)
    low = tl.minimum(logp, log_delta)
    surprise = tl.where(logp == logp, -(high + log1p_unit(exp(low - high))), logp)  # max drops a NaN
    q = one_minus_exp(logp)
    gap = q - mean
    mean_new = mean + gap / (j + 1.0)
    return (
        tl.where(live, w + weight, w),
        tl.where(live, wl + term, wl),
        tl.where(live, nll + surprise, nll),
        tl.where(live, mean_new, mean),
        tl.where(live, m2 + gap * (q - mean_new), m2),
    )


@triton.jit
def no_tokens(o_s):
    """The sums of empty spans."""
    zero = tl.zeros(o_s.shape, tl.float32)
    return (zero, zero, zero, zero, zero)


@triton.jit
def scre_of(sums, n, lam, NORMALIZE: tl.constexpr):
    """(SCRE, mean -log(p + delta), variance of p) of spans of n tokens (fp32); 0 for empty ones."""
    w, wl, nll, _, m2 = sums
    count = tl.maximum(n, 1.0)
    if NORMALIZE:
        wl = wl / tl.where(n > 0.0, w, 1.0)
    var = m2 / count
    return tl.where(n > 0.0, exp(wl - lam * var), 0.0), nll / count, var


@triton.jit
def column(o_v, stride_v, UNIT: tl.constexpr):
    """Offset of columns o_v: 32 bits suffice when columns are adjacent."""
    if UNIT:
        return o_v
    else:
        return o_v.to(tl.int64) * stride_v
