"""Logits from hidden states in plain torch, in the precision of the arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the precision of the arithmetic: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


class _Product(torch.autograd.Function):
    """x [N, D] @ w [V, D].T, and its gradients, in their own dtype inside of torch.autocast too."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        with _no_autocast(x):
            return x @ w.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        on_x, on_w = ctx.needs_input_grad
        with _no_autocast(x):
            return grad @ w if on_x else None, (x.T @ grad).T if on_w else None


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [..., D] @ weight [V, D].T + bias [V], [..., V] in fp32, or fp64 for fp64."""
    rows = wide(hidden).reshape(-1, hidden.shape[-1])
    logits: Tensor = _Product.apply(rows, wide(weight))
    logits = logits.view(*hidden.shape[:-1], len(weight))
    return logits if bias is None else logits + wide(bias)
