"""What the step scores of a process reward model mean, in plain torch; fp64-capable, anywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raise_kernels._checks import PLAIN, LogitMap
from raise_kernels._step_checks import check_steps
from raise_kernels.reference import transform
from raise_kernels.reference_product import linear_logits


def step_margins(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    good: int,
    bad: int,
    *,
    bias: Tensor | None = None,
    how: LogitMap = PLAIN,
) -> Tensor:
    """z[good] - z[bad] of each step tag, [S] in nats: the log-odds of its score sigmoid(z[good] - z[bad]).

    z is `transform` of hidden @ weight.T + bias at the tag's own position (Chain-of-Step, arXiv 2509.19003).
    hidden [..., D], weight [V, D], bias [V]; rows [S]: rows of hidden's flattened leading axes, or None for
    all. A margin that is not finite and a row number outside hidden give NaN and gradient 0. Differentiable
    in hidden, weight and bias.
    """
    check_steps(hidden, weight, bias, rows, good, bad)
    flat = hidden.reshape(-1, hidden.shape[-1])
    n = torch.arange(len(flat), device=flat.device) if rows is None else rows.long()
    known = (n >= 0) & (n < len(flat))
    x = flat[torch.where(known, n, 0)] if len(flat) else flat.new_zeros(len(n), flat.shape[1])
    pair = torch.tensor([good, bad], device=weight.device)
    both = None if bias is None else bias[pair]
    with torch.no_grad():
        z = transform(linear_logits(x, weight[pair], both), how)
        lost = ~known | ~(z[:, 0] - z[:, 1]).isfinite()
    # A tag without a result takes part in no arithmetic: its gradient is 0.
    z = transform(linear_logits(torch.where(lost[:, None], 0.0, x), weight[pair], both), how)
    return (z[:, 0] - z[:, 1]).masked_fill(lost, math.nan)
