"""The tensor part of `linear_policy_loss`: log-probabilities and, in the same pass, gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raise_kernels import linear_loss, reference
from raise_kernels._checks import LogitMap as LogitMap
from raise_kernels._checks import check_bounds as check_bounds
from raise_kernels._checks import check_linear as check_linear
from raise_kernels._checks import check_memory as check_memory
from raise_kernels._checks import check_tensor as check_tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def loss_and_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    slope: Callable[[slice, Tensor], Tensor],
    *,
    bias: Tensor | None,
    rows: Tensor | None,
    how: LogitMap,
    needs: tuple[bool, bool, bool],
    accumulate_fp32: bool,
    memory: int | None,
    impl: str,
) -> tuple[Tensor, Gradients]:
    """Log-probabilities [T] and the gradients of (hidden, weight, bias) that are needed, by a chosen impl.

    slope(tokens, logp) gives d loss / d logp of a tile of tokens.
    """
    if impl != "reference":
        logp, made = linear_loss.loss_and_gradient(
            impl, hidden, weight, targets, slope, bias=bias, rows=rows, how=how, needs=needs,
            accumulate_fp32=accumulate_fp32, memory=memory,
        )  # fmt: skip
        return logp, (made.hidden, made.weight, made.bias)
    inputs = [None if x is None else x.detach() for x in (hidden, weight, bias)]
    wanted = [x.requires_grad_() for x, needed in zip(inputs, needs, strict=True) if x is not None and needed]
    h, w, b = inputs
    assert h is not None and w is not None
    with torch.enable_grad():
        logp = reference.linear_token_stats(h, w, targets, bias=b, rows=rows, how=how)["logp"].reshape(-1)
    given = iter(torch.autograd.grad(logp, wanted, slope(slice(0, len(logp)), logp.detach())))
    g = [next(given) if x is not None and needed else None for x, needed in zip(inputs, needs, strict=True)]
    return logp.detach(), (g[0], g[1], g[2])
