"""The definition in the form of an engine: for devices that have no other, and for tests.

Beside what `reference` computes, an engine knows the parts of the log-normaliser and takes them from its
caller for the gradient, which need not be those of its own columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raise_kernels._backward import Coefficients, Engine, LinearEngine, LinearGradient, Normaliser, collect
from raise_kernels._checks import STATS, LogitMap
from raise_kernels.reference import token_stats, transform
from raise_kernels.reference_product import linear_logits


def _taken(x: Tensor, rows: Tensor | None, live: Tensor) -> Tensor:
    """Rows [T, K] of the flattened x [..., K]; 0 for tokens that are not live, so that no NaN meets a 0."""
    flat = x.reshape(-1, x.shape[-1])
    n = torch.arange(len(flat), device=x.device) if rows is None else rows
    live = live & (n >= 0) & (n < len(flat))
    return torch.cat([flat, flat.new_zeros(1, flat.shape[1])])[torch.where(live, n, len(flat))]


@torch.no_grad()
def _forward(
    logits: Tensor, y: Tensor, rows: Tensor | None, how: LogitMap, names: tuple[str, ...], topk: int
) -> dict[str, Tensor]:
    own = tuple(name for name in names if name in STATS)
    flat = logits.reshape(-1, logits.shape[-1])
    out = token_stats(flat, y, rows=rows, how=how, want=(*own, "logp"), topk=topk)
    z = transform(_taken(logits, rows, y != how.ignore_index), how)
    top = z.amax(-1)
    # logp is NaN where a row has no result; one of masked columns has a top as a part of a longer row.
    nothing = out["logp"].isnan()
    more = {"top": top.masked_fill(nothing & (top != -math.inf), math.nan)}
    more["count"] = z.isfinite().sum(-1).to(z.dtype).masked_fill(nothing, math.nan)
    return {n: out[n] if n in out else torch.where(y == how.ignore_index, 0.0, more[n]) for n in names}


@torch.no_grad()
def _backward(
    logits: Tensor, y: Tensor, rows: Tensor | None, norm: Normaliser, weights: Coefficients, how: LogitMap
) -> Tensor:
    live = torch.stack(weights).ne(0).any(0)
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        z = transform(_taken(leaf, rows, live), how)
    seen = live[:, None] & z.isfinite()
    log_p = torch.where(seen, z - norm.top[:, None] + norm.max_logp[:, None], 0.0)
    dz = log_p.exp() * (weights.on_p[:, None] + weights.on_p_logp[:, None] * log_p)
    dz += weights.everywhere[:, None]
    target = torch.where(live, y, 0)[:, None]
    dz = torch.where(seen, dz.scatter_add(1, target, weights.on_target[:, None]), 0.0)
    return torch.autograd.grad(z, leaf, dz)[0]


@torch.no_grad()
def _linear_forward(
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
    return _forward(linear_logits(hidden, weight, bias), y, rows, how, names, topk)


@torch.no_grad()
def _linear_backward(
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
    leaves = [None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    h, w, b = leaves
    assert h is not None and w is not None
    live = torch.stack(weights).ne(0).any(0)
    with torch.enable_grad():
        logits = linear_logits(_taken(h, rows, live), w, b)
    dx = _backward(logits, y, None, norm, weights, how)
    wanted = [x for x, need in zip(leaves, needs, strict=True) if x is not None and need]
    made = iter(torch.autograd.grad(logits, wanted, dx))
    given = [next(made) if x is not None and need else None for x, need in zip(leaves, needs, strict=True)]
    return LinearGradient(*given)


ENGINE = Engine(_forward, _backward)
LINEAR_ENGINE = LinearEngine(_linear_forward, _linear_backward, collect)
