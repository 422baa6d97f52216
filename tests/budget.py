"""How wrong a result may be. The only file of the tests that holds a tolerance.

A fast implementation is judged by what plain PyTorch loses on the same inputs in the same precision:

    |actual - oracle|  <=  2 * max |peer - oracle|  +  one rounding of the output dtype

`oracle` is the fp64 value. Where determinism is promised the comparison is bitwise: `assert_exact`.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

PEER_FACTOR = 2.0
ULPS = 2.0
FAST_EXP_ULPS = 20  # of the vectorised exponential in PyTorch's attention for the CPU
ROUNDINGS = 64  # of fp64, in sums of some dozens of terms
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_within_error_budget(
    actual: Tensor, oracle_fp64: Tensor, peer_same_precision: Tensor, *, name: str
) -> None:
    """Fail when `actual` is further from the fp64 oracle than twice its peer, plus one rounding band.

    All three have one shape. NaN must meet NaN and an infinity the same infinity. The band is
    `eps * |oracle|` of `actual`'s dtype, at least `eps` times the smallest normal number.
    """
    assert oracle_fp64.dtype == torch.float64, f"{name}: the oracle is {oracle_fp64.dtype}, not float64"
    assert peer_same_precision.dtype == actual.dtype, (
        f"{name}: peer {peer_same_precision.dtype}, actual {actual.dtype}"
    )
    shapes = [tuple(t.shape) for t in (actual, oracle_fp64, peer_same_precision)]
    assert len(set(shapes)) == 1, f"{name}: shapes {shapes}"
    got, want, peer = (t.detach().cpu().double() for t in (actual, oracle_fp64, peer_same_precision))
    finite = want.isfinite()
    same_kind = torch.where(finite, got.isfinite(), (got == want) | (got.isnan() & want.isnan()))
    if not same_kind.all():
        raise AssertionError(_report(name, "not the same NaN or infinity", ~same_kind, got, want, peer))
    if not finite.any():
        return
    info = torch.finfo(actual.dtype)
    error = torch.where(finite, (got - want).abs(), 0.0)
    peer_error = torch.where(finite & peer.isfinite(), (peer - want).abs(), 0.0).max()
    band = info.eps * torch.where(finite, want.abs(), 0.0).clamp(min=info.tiny)
    over = error > PEER_FACTOR * peer_error + band
    if over.any():
        raise AssertionError(
            _report(name, f"error above 2 x {peer_error:.3e} + rounding", over, got, want, peer)
        )


def assert_within_bound(actual: Tensor, oracle_fp64: Tensor, bound: Tensor, *, name: str) -> None:
    """Fail where `actual` is further from the oracle than `bound` [its shape], plus one rounding of itself.

    The bound is derived, in fp64 as the oracle, and finite wherever that is. NaN must meet NaN and an
    infinity the same infinity. What fp32 holds as a subnormal number only may be flushed to 0.
    """
    assert oracle_fp64.dtype == bound.dtype == torch.float64, f"{name}: {oracle_fp64.dtype}, {bound.dtype}"
    assert actual.shape == oracle_fp64.shape == bound.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(oracle_fp64.shape)}, {tuple(bound.shape)}"
    )
    got, want = actual.detach().cpu().double(), oracle_fp64.detach()
    finite = want.isfinite()
    assert bool(bound[finite].isfinite().all()), f"{name}: the bound is {bound[finite]}"
    same_kind = torch.where(finite, got.isfinite(), (got == want) | (got.isnan() & want.isnan()))
    if not same_kind.all():
        raise AssertionError(_report(name, "not the same NaN or infinity", ~same_kind, got, want, bound))
    info = torch.finfo(actual.dtype)
    slack = bound + info.eps * want.abs().clamp(min=info.tiny) + torch.finfo(torch.float32).tiny
    over = finite & ((got - want).abs() > slack)
    if over.any():
        raise AssertionError(_report(name, "further off than its bound", over, got, want, slack))


def assert_exact(actual: Tensor, expected: Tensor, *, name: str) -> None:
    """Fail unless both tensors have the same dtype, shape and bits (any NaN equals any NaN)."""
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    got, want = (t.detach().cpu().contiguous() for t in (actual, expected))
    if got.dtype.is_floating_point:
        bits = _BITS[got.element_size()]
        differs = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
    else:
        differs = got != want
    if differs.any():
        raise AssertionError(
            _report(name, "not bitwise equal", differs, got.double(), want.double(), want.double())
        )


def assert_as_exact_as_a_double(actual: float, want: float, *, name: str) -> None:
    """Fail when a Python float is further from `want` than a handful of roundings."""
    assert_at_most(
        torch.tensor(abs(actual - want), dtype=torch.float64),
        8 * sys.float_info.epsilon * abs(want),
        name=name,
    )


def assert_as_exact_as_fp32(actual: float, want: float, *, name: str) -> None:
    """Fail when a figure that went through fp32 is further from `want` than some roundings of it."""
    allowed = ROUNDINGS * torch.finfo(torch.float32).eps * max(abs(want), 1.0)
    assert_at_most(torch.tensor(abs(actual - want), dtype=torch.float64), allowed, name=name)


def assert_at_most(actual: Tensor, bound: Tensor | float, *, name: str) -> None:
    """Fail when `actual` exceeds `bound` by more than two units in the last place of `actual`'s dtype."""
    limit = torch.as_tensor(bound, dtype=torch.float64).cpu().expand_as(actual)
    got = actual.detach().cpu().double()
    slack = ULPS * torch.finfo(actual.dtype).eps * limit.abs()
    over = ~(got <= limit + slack)
    if over.any():
        raise AssertionError(_report(name, "above its bound", over, got, limit, limit))


def assert_equal_but_for_roundings(actual: Tensor, want: Tensor, *, name: str) -> None:
    """Fail where two fp64 results of sums in another order differ by more than their roundings."""
    assert actual.dtype == want.dtype == torch.float64, f"{name}: {actual.dtype}, {want.dtype}, not float64"
    size = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
    assert_at_most((actual - want).abs(), ROUNDINGS * sys.float_info.epsilon * size, name=name)


def attention_bounds(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far attention [.., L, E] and its three gradients may be off: first-order, in fp64.

    A probability exp(s - l) is off by the roundings of s and l, and by those of the CPU's fast exponential;
    16-bit kernels also round it, and the gradient of the scores, before they multiply.
    """
    s = q @ k.transpose(-1, -2) * scale
    lse = (s + mask).logsumexp(-1, keepdim=True)
    p = (s + mask - lse).exp()
    terms = (q.abs() @ k.abs().transpose(-1, -2)) * scale
    eps = torch.finfo(torch.float32).eps
    off = 2 * torch.finfo(dtype).eps + eps * (FAST_EXP_ULPS + q.shape[-1] * terms + 4 * (s.abs() + lse.abs()))
    wrong = 2 * p * off  # of each probability, and as much again from the sum they are divided by
    reach = grad.abs() @ v.abs().transpose(-1, -2)
    reach = reach + (p * reach).sum(-1, keepdim=True)  # of dP - sum(p * dP)
    slope = wrong * reach + p * (wrong * reach).sum(-1, keepdim=True)
    out = wrong @ v.abs()
    return (
        out,
        scale * slope @ k.abs(),
        scale * slope.transpose(-1, -2) @ q.abs(),
        wrong.transpose(-1, -2) @ grad.abs(),
    )


def half_ulp(dtype: torch.dtype) -> float:
    """What one rounding costs a result of size 1: no peer that rounds is expected to be better for sure."""
    return torch.finfo(dtype).eps / 2


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding x to `dtype` can cost, element by element: half an ulp, subnormal or not."""
    info = torch.finfo(dtype)
    return x.abs().clamp(min=info.tiny) * half_ulp(dtype)


def less_exact(one: Tensor, other: Tensor, oracle: Tensor) -> Tensor:
    """Of each element whichever of two results is further from the oracle: one peer can have luck."""
    further = (other.double() - oracle).abs() > (one.double() - oracle).abs()
    return torch.where(further, other, one)


def no_better_than(peer: Tensor, oracle: Tensor, floor: Tensor | float) -> Tensor:
    """A peer's result, and `floor` beside the oracle wherever the peer came closer than that by luck."""
    return less_exact((oracle + floor).to(peer.dtype), peer, oracle)


# Of one fp32 rounding of 1: what a result near 1 owes, and many a peer's fair share.
HALF_ULP = half_ulp(torch.float32)


def close_to(want: Tensor, roundings: int = 1) -> Tensor:
    """fp32 peer of a result known by hand or in fp64: off by that many roundings, at its size or at 1."""
    return (want + roundings * HALF_ULP * want.abs().clamp(min=1.0)).float()


def floor_of(name: str, value: Tensor, size: float, vocab: int) -> Tensor:
    """What rounding may cost a statistic of this value, and no peer is expected to undercut but by luck.

    It is made from a z of at most `size`, from a sum of about 1 and from numbers of its own size, each
    rounded once. p = exp(log p) inherits what log p lost at its own size, about log V where p is spread out:
    of what is summed with weights p, that is a share.
    """
    spread = math.log(vocab)
    own = value.abs() * (1 + spread * (name in ("entropy", "varentropy")))
    # A KL from uniform near 0 is a difference of numbers of size log V.
    return half_ulp(torch.float32) * (1 + size + own + spread * (name == "self_certainty"))


# A peer's t = tanh x is off by one rounding, t^2 by twice that and its own, 1 - t^2 by another. A kernel that
# takes t from z / b, with z = b * t, is off by 2 * 4 + 2: within PEER_FACTOR of 1 + 4, with what p owes.
SLOPE_ROUNDINGS = 2 * 1 + 2


def slope_roundings(softcap: float | None) -> int:
    """Roundings of 1 that a peer's slope 1 - t^2 of a softcap owes; 0 without one.

    Where the softcap saturates the slope itself is near 0, and what cancels there is not of its size.
    """
    return 0 if softcap is None else SLOPE_ROUNDINGS


def sum_slack(terms: int) -> float:
    """The most that fp32 can lose in a sum of so many numbers that add up to about 1, in any order."""
    return terms * half_ulp(torch.float32)


def undecided(value: Tensor, threshold: Tensor | float, roundings: int = 8) -> Tensor:
    """Where fp32 arithmetic on numbers of size 1 may land on either side of a threshold.

    A handful of operations, each rounded once, lie between inputs and value; 8 unless stated.
    """
    return (value - threshold).abs() < roundings * half_ulp(torch.float32)


def rank_slack(z: Tensor, y: Tensor, size: float, terms: int) -> Tensor:
    """Columns [T] that rounding may put on either side of the target's in a rank. z [T, V] in fp64.

    A sum of `terms` products, whose magnitudes add up to at most `size`, is off by at most terms * half an
    ulp of that, in any order (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); the map to z
    adds a few roundings of z.
    """
    known = (y >= 0) & (y < z.shape[1])
    z_y = z.gather(1, torch.where(known, y, 0)[:, None])
    largest = z.abs().masked_fill(~z.isfinite(), 0.0).amax(1, keepdim=True)
    reach = 2 * half_ulp(torch.float32) * ((terms + 1) * size + 8 * largest)
    near = ((z - z_y).abs() <= reach).sum(1) - 1
    return torch.where(known, near.clamp(min=0), 0)


def assert_rank(actual: Tensor, oracle: Tensor, slack: Tensor, *, name: str) -> None:
    """Fail when a rank differs from the oracle's by more than the columns that rounding may move."""
    off = ~((actual - oracle).abs() <= slack) & ~(actual.isnan() & oracle.isnan())
    if off.any():
        raise AssertionError(
            _report(name, "rank beyond its ties", off, actual.double(), oracle, slack.double())
        )


def _report(name: str, what: str, where: Tensor, got: Tensor, want: Tensor, peer: Tensor) -> str:
    gap = torch.where(where, (got - want).abs().nan_to_num(torch.inf), -1.0)
    i = int(gap.argmax())
    at = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), got.shape)) if got.dim() else ()
    g, w, p = (t.reshape(-1)[i].item() for t in (got, want, peer))
    count = f"{int(where.sum())} of {where.numel()}"
    return f"{name}: {what} in {count}; worst at {at}: got {g!r}, expected {w!r}, peer {p!r}"
