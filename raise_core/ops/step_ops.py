"""Scores of reasoning steps by a process reward model, from two rows of its head."""

from __future__ import annotations

import torch
from torch import Tensor

from raise_core.ops.impl import chosen_impl
from raise_kernels import _step_operator, reference_steps
from raise_kernels._checks import LogitMap, check_tensor


def step_margins(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    good: int,
    bad: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-odds z[good] - z[bad] of each step tag, [S] fp32 nats; what a PRM is trained on. See `step_scores`.

    Where a score has rounded to 0 or 1 its log-odds still tell, and so does their gradient.
    """
    how = LogitMap(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    check_tensor("hidden", hidden)
    chosen = chosen_impl(hidden, impl)
    if chosen == "reference":
        return reference_steps.step_margins(hidden, weight, rows, good, bad, bias=bias, how=how)
    return _step_operator.step_margins(chosen, hidden, weight, rows, good, bad, bias=bias, how=how)


def step_scores(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    good: int,
    bad: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Score of each step, [S] fp32 in [0, 1]: the probability of "good" among "good" and "bad".

        score = sigmoid(z[good] - z[bad])        (Chain-of-Step, arXiv 2509.19003, its PRM)

    hidden [..., D]: last hidden states of the PRM; rows [S]: the rows of its flattened leading axes that
    hold the step tags, None for all rows. weight [V, D], bias [V]: its head, of which the rows `good` and
    `bad` (token ids) are read and no other; z as in `token_stats`. Sums are fp32 (fp64 for fp64 on the CPU).
    Without a softcap a tag is one dot product with the difference of the two rows. Differentiable in hidden,
    weight and bias. No tags give an empty result. A NaN or an infinity, and a row number outside hidden, give
    NaN for that tag and gradient 0. Raises ValueError / TypeError for arguments that do not fit.
    """
    margins = step_margins(
        hidden, weight, rows, good, bad, bias=bias, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, impl=impl,
    )  # fmt: skip
    return torch.sigmoid(margins)
