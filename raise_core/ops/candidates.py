"""Several possible tokens for one position: the options of a question, or the gold answers' first tokens."""

from __future__ import annotations

from torch import Tensor

from raise_core.ops.impl import chosen_impl
from raise_kernels import candidates as engine
from raise_kernels import linear_candidates, reference
from raise_kernels._checks import LogitMap, check_memory, check_tensor


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
    memory: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """log p of K tokens for each row, [T, K] fp32 nats, from one read of the row.

    candidates [T, K] int64 or int32: token ids for each of `rows` [T], or, without rows, [..., K] for every
    row. Rows of logits [..., V], or of hidden [..., D] @ weight [V, D].T (+ bias [V]), whose logits are never
    stored. exp of it, over its sum along K, is the model's confidence among the options. A candidate that is
    `ignore_index` gives 0 (pad short lists with it), one outside the vocabulary NaN, a row without a result
    NaN; their gradient is 0. Differentiable in logits, or in hidden, weight and bias; the gradient sums over
    the K candidates in their order. memory: bytes of scratch from hidden states, as in `linear_token_stats`.
    The other options, and what is raised, are those of `token_stats`.
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
    check_memory(memory)
    if hidden is not None and weight is not None:
        check_tensor("hidden", hidden)
        chosen = chosen_impl(hidden, impl)
        if chosen == "reference":
            return reference.linear_candidate_logp(hidden, weight, candidates, bias=bias, rows=rows, how=how)
        return linear_candidates.linear_candidate_logp(
            chosen, hidden, weight, candidates, bias=bias, rows=rows, how=how, memory=memory
        )
    assert logits is not None
    check_tensor("logits", logits)
    chosen = chosen_impl(logits, impl)
    if chosen == "reference":
        return reference.candidate_logp(logits, candidates, rows=rows, how=how)
    return engine.candidate_logp(chosen, logits, candidates, rows=rows, how=how)
