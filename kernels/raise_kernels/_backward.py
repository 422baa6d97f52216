"""The gradient of every differentiable statistic is one expression in p = softmax(z) with four numbers a row.

d logp / dz_i           = [i = y] - p_i
d lse / dz_i            = p_i
d entropy / dz_i        = -p_i * (z_i - lse + entropy)
d self_certainty / dz_i = p_i - 1 / V'                       (over the V' unmasked columns; 0 elsewhere)

dz_i = p_i * (A + B * (z_i - lse)) + C + [i = y] * H,    then dx_i = dz_i * dz/dx
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from raise_kernels._checks import DIFFERENTIABLE, LogitMap, Scre


class Coefficients(NamedTuple):
    """A, B, C, H of each scored row, [T] each; all 0 where the row has no result or is not scored."""

    on_p: Tensor
    on_p_logp: Tensor
    everywhere: Tensor
    on_target: Tensor


class Normaliser(NamedTuple):
    """The log-normaliser of each scored row in two parts, lse = top - max_logp, [T] each.

    Rounded to one number it would cost p = exp(z - lse) its precision wherever |lse| is large.
    """

    top: Tensor  # largest z
    max_logp: Tensor


def coefficients(
    grads: Mapping[str, Tensor | None],
    norm: Normaliser,
    entropy: Tensor | None,
    count: Tensor | None,
    scored: Tensor,
) -> Coefficients:
    """Fold the upstream gradients [T] of any of logp, lse, entropy, self_certainty into A, B, C, H.

    entropy and count (V') [T] may be None where no gradient arrives through entropy and self_certainty.
    """
    live = scored & norm.max_logp.isfinite()
    zero = torch.zeros_like(norm.top)
    given = {name: grads.get(name) for name in DIFFERENTIABLE}
    g = {name: zero if v is None else torch.where(live, v.to(zero.dtype), 0.0) for name, v in given.items()}
    on_p = g["lse"] - g["logp"] + g["self_certainty"]
    on_p_logp = everywhere = zero
    if given["entropy"] is not None and entropy is not None:
        on_p = on_p - g["entropy"] * torch.where(live, entropy, 0.0)
        on_p_logp = -g["entropy"]
    if given["self_certainty"] is not None and count is not None:
        everywhere = torch.where(live, -g["self_certainty"] / count, 0.0)
    return Coefficients(on_p, on_p_logp, everywhere, g["logp"])


class Engine(NamedTuple):
    """One implementation of token statistics over flat targets y [T] and rows [T].

    forward(logits, y, rows, how, names, topk) -> {name: [T]}; knows "top" (largest z) and "count" (V') too.
    backward(logits, y, rows, normaliser, weights, how, into=None) -> gradient of logits; into: where to write
    it, contiguous and of any float dtype; contiguous logits themselves will do.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None, LogitMap, tuple[str, ...], int], dict[str, Tensor]]
    backward: Callable[..., Tensor]


class SpanEngine(NamedTuple):
    """One implementation of a number for each span of logp [T], with bounds offsets [S+1].

    forward(logp, offsets, how) -> [S]. backward(grad, out, logp, offsets, how) -> gradient of logp in its
    dtype; out: what forward gave.
    """

    forward: Callable[[Tensor, Tensor, Scre], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Scre], Tensor]


class LinearGradient(NamedTuple):
    """Gradients of hidden [..., D], weight [V, D] and bias [V] in their dtypes; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class LinearEngine(NamedTuple):
    """One implementation of the statistics of hidden @ weight.T + bias over flat y [T] and rows [T].

    forward(hidden, weight, bias, y, rows, how, names, topk, memory) -> {name: [T]}, the names of `Engine`.
    backward(hidden, weight, bias, y, rows, normaliser, weights, how, needs, memory) -> gradients; needs: one
    bool each for hidden, weight and bias. memory: bytes that may be allocated beside inputs and results.
    collect(per_token, hidden, rows) -> gradient of hidden from that of each token [T, D]: tokens of one row
    add up in their order, those whose row number is outside hidden count for nothing.
    """

    forward: Callable[..., dict[str, Tensor]]
    backward: Callable[..., LinearGradient]
    collect: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def collect(per_token: Tensor, hidden: Tensor, rows: Tensor | None) -> Tensor:
    """Gradient of hidden [..., D], in its dtype, from that of each token; see `LinearEngine`."""
    if rows is None:
        return per_token.to(hidden.dtype).view(hidden.shape)
    out = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    flat = out.view(-1, hidden.shape[-1])
    inside = (rows >= 0) & (rows < len(flat))
    named, place = torch.unique(rows[inside], return_inverse=True)
    total = per_token.new_zeros(len(named), flat.shape[1])
    flat[named] = total.index_add_(0, place, per_token[inside]).to(out.dtype)
    return out
