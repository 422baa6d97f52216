"""Token statistics of one vocabulary shard, and how the shards are joined.

partial_token_stats(shard 0), partial_token_stats(shard 1), ...  ->  merge_token_stats  ->  TokenStats
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from raise_core.ops.impl import chosen_impl
from raise_core.ops.stats import TokenStats
from raise_kernels import reference_engine
from raise_kernels._backward import Engine, LinearEngine
from raise_kernels._checks import LogitMap, check_linear, check_stats, check_want, check_whole
from raise_kernels._linear_operator import MEMORY_CPU, linear_engine, scratch_bytes
from raise_kernels._operator import logits_engine
from raise_kernels.parallel import (
    LinearShard,
    LogitShard,
    Shard,
    fields,
    merge_shards,
    place,
    shard_values,
)

Make = Callable[..., Shard]  # a shard from its tensors


@dataclass(frozen=True)
class PartialStats:
    """What one vocabulary shard knows about each scored row; `merge_token_stats` joins the shards.

    values [F, ...]: F fp32 numbers (fp64 for fp64 inputs) for each target, with the shape of targets behind;
    `fields` names them, first "owner": 1 where the shard holds the target, 0 where not, -1 where it is
    ignored. The shard has the columns from first_column on, `columns` of them, padding included. want, topk
    and valid_vocab (of the whole vocabulary) are as they were asked for.
    """

    values: Tensor
    fields: tuple[str, ...]
    want: tuple[str, ...]
    topk: int
    first_column: int
    columns: int
    valid_vocab: int | None


@torch.no_grad()
def partial_token_stats(
    logits_shard: Tensor,
    targets: Tensor,
    *,
    first_column: int,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
    target_logit: Tensor | None = None,
    impl: str = "auto",
) -> PartialStats:
    """What the columns [first_column, first_column + V_k) of the logits say about each scored row.

    logits_shard [..., V_k]; targets [...] and valid_vocab refer to the whole vocabulary. A shard may lie in
    the padding as a whole. rank needs target_logit, the logit of each target (as it is in the logits, before
    scale and softcap; shape of targets), from the shard that holds it; rank and topk_logp_mean (any impl)
    read the logits twice. No gradient: `parallel_token_stats` has one. Other arguments as in `token_stats`.
    """
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    check_stats(logits_shard, targets, rows, "logits_shard")
    make = logit_shards(logits_shard, impl)
    return _partial(make(logits_shard), targets, rows, first_column, how, want, topk, target_logit)


@torch.no_grad()
def partial_linear_token_stats(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    *,
    first_column: int,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
    target_logit: Tensor | None = None,
    memory: int | None = None,
    impl: str = "auto",
) -> PartialStats:
    """`partial_token_stats` of the logits hidden @ weight_shard.T + bias, which are never stored.

    hidden [..., D], weight_shard [V_k, D] and bias [V_k] of the same columns. target_logit, for rank: (hidden
    * weight[y]).sum(-1) + bias[y] in fp32. rank and topk_logp_mean make the product a second time. Other
    arguments as in `linear_token_stats`.
    """
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    check_linear(hidden, weight_shard, bias, targets, rows, "weight_shard")
    make = linear_shards(hidden, memory, impl)
    shard = make(hidden, weight_shard, bias)
    return _partial(shard, targets, rows, first_column, how, want, topk, target_logit)


def merge_token_stats(parts: Sequence[PartialStats]) -> TokenStats:
    """Statistics of whole rows from their shards, in any order: each column of the vocabulary once.

    Shards are joined in fp64 in the order of their columns, so that the result is that of the unsharded call
    up to rounding. Raises ValueError where columns are missing or come twice, and where parts differ in what
    they hold.
    """
    if isinstance(parts, PartialStats) or parts is None:
        raise TypeError(f"parts is {type(parts).__name__}; give a list with the PartialStats of every shard")
    if not parts:
        raise ValueError("parts is empty; give the PartialStats of every shard")
    ordered = sorted(parts, key=lambda part: part.first_column)
    first = ordered[0]
    for part in ordered[1:]:
        if _asked(part) != _asked(first):
            raise ValueError(
                f"parts differ in topk, valid_vocab, dtype, device, shape or statistics: {_asked(first)} and "
                f"{_asked(part)}; make all of them by one call's arguments"
            )
    _check_columns([(part.first_column, part.columns) for part in ordered], first.valid_vocab)
    shape = first.values.shape[1:]
    tokens = [part.values.reshape(len(first.fields), shape.numel()) for part in ordered]
    merged, _ = merge_shards(tokens, first.fields, first.want)
    return TokenStats(**{name: value.view(shape) for name, value in merged.items()})


def _partial(
    shard: Shard,
    targets: Tensor,
    rows: Tensor | None,
    first: int,
    how: LogitMap,
    want: Sequence[str],
    topk: int,
    target_logit: Tensor | None,
) -> PartialStats:
    names = check_want(want)
    check_topk(topk)
    check_first(first)
    if "rank" in names:
        if target_logit is None:
            raise ValueError(
                'want names "rank", which counts the columns above the target\'s logit: give every shard '
                "target_logit=, from the shard that holds the target, or use parallel_token_stats"
            )
        if target_logit.shape != targets.shape or target_logit.device != targets.device:
            raise ValueError(
                f"target_logit has shape {tuple(target_logit.shape)} on {target_logit.device}, targets "
                f"{tuple(targets.shape)} on {targets.device}; give one logit for each target"
            )
        target_logit = target_logit.reshape(-1).to(shard.dtype)
    y = targets.reshape(-1).long()
    n = None if rows is None else rows.long()
    at = place(shard, y, n, first, how)
    values = shard_values(shard, at, n, names, topk, target_logit)
    return PartialStats(
        values=values.view(len(values), *targets.shape),
        fields=fields(names, topk),
        want=names,
        topk=topk,
        first_column=first,
        columns=shard.width,
        valid_vocab=how.valid_vocab,
    )


def logit_shards(logits: Tensor, impl: str) -> Make:
    """What makes shards of logits like these, by a chosen implementation."""
    chosen = chosen_impl(logits, impl)
    _check_dtype("logits_shard", logits, chosen)
    engine: Engine = reference_engine.ENGINE if chosen == "reference" else logits_engine(chosen)
    return partial(LogitShard, engine)


def linear_shards(hidden: Tensor, memory: int | None, impl: str) -> Make:
    """What makes shards from hidden states like these, weight and bias, by a chosen implementation."""
    chosen = chosen_impl(hidden, impl)
    _check_dtype("hidden", hidden, chosen)
    engine: LinearEngine = reference_engine.LINEAR_ENGINE if chosen == "reference" else linear_engine(chosen)
    return partial(LinearShard, engine, scratch_bytes(memory, hidden, MEMORY_CPU))


def _check_dtype(name: str, x: Tensor, impl: str) -> None:
    if impl == "triton" and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f'{name} is {x.dtype}; give fp32, bf16 or fp16, or use impl="native" or "reference"')


def check_topk(topk: int) -> None:
    """Refuse a k of topk_logp_mean that is not a whole number of at least 1."""
    check_whole("topk", topk)


def check_first(first: int) -> None:
    """Refuse a first column that is not a whole number of at least 0."""
    if not isinstance(first, int) or first < 0:
        raise (ValueError if isinstance(first, int) else TypeError)(
            f"first_column is {first!r}; give the number of columns on the shards before this one"
        )


def _asked(part: PartialStats) -> tuple[object, ...]:
    """What the parts of one row have in common."""
    values = part.values
    return (
        part.topk,
        part.valid_vocab,
        values.dtype,
        values.device,
        tuple(values.shape[1:]),
        part.fields,
        part.want,
    )


def _check_columns(shards: Sequence[tuple[int, int]], valid_vocab: int | None) -> None:
    """Refuse (first column, columns) in rising order that leave a gap, overlap or end too early."""
    end = 0
    for first, columns in shards:
        if first != end:
            raise ValueError(
                f"the parts have (first column, columns) {list(shards)}; give each column of the vocabulary "
                f"once: a part that starts at {end} is expected"
            )
        end += columns
    if valid_vocab is not None and valid_vocab > end:
        raise ValueError(f"valid_vocab is {valid_vocab}, but the parts end at column {end}; give all shards")
