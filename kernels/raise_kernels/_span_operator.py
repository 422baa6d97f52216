"""Results of packed spans as PyTorch operators with a gradient, for compiled graphs and fake tensors.

    raise_kernels::scre, raise_kernels::span_logp (logp, offsets, eta, lam, first_index, normalize) -> [S]
    raise_kernels::seen_offsets (offsets, tokens) -> offsets

The first two are Triton kernels. What traces a call has no values of `offsets` to look at: all three look
where the graph runs, and refuse bounds that do not fit. The definition, which is traced through, reads its
offsets from the third.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from raise_kernels._backward import SpanEngine
from raise_kernels._checks import Scre, check_bounds, check_spans

_OPTIONS = "float eta, float lam, int first_index, bool normalize"
NAMES = ("scre", "span_logp")


def _engine(name: str) -> SpanEngine:
    """The Triton module of a name, imported at first use."""
    engine: SpanEngine = import_module(f"raise_kernels.{name}").ENGINE
    return engine


def _how(options: tuple[Any, ...]) -> Scre:
    eta, lam, first_index, normalize = options
    return Scre(eta=eta, lam=lam, first_index=first_index, normalize=normalize)


def _define(name: str) -> None:
    """The operator of one Triton module, its gradient as another, and what both mean without values."""

    def forward(logp: Tensor, offsets: Tensor, *options: Any) -> Tensor:
        check_bounds(offsets, len(logp))
        return _engine(name).forward(logp, offsets, _how(options))

    def backward(grad: Tensor, out: Tensor, logp: Tensor, offsets: Tensor, *options: Any) -> Tensor:
        return _engine(name).backward(grad, out, logp, offsets, _how(options))

    op = torch.library.custom_op(
        f"raise_kernels::{name}",
        forward,
        mutates_args=(),
        schema=f"(Tensor logp, Tensor offsets, {_OPTIONS}) -> Tensor",
    )
    back = torch.library.custom_op(
        f"raise_kernels::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor out, Tensor logp, Tensor offsets, {_OPTIONS}) -> Tensor",
    )
    op.register_fake(lambda logp, offsets, *_: logp.new_empty(offsets.shape[0] - 1, dtype=torch.float32))
    back.register_fake(lambda grad, out, logp, *_: logp.new_empty(logp.shape))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logp, offsets, *ctx.options = inputs
        ctx.save_for_backward(output, logp, offsets)

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return back(grad, *ctx.saved_tensors, *ctx.options), None, *(None for _ in ctx.options)

    op.register_autograd(gradient, setup_context=setup_context)


for _name in NAMES:
    _define(_name)


@torch.library.custom_op(
    "raise_kernels::seen_offsets", mutates_args=(), schema="(Tensor offsets, SymInt tokens) -> Tensor"
)
def _seen(offsets: Tensor, tokens: int) -> Tensor:
    check_bounds(offsets, tokens)
    return offsets.clone()


@_seen.register_fake
def _(offsets: Tensor, tokens: int) -> Tensor:
    return torch.empty_like(offsets)


def seen_offsets(logp: Tensor, offsets: Tensor) -> Tensor:
    """offsets [S+1] of logp [T]: in a graph that is being traced, what is checked when it runs."""
    if not torch.compiler.is_compiling():
        return offsets
    check_spans(logp, offsets)
    out: Tensor = torch.ops.raise_kernels.seen_offsets(offsets, len(logp))
    return out


def run(name: str, logp: Tensor, offsets: Tensor, how: Scre) -> Tensor:
    """[S] fp32 by the Triton kernel `name`: logp [T] nats, offsets [S+1]; differentiable once in logp."""
    check_spans(logp, offsets)
    op = getattr(torch.ops.raise_kernels, name)
    out: Tensor = op(logp, offsets, how.eta, how.lam, how.first_index, how.normalize)
    # The gradient needs the values as they are now, whatever the caller does with his.
    return out.clone() if torch.is_grad_enabled() and logp.requires_grad else out
