"""Log-probabilities of several tokens for each row, from one read of the row, as an operator with a gradient.

    raise_kernels::candidate_logp(logits, candidates, rows, ..., engine) -> ([T, K], [2, T] normaliser)

The normaliser of a row is what `token_stats` finds; the candidates' logits are gathered. The gradient is that
of K tokens scored on one row, of which the first carries the sum of all their shares in p.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from raise_kernels._backward import Coefficients, Normaliser
from raise_kernels._checks import PLAIN, LogitMap, check_candidates, check_stats
from raise_kernels._maps import to_z, wide_dtype
from raise_kernels._operator import check_engine, logit_map, logits_engine

_INPUTS = "Tensor logits, Tensor candidates, Tensor? rows"
_OPTIONS = (
    "float temperature, float logit_scale, float? softcap, int? valid_vocab, int ignore_index, str engine"
)
UNSCORED = -100


def any_target(candidates: Tensor, how: LogitMap) -> tuple[Tensor, LogitMap]:
    """Targets [T] for the normaliser of rows with candidates [T, K]; a row without any is not scored."""
    scored = (candidates != how.ignore_index).any(1)
    return torch.where(scored, 0, UNSCORED), replace(how, ignore_index=UNSCORED)


def settled(logp: Tensor, candidates: Tensor, columns: int, how: LogitMap) -> Tensor:
    """logp [T, K] with what is documented for ignored candidates and for those outside the vocabulary."""
    inside = (candidates >= 0) & (candidates < columns)
    return logp.masked_fill(~inside, math.nan).masked_fill(candidates == how.ignore_index, 0.0)


def _mapped(x: Tensor, how: LogitMap, engine: str) -> Tensor:
    """Gathered logits [T, K] as z, with the bits that an engine gives them in their row."""
    if how.softcap is None:
        return to_z(x.to(wide_dtype(x)), how)
    y = torch.zeros(x.numel(), dtype=torch.int64, device=x.device)
    alone = replace(how, valid_vocab=None, ignore_index=UNSCORED)
    return logits_engine(engine).forward(x.reshape(-1, 1), y, None, alone, ("top",), 1)["top"].view(x.shape)


def row_numbers(rows: Tensor | None, like: Tensor) -> Tensor:
    """rows [T], or all rows in their order."""
    return torch.arange(len(like), device=like.device) if rows is None else rows


@torch.library.custom_op(
    "raise_kernels::candidate_logp",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _forward(logits: Tensor, candidates: Tensor, rows: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    *scalars, engine = options
    how = logit_map(tuple(scalars))
    y, plain = any_target(candidates, how)
    stats = logits_engine(engine).forward(logits, y, rows, plain, ("top", "max_logp"), 1)
    norm = torch.stack([stats["top"], stats["max_logp"]])
    count, columns = logits.shape[:-1].numel(), how.columns(logits.shape[-1])
    if not count:
        return settled(norm[1][:, None].expand(candidates.shape), candidates, columns, how), norm
    # A row number outside the logits has no normaliser, whatever is read in its place.
    n = row_numbers(rows, y).clamp(0, count - 1)[:, None]
    table = logits if logits.dim() > 1 else logits[None]
    where = (*torch.unravel_index(n, table.shape[:-1]), candidates.clamp(0, columns - 1))
    x = table[where]
    logp = (_mapped(x, how, engine) - norm[0][:, None]).clamp(max=0.0) + norm[1][:, None]
    return settled(logp, candidates, columns, how), norm


@torch.library.custom_op(
    "raise_kernels::candidate_logp_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor norm, {_INPUTS}, {_OPTIONS}) -> Tensor",
)
def _backward(
    grad: Tensor, norm: Tensor, logits: Tensor, candidates: Tensor, rows: Tensor | None, *options: Any
) -> Tensor:
    *scalars, engine = options
    how = logit_map(tuple(scalars))
    choices = candidates.shape[1]
    inside = (candidates >= 0) & (candidates < how.columns(logits.shape[-1]))
    live = inside & (candidates != how.ignore_index) & norm[1].isfinite()[:, None]
    g = torch.where(live, grad.to(norm.dtype), 0.0)
    on_p = torch.zeros_like(g)
    # One after another: a reduction may take another order in another batch.
    on_p[:, 0] = -reduce(torch.add, g.unbind(1))
    zero = torch.zeros(g.numel(), dtype=g.dtype, device=g.device)
    weights = Coefficients(on_p.view(-1), zero, zero, g.view(-1))
    each = Normaliser(*(value.repeat_interleave(choices) for value in norm))
    n = row_numbers(rows, candidates).repeat_interleave(choices)
    y = torch.where(live, candidates, 0).view(-1)
    return logits_engine(engine).backward(logits, y, n, each, weights, how)


@_forward.register_fake
def _(logits: Tensor, candidates: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(logits)
    shapes = (candidates.shape, (2, candidates.shape[0]))
    return logits.new_empty(shapes[0], dtype=wide), logits.new_empty(shapes[1], dtype=wide)


@_backward.register_fake
def _(grad: Tensor, norm: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, candidates, rows, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], logits, candidates, rows)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.raise_kernels.candidate_logp_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dx, None, None, *(None for _ in ctx.options)


_forward.register_autograd(_gradient, setup_context=_setup_context)


def candidate_logp(
    engine: str,
    logits: Tensor,
    candidates: Tensor,
    *,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
) -> Tensor:
    """As `reference.candidate_logp`, by the engine "native" or "triton"; differentiable once in logits.

    logits [..., V]; candidates [..., K], or [T, K] with rows [T] -> the shape of candidates, fp32, nats.
    """
    check_candidates(candidates, logits.device)
    check_stats(logits, candidates[..., 0], rows)
    check_engine(engine, logits)
    flat = candidates.reshape(-1, candidates.shape[-1]).long().contiguous()
    out, _ = torch.ops.raise_kernels.candidate_logp(
        logits, flat, None if rows is None else rows.long().contiguous(),
        how.temperature, how.logit_scale, how.softcap, how.valid_vocab, how.ignore_index, engine,
    )  # fmt: skip
    result: Tensor = out.view(candidates.shape)
    return result
