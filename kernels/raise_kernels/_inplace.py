"""A gradient that is written over the logits it belongs to, so that no second tensor of their size exists.

Opt-in: the logits are gone after the backward pass. Their version rises with it, so that whatever else saved
them is told by autograd, as after any operation in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_inplace(logits: Tensor) -> None:
    """Refuse logits [..., V] that cannot hold their own gradient."""
    if torch.compiler.is_compiling():
        raise RuntimeError("inplace_gradient=True cannot be compiled: the compiler plans memory itself")
    if not logits.is_contiguous():
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and strides {logits.stride()}; inplace_gradient=True "
            "needs contiguous logits: leave it out, or name the scored rows of the whole with rows="
        )
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "logits is a leaf tensor, whose values outlive the backward pass; leave inplace_gradient out"
        )


class OverLogits(torch.autograd.Function):
    """stats = run(logits), whose gradient write(logits, gradient of stats, stats) puts in their place."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], Tensor],
        write: Callable[[Tensor, Tensor, Tensor], None],
        logits: Tensor,
    ) -> Tensor:
        """Compute, and remember the version that was read."""
        stats = run(logits)
        ctx.save_for_backward(stats)
        # Not saved with the others: autograd would refuse, in other words, what this class says itself.
        ctx.logits, ctx.version, ctx.write = logits.detach(), logits._version, write
        return stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        """The logits' memory, with their gradient in it."""
        logits = ctx.logits
        if torch.is_grad_enabled():
            raise RuntimeError(
                "token_stats(inplace_gradient=True) has no second derivative; leave create_graph=True out"
            )
        if logits is None:
            raise RuntimeError(
                "token_stats(inplace_gradient=True) has written its gradient over the logits already; for a "
                "second backward pass leave inplace_gradient out"
            )
        if logits._version != ctx.version:
            raise RuntimeError(
                "logits of token_stats(inplace_gradient=True) were written to after it read them, version "
                f"{ctx.version} then and {logits._version} now; use them once, or leave inplace_gradient out"
            )
        ctx.write(logits, grad, *ctx.saved_tensors)
        ctx.logits = None
        torch.autograd.graph.increment_version(logits)
        return None, None, logits
