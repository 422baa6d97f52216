"""Results of packed spans as PyTorch operators with a gradient, for compiled graphs and fake tensors.

raise_kernels::scre, raise_kernels::span_logp (logp, offsets, eta, lam, first_index, normalize) -> [S]
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from raise_kernels._checks import Scre, check_spans

_OPTIONS = "float eta, float lam, int first_index, bool normalize"
_MODULES = {"scre": "raise_kernels.scre", "span_logp": "raise_kernels.span_logp"}


def _how(options: tuple[Any, ...]) -> Scre:
    eta, lam, first_index, normalize = options
    return Scre(eta=eta, lam=lam, first_index=first_index, normalize=normalize)


def _define(name: str) -> None:
    """The operator of one Triton module, its gradient as another, and what both mean without values."""

    def forward(logp: Tensor, offsets: Tensor, *options: Any) -> Tensor:
        out: Tensor = import_module(_MODULES[name]).forward(logp, offsets, _how(options))
        return out

    def backward(grad: Tensor, out: Tensor, logp: Tensor, offsets: Tensor, *options: Any) -> Tensor:
        # Two spans that only the device sees to overlap would write to the same tokens.
        rising = offsets == offsets.cummax(0).values
        clean = torch.where(rising, offsets, -1)
        into: Tensor = import_module(_MODULES[name]).backward(grad, out, logp, clean, _how(options))
        return into

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


for _name in _MODULES:
    _define(_name)


def run(name: str, logp: Tensor, offsets: Tensor, how: Scre) -> Tensor:
    """[S] fp32 by the Triton kernel `name`: logp [T] nats, offsets [S+1]; differentiable once in logp."""
    check_spans(logp, offsets)
    op = getattr(torch.ops.raise_kernels, name)
    out: Tensor = op(logp, offsets, how.eta, how.lam, how.first_index, how.normalize)
    # The gradient needs the values as they are now, whatever the caller does with his.
    return out.clone() if torch.is_grad_enabled() and logp.requires_grad else out
