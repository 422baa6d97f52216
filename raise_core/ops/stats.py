"""Statistics of each scored token, from logits or from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from raise_core.ops.impl import chosen_impl
from raise_kernels import _linear_operator, _operator, reference
from raise_kernels._checks import LogitMap, check_memory, check_tensor, check_whole


@dataclass(frozen=True)
class TokenStats:
    """Statistics of each scored row: one tensor with the shape of targets per wanted name, None for the rest.

    logp, lse, entropy, max_logp and topk_logp_mean are in nats, self_certainty and varentropy in nats and
    nats squared, rank counts the columns with a larger logit than the target's. fp32 (fp64 for fp64 logits on
    the CPU). A row that is not scored (`ignore_index`) holds 0; a row without a result holds NaN: no finite
    logit, a NaN, a z of +inf, a target outside the vocabulary, a row number outside the logits.
    """

    logp: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    self_certainty: Tensor | None = None
    max_logp: Tensor | None = None
    varentropy: Tensor | None = None
    rank: Tensor | None = None
    topk_logp_mean: Tensor | None = None


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
    inplace_gradient: bool = False,
    impl: str = "auto",
) -> TokenStats:
    """Statistics of softmax(z) for each scored row, from one read of the logits (topk_logp_mean: one more).

        z = softcap * tanh(logit_scale * logits / softcap) / temperature         (no tanh without a softcap)
        logp = z[y] - lse      entropy = -sum p log p      self_certainty = lse - mean z - log V'      (nats)

    logits [..., V], any float dtype and strides; targets [...] int64 or int32. With rows [T], only those rows
    of the flattened leading axes are scored and targets is [T]. valid_vocab: columns from there on are
    padding. want: names of `TokenStats`. topk: k of topk_logp_mean (DeepConf); Triton takes at most 8192 over
    the row's blocks of 4096 columns, 215 at V = 151936.
    Differentiable in logits through logp, lse, entropy and self_certainty. inplace_gradient: the backward
    pass writes the gradient over the logits, which must be contiguous and no leaf, and so needs no second
    tensor of their size ("reference" ignores it). It raises RuntimeError when the logits were written to
    meanwhile, as a second backward pass does; it cannot be compiled. Raises ValueError or TypeError for
    arguments that do not fit; what only the data shows gives NaN for its row.
    """
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    check_tensor("logits", logits)
    chosen = chosen_impl(logits, impl)
    return TokenStats(**run_stats(logits, targets, rows, how, want, topk, chosen, inplace_gradient))


def run_stats(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    how: LogitMap,
    want: Sequence[str],
    topk: int,
    impl: str,
    inplace_gradient: bool = False,
) -> dict[str, Tensor]:
    """One [T] tensor for each name in want, by a chosen implementation."""
    check_whole("topk", topk)
    if impl == "reference":
        return reference.token_stats(logits, targets, rows=rows, how=how, want=want, topk=topk)
    return _operator.token_stats(
        impl, logits, targets, rows=rows, how=how, want=want, topk=topk, inplace_gradient=inplace_gradient
    )


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
    memory: int | None = None,
    impl: str = "auto",
) -> TokenStats:
    """`token_stats` of the logits hidden @ weight.T + bias, which are never stored.

    hidden [..., D], weight [V, D] and bias [V], any float dtype and strides; products add up in fp32 (fp64
    for fp64), so that 16-bit inputs give fp32-quality results. With rows [T], only those rows of hidden's
    flattened leading axes are multiplied, and targets is [T]. memory: bytes of scratch beside inputs and
    results, 32 MiB on the CPU and 256 MiB elsewhere when None; one row or 64 columns are held whatever it
    says. For topk_logp_mean Triton makes the product again, in tiles of rows of logits that fit memory.
    Differentiable in hidden, weight and bias through logp, lse, entropy and self_certainty; the
    gradient leaves nothing out. A weight that is also the embedding is an ordinary case. Columns whose logit
    is the target's to rounding may or may not count in rank. The other arguments, and what rows without a
    result give, are those of `token_stats`.
    """
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    check_tensor("hidden", hidden)
    chosen = chosen_impl(hidden, impl)
    stats = run_linear_stats(hidden, weight, targets, bias, rows, how, want, topk, memory, chosen)
    return TokenStats(**stats)


def run_linear_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    how: LogitMap,
    want: Sequence[str],
    topk: int,
    memory: int | None,
    impl: str,
) -> dict[str, Tensor]:
    """One tensor for each name in want, by a chosen implementation."""
    check_whole("topk", topk)
    check_memory(memory)
    if impl == "reference":
        return reference.linear_token_stats(
            hidden, weight, targets, bias=bias, rows=rows, how=how, want=want, topk=topk
        )
    return _linear_operator.linear_token_stats(
        impl, hidden, weight, targets, bias=bias, rows=rows, how=how, want=want, topk=topk, memory=memory
    )
