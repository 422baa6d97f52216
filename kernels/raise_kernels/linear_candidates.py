"""Log-probabilities of several tokens for each row of hidden states, whose logits are never stored.

    raise_kernels::candidate_logits(hidden, weight, bias, chosen, n, memory, engine) -> [T, K]

The normaliser is that of `linear_token_stats`; the operator makes the candidates' logits, one dot product
each, in tiles of `memory` bytes. Tiles change no sum: on the CPU it gives the same bits for any `memory`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raise_kernels._checks import LogitMap, check_candidates, check_linear
from raise_kernels._linear_operator import MEMORY_CPU, linear_engine, linear_token_stats, scratch_bytes
from raise_kernels._maps import to_z, wide_dtype
from raise_kernels.candidates import any_target, row_numbers, settled

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor chosen, Tensor n"
_OPTIONS = "int memory, str engine"


def _at_once(memory: int, x: Tensor) -> int:
    """Rows [D] that are gathered at one time: each exists up to four times in the wide dtype."""
    return max(1, memory // (4 * x.shape[-1] * wide_dtype(x).itemsize))


@torch.library.custom_op(
    "raise_kernels::candidate_logits",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> Tensor",
)
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, n: Tensor, *options: Any
) -> Tensor:
    h, wide = hidden.reshape(-1, hidden.shape[-1]), wide_dtype(hidden)
    c = chosen.view(-1)
    out = torch.zeros(len(c), dtype=wide, device=hidden.device)
    row_of = n.repeat_interleave(chosen.shape[1])
    size = _at_once(options[0], hidden)
    for start in range(0, len(c) if len(h) else 0, size):
        pairs = slice(start, start + size)
        product = weight[c[pairs].clamp(min=0)].to(wide)
        product *= h[row_of[pairs]]
        out[pairs] = product.sum(-1)
    if bias is not None:
        out += bias[c.clamp(min=0)].to(wide)
    return out.masked_fill_(c < 0, 0.0).view(chosen.shape)


@torch.library.custom_op(
    "raise_kernels::candidate_logits_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, bool[] needs, {_OPTIONS}) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: Tensor,
    n: Tensor,
    needs: list[bool],
    memory: int,
    engine: str,
) -> list[Tensor]:
    # A slope of 0 moves nothing, also where its row holds a NaN or an infinity.
    live = (chosen >= 0) & (grad != 0)
    g, c = torch.where(live, grad, 0.0), chosen.clamp(min=0)
    size = _at_once(memory, hidden)
    made = []
    if needs[0]:
        per_token = _on_tokens(weight, c, g, live, size)
        made.append(linear_engine(engine).collect(per_token, hidden, n))
    if needs[1]:
        made.append(_on_weight(hidden, weight, c, n, g, live, size))
    if needs[2] and bias is not None:
        total = torch.zeros(bias.shape, dtype=g.dtype, device=g.device)
        made.append(_add_rows(total, c.view(-1), g.view(-1)).to(bias.dtype))
    return made


def _on_tokens(weight: Tensor, c: Tensor, g: Tensor, live: Tensor, size: int) -> Tensor:
    """sum_k g[t, k] * weight[c[t, k]], [T, D], in the order of k."""
    out = torch.zeros(len(c), weight.shape[1], dtype=g.dtype, device=g.device)
    for start in range(0, len(c), size):
        tile = slice(start, start + size)
        for k in range(c.shape[1]):
            part = weight[c[tile, k]].to(g.dtype)
            part *= g[tile, k, None]
            out[tile] += part.masked_fill_(~live[tile, k, None], 0.0)
    return out


def _on_weight(
    hidden: Tensor, weight: Tensor, c: Tensor, n: Tensor, g: Tensor, live: Tensor, size: int
) -> Tensor:
    """Gradient of weight: of each candidate the sum over its pairs in their order, rounded once."""
    h, out = hidden.reshape(-1, hidden.shape[-1]), torch.zeros_like(weight)
    pair = live.view(-1).nonzero()[:, 0]
    named, place = torch.unique(c.view(-1)[pair], return_inverse=True)
    place, order = torch.sort(place, stable=True)
    pair = pair[order]
    for first in range(0, len(named), size):
        here = named[first : first + size]
        bounds = torch.tensor([first, first + len(here)], device=place.device)
        lo, hi = torch.searchsorted(place, bounds).tolist()
        total = torch.zeros(len(here), h.shape[1], dtype=g.dtype, device=g.device)
        for start in range(lo, hi, size):
            some = slice(start, min(start + size, hi))
            part = h[n[pair[some] // c.shape[1]]].to(g.dtype)
            part *= g.view(-1)[pair[some], None]
            _add_rows(total, place[some] - first, part)
        out[here] = total.to(out.dtype)
    return out


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """total[index] += rows, in an order that does not change: each device has another way for that."""
    if total.device.type == "cpu":
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(chosen.shape, dtype=wide_dtype(hidden))


@_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in zip(inputs[:3], inputs[5], strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.memory, ctx.engine = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    back = torch.ops.raise_kernels.candidate_logits_backward
    made = iter(back(grad, *ctx.saved_tensors, needs, ctx.memory, ctx.engine))
    return *(next(made) if needed else None for needed in needs), None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def linear_candidate_logp(
    engine: str,
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    *,
    bias: Tensor | None,
    rows: Tensor | None,
    how: LogitMap,
    memory: int | None,
) -> Tensor:
    """As `reference.candidate_logp` of hidden @ weight.T + bias, by the engine "native" or "triton".

    hidden [..., D], weight [V, D], bias [V]; candidates [..., K], or [T, K] with rows [T] -> the shape of
    candidates, fp32 (fp64 for fp64), nats. memory: bytes of scratch, see `linear_token_stats`.
    """
    check_candidates(candidates, hidden.device)
    check_linear(hidden, weight, bias, candidates[..., 0], rows)
    memory = scratch_bytes(memory, hidden, MEMORY_CPU)
    flat = candidates.reshape(-1, candidates.shape[-1]).long()
    y, plain = any_target(flat, how)
    n = row_numbers(rows, y)
    lse = linear_token_stats(
        engine, hidden, weight, y, bias=bias, rows=n, how=plain, want=("lse",), topk=1, memory=memory
    )["lse"]
    columns = how.columns(len(weight))
    inside = (flat >= 0) & (flat < columns) & (flat != how.ignore_index)
    live = inside & lse.isfinite()[:, None]
    # A row number outside hidden has no normaliser; what is read in its place must exist all the same.
    near = n.long().clamp(0, max(hidden.shape[:-1].numel() - 1, 0))
    x = torch.ops.raise_kernels.candidate_logits(
        hidden, weight, bias, torch.where(live, flat, -1), near, memory, engine
    )
    masked = x == -math.inf
    z = to_z(torch.where(masked, 0.0, x), how).masked_fill(masked, -math.inf)
    logp = (z - lse.nan_to_num()[:, None]).clamp(max=0.0)
    logp = torch.where(live, logp, 0.0 * lse.detach()[:, None])
    return settled(logp, flat, columns, how).view(candidates.shape)
