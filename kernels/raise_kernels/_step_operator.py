"""Margins z[good] - z[bad] at step tags as one PyTorch operator with a gradient; and the engine of the CPU.

    raise_kernels::step_margins(hidden, weight, bias, rows, good, bad, ..., engine) -> ([S], [2, S] slopes)

Two rows of the head are read, whatever V is. Without a softcap a tag costs one dot product with their
difference, which keeps what two large logits would lose by cancellation; under a softcap it costs two.
slopes: dz/dx of good and of bad, all the gradient needs beside the inputs.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raise_kernels._backward import collect
from raise_kernels._checks import PLAIN, LogitMap
from raise_kernels._maps import wide_dtype
from raise_kernels._step_checks import check_steps

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, SymInt good, SymInt bad"
_SCALARS = "float temperature, float logit_scale, float? softcap, str engine"


class StepEngine(NamedTuple):
    """One implementation over flat hidden [N, D] and rows [S].

    forward(hidden, weight, bias, rows, good, bad, how) -> margins [S], slopes [2, S].
    backward(coefficients, capped, hidden, weight, rows, good, bad, needs) -> gradients of hidden [N, D] and
    of the two weight rows [2, D], None where not needed; coefficients [2, S]: d loss / dx of good and of bad.
    """

    forward: Any
    backward: Any


def _gather(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [S, D] in the precision of the arithmetic, and which of them there are [S]."""
    known = (rows >= 0) & (rows < len(hidden))
    wide = wide_dtype(hidden)
    if not len(hidden):
        return hidden.new_zeros(len(rows), hidden.shape[1], dtype=wide), known
    return hidden[torch.where(known, rows, 0)].to(wide), known


def _native_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, good: int, bad: int, how: LogitMap
) -> tuple[Tensor, Tensor]:
    x, known = _gather(hidden, rows)
    plus, minus = weight[good].to(x.dtype), weight[bad].to(x.dtype)
    a, b = how.factors
    zero = x.new_zeros(())
    up, down = (zero, zero) if bias is None else (bias[good].to(x.dtype), bias[bad].to(x.dtype))
    if how.softcap is None:
        margin = a * ((x * (plus - minus)).sum(1) + (up - down))
        slopes = torch.full((2, len(rows)), a, dtype=x.dtype)
        return margin.masked_fill(~(known & margin.isfinite()), math.nan), slopes
    raw = torch.stack([(x * plus).sum(1) + up, (x * minus).sum(1) + down])
    # tanh makes a number of an infinity, and a NaN would reach the gradient through its slope.
    fine = known & raw.isfinite().all(0)
    t = torch.tanh(a * torch.where(fine, raw, 0.0))
    return (b * (t[0] - t[1])).masked_fill(~fine, math.nan), a * b * (1 - t * t)


def _native_backward(
    on: Tensor, capped: bool, hidden: Tensor, weight: Tensor, rows: Tensor, good: int, bad: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    x, _ = _gather(hidden, rows)
    live = (on != 0).any(0)[:, None]
    plus, minus = weight[good].to(x.dtype), weight[bad].to(x.dtype)
    dx = dw = None
    if needs[0]:
        each = on[0, :, None] * (plus - minus)
        if capped:
            each = on[0, :, None] * plus + on[1, :, None] * minus
        dx = collect(torch.where(live, each, 0.0), hidden, rows)
    if needs[1]:
        dw = on @ torch.where(live, x, 0.0)
    return dx, dw


NATIVE = StepEngine(_native_forward, _native_backward)


def _engine(name: str) -> StepEngine:
    if name == "native":
        return NATIVE
    engine: StepEngine = import_module("raise_kernels.step_scores").ENGINE
    return engine


def _how(scalars: tuple[Any, ...]) -> LogitMap:
    temperature, logit_scale, softcap = scalars
    return LogitMap(temperature=temperature, logit_scale=logit_scale, softcap=softcap)


@torch.library.custom_op(
    "raise_kernels::step_margins", mutates_args=(), schema=f"({_INPUTS}, {_SCALARS}) -> (Tensor, Tensor)"
)
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, good: int, bad: int, *options: Any
) -> tuple[Tensor, Tensor]:
    *scalars, engine = options
    flat = hidden.reshape(-1, hidden.shape[-1])
    margin, slopes = _engine(engine).forward(flat, weight, bias, rows, good, bad, _how(tuple(scalars)))
    return margin, slopes


@torch.library.custom_op(
    "raise_kernels::step_margins_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor margin, Tensor slopes, {_INPUTS}, bool capped, bool[] needs, str engine) "
    "-> Tensor[]",
)
def _backward(
    grad: Tensor, margin: Tensor, slopes: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    rows: Tensor, good: int, bad: int, capped: bool, needs: list[bool], engine: str,
) -> list[Tensor]:  # fmt: skip
    flat = hidden.reshape(-1, hidden.shape[-1])
    on = torch.where(margin.isnan(), 0.0, grad.to(slopes.dtype)) * slopes
    on[1] = -on[1]
    dx, pair = _engine(engine).backward(on, capped, flat, weight, rows, good, bad, (needs[0], needs[1]))
    made = [] if dx is None else [dx.view(hidden.shape)]
    if pair is not None:
        made.append(_two_rows(weight, good, bad, pair))
    if needs[2] and bias is not None:
        made.append(_two_rows(bias, good, bad, on.sum(1)))
    return made


def _two_rows(like: Tensor, good: int, bad: int, values: Tensor) -> Tensor:
    """Zeros of the shape and dtype of `like`, with values [2, ...] at good and at bad."""
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    out[good], out[bad] = values[0].to(out.dtype), values[1].to(out.dtype)
    return out


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(hidden)
    return rows.new_empty(rows.shape, dtype=wide), rows.new_empty((2, *rows.shape), dtype=wide)


@_backward.register_fake
def _(grad: Tensor, margin: Tensor, slopes: Tensor, *inputs: Any) -> list[Tensor]:
    needs = inputs[7]
    return [x.new_empty(x.shape) for x, needed in zip(inputs[:3], needs, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, rows, ctx.good, ctx.bad, _, _, softcap, ctx.engine = inputs
    ctx.capped = softcap is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, hidden, weight, bias, rows)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    made = iter(
        torch.ops.raise_kernels.step_margins_backward(
            grad, *ctx.saved_tensors, ctx.good, ctx.bad, ctx.capped, needs, ctx.engine
        )
    )
    return *(next(made) if needed else None for needed in needs), *(None for _ in range(7))


_forward.register_autograd(_gradient, setup_context=_setup_context)


def step_margins(
    engine: str,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    good: int,
    bad: int,
    *,
    bias: Tensor | None = None,
    how: LogitMap = PLAIN,
) -> Tensor:
    """As `reference_steps.step_margins`, by the engine "native" or "triton"; differentiable once. fp32."""
    check_steps(hidden, weight, bias, rows, good, bad)
    if engine == "triton" and torch.float64 in (hidden.dtype, weight.dtype):
        raise TypeError('hidden is float64; give fp32, bf16 or fp16, or use impl="native" or "reference"')
    count = hidden.shape[:-1].numel()
    named = torch.arange(count, device=hidden.device) if rows is None else rows.long().contiguous()
    out, _ = torch.ops.raise_kernels.step_margins(
        hidden, weight, bias, named, good, bad, how.temperature, how.logit_scale, how.softcap, engine
    )
    margins: Tensor = out
    return margins
