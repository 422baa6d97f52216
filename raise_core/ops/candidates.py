"""Several possible tokens for one position: the options of a question, or the gold answers' first tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raise_core.ops.impl import chosen_impl
from raise_core.ops.stats import run_linear_stats
from raise_kernels import candidates as engine
from raise_kernels import reference
from raise_kernels._checks import LogitMap, check_candidates, check_linear


def candidate_logp(
    candidates: Tensor,
    *,
    logits: Tensor | None = None,
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> Tensor:
    """log p of K tokens for each row, [T, K] fp32 nats, from one read of the row.

    candidates [T, K] int64 or int32: token ids for each of `rows` [T], or, without rows, [..., K] for every
    row. Rows of logits [..., V], or of hidden [..., D] @ weight [V, D].T (+ bias [V]), whose logits are never
    stored. exp of it, over its sum along K, is the model's confidence among the options. A candidate that is
    `ignore_index` gives 0 (pad short lists with it), one outside the vocabulary NaN, a row without a result
    NaN; their gradient is 0. Differentiable in logits, or in hidden, weight and bias; the gradient sums over
    the K candidates in their order. The other options, and what is raised, are those of `token_stats`.
    """
    if (hidden is None) != (weight is None):
        raise ValueError("hidden and weight go together: give both, or neither")
    if (logits is None) == (hidden is None):
        raise ValueError("give either logits, or hidden with weight")
    if bias is not None and hidden is None:
        raise ValueError("bias goes with hidden and weight; logits have it already")
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    if hidden is not None and weight is not None:
        return _from_hidden(candidates, hidden, weight, bias, rows, how, chosen_impl(hidden, impl))
    assert logits is not None
    chosen = chosen_impl(logits, impl)
    if chosen == "reference":
        return reference.candidate_logp(logits, candidates, rows=rows, how=how)
    return engine.candidate_logp(chosen, logits, candidates, rows=rows, how=how)


def _from_hidden(
    candidates: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    how: LogitMap,
    impl: str,
) -> Tensor:
    """The normaliser of `linear_token_stats`, and a dot product in fp32 for each candidate."""
    check_candidates(candidates, hidden.device)
    check_linear(hidden, weight, bias, candidates[..., 0], rows)
    flat = candidates.reshape(-1, candidates.shape[-1]).long()
    y, plain = engine.any_target(flat, how)
    n = engine.row_numbers(rows, y)
    lse = run_linear_stats(hidden, weight, y, bias, n, plain, ("lse",), 1, None, impl)["lse"]
    columns = how.columns(len(weight))
    chosen = flat.clamp(0, columns - 1)
    h = hidden.reshape(-1, hidden.shape[-1])
    # A row number outside hidden has no normaliser; what is read in its place must exist all the same.
    h = h[n.clamp(0, len(h) - 1)] if len(h) else h.new_zeros(len(n), h.shape[-1])
    # What is masked or has no result takes part in no arithmetic, so that its gradient is 0.
    h = torch.where(lse.isfinite()[:, None], h, 0.0)
    x = (weight[chosen].to(lse.dtype) * h.to(lse.dtype)[:, None]).sum(-1)
    if bias is not None:
        x = x + bias[chosen].to(lse.dtype)
    live = (flat != how.ignore_index) & (flat == chosen) & lse.isfinite()[:, None]
    masked = x == -math.inf
    z = engine.to_z(torch.where(live & ~masked, x, 0.0), how).masked_fill(masked, -math.inf)
    logp = (z - lse.nan_to_num()[:, None]).clamp(max=0.0)
    logp = torch.where(live, logp, 0.0 * lse.detach()[:, None])
    return engine.settled(logp, flat, columns, how).view(candidates.shape)
