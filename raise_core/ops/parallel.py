"""Token statistics over a process group, each process with some columns of the vocabulary.

parallel_token_stats(this process's shard)  ->  the same TokenStats on every process
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from raise_core.ops.partial import Make, check_first, check_topk, linear_shards, logit_shards
from raise_core.ops.stats import TokenStats, linear_token_stats, token_stats
from raise_kernels._backward import Normaliser, coefficients
from raise_kernels._checks import DIFFERENTIABLE, LogitMap, check_linear, check_stats, check_want
from raise_kernels._operator import with_what_the_gradient_needs
from raise_kernels.parallel import (
    LinearShard,
    Shard,
    fields,
    merge_shards,
    place,
    shard_gradient,
    shard_values,
)


def parallel_token_stats(
    logits_shard: Tensor,
    targets: Tensor,
    *,
    process_group: dist.ProcessGroup | None = None,
    first_column: int | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
    impl: str = "auto",
) -> TokenStats:
    """`token_stats` of logits whose columns are spread over the processes of a group, in the order of ranks.

    logits_shard [..., V_k]: this process's columns; targets, rows and options are the same on every process
    and refer to the whole vocabulary. One all-gather of a few numbers a token; rank needs another exchange,
    of [T] numbers. first_column: where this shard starts; when None, the widths are exchanged first and
    checked, and the host waits for that. Every process gets the same bits.

    Differentiable in logits_shard through logp, lse, entropy and self_certainty, without communication: each
    process must compute the same loss from the result, and gets the gradient of its own columns. A group of
    one process runs `token_stats`. Raises ValueError without an initialised process group.
    """
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    check_stats(logits_shard, targets, rows, "logits_shard")
    if _group_size(process_group) == 1:
        _check_alone(first_column)
        return token_stats(
            logits_shard, targets, rows=rows, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap, valid_vocab=valid_vocab, ignore_index=ignore_index, want=want, topk=topk,
            impl=impl,
        )  # fmt: skip
    make = logit_shards(logits_shard, impl)
    call = _Call(make, targets, rows, how, check_want(want), topk, process_group)
    return call.run(first_column, logits_shard)


def parallel_linear_token_stats(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    *,
    process_group: dist.ProcessGroup | None = None,
    first_column: int | None = None,
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
    """`parallel_token_stats` of the logits hidden @ weight_shard.T + bias, which are never stored.

    hidden [..., D], the same on every process; weight_shard [V_k, D] and bias [V_k]: this process's columns.
    Gradients of weight_shard and bias need no communication. That of hidden is summed over the group by one
    all-reduce, in fp32 from shares that were rounded to the dtype of hidden; so every process needs it, or
    none, and all of them run the backward pass. A group of one process runs `linear_token_stats`.
    """
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    check_linear(hidden, weight_shard, bias, targets, rows, "weight_shard")
    if _group_size(process_group) == 1:
        _check_alone(first_column)
        return linear_token_stats(
            hidden, weight_shard, targets, bias=bias, rows=rows, temperature=temperature,
            logit_scale=logit_scale, softcap=softcap, valid_vocab=valid_vocab, ignore_index=ignore_index,
            want=want, topk=topk, memory=memory, impl=impl,
        )  # fmt: skip
    make = linear_shards(hidden, memory, impl)
    call = _Call(make, targets, rows, how, check_want(want), topk, process_group)
    return call.run(first_column, hidden, weight_shard, bias)


@dataclass(frozen=True)
class _Call:
    """Everything that one distributed call needs beside its differentiable tensors."""

    make: Make
    targets: Tensor
    rows: Tensor | None
    how: LogitMap
    names: tuple[str, ...]
    topk: int
    group: dist.ProcessGroup | None

    @property
    def carried(self) -> tuple[str, ...]:
        """What is exchanged: the gradient's needs too, so that it is the same wherever gradients are."""
        return with_what_the_gradient_needs(self.names)

    def run(self, first_column: int | None, *tensors: Tensor | None) -> TokenStats:
        check_topk(self.topk)
        if first_column is None:
            first_column = self._first_column(self.make(*tensors))
        check_first(first_column)
        values = _Parallel.apply(self, first_column, *tensors)
        shape = self.targets.shape
        return TokenStats(**{n: v.view(shape) for n, v in zip(self.names, values, strict=True)})

    def _first_column(self, shard: Shard) -> int:
        """Columns on the processes before this one; all processes refuse shards that do not fit together."""
        carried = len(fields(self.carried, self.topk))
        numbers = [shard.width, self.targets.numel(), carried, shard.dtype.itemsize]
        mine = torch.tensor(numbers, device=self.targets.device)
        every = [row.tolist() for row in self.gather(mine)]
        if len({tuple(row[1:]) for row in every}) > 1:
            raise ValueError(
                f"the processes' targets, statistics and bytes per number are {[row[1:] for row in every]}; "
                "give the same targets, want, topk and input dtype on every process"
            )
        widths = [row[0] for row in every]
        if self.how.valid_vocab is not None and self.how.valid_vocab > sum(widths):
            raise ValueError(f"valid_vocab is {self.how.valid_vocab}, but the shards have {widths} columns")
        return int(sum(widths[: dist.get_rank(self.group)]))

    def gather(self, x: Tensor) -> list[Tensor]:
        """x of every process, by rank."""
        every = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, x.contiguous(), group=self.group)
        return every

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over the processes."""
        dist.all_reduce(x, group=self.group)
        return x


class _Parallel(torch.autograd.Function):
    """The statistics of `_Call.names`, each [T], from this process's shard."""

    @staticmethod
    def forward(ctx: Any, call: _Call, first: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        shard = call.make(*(None if x is None else x.detach() for x in tensors))
        y = call.targets.reshape(-1).long()
        rows = None if call.rows is None else call.rows.long()
        at = place(shard, y, rows, first, call.how)
        limit = call.sum(shard.target_logits(at, rows)) if "rank" in call.names else None
        names, made = call.carried, fields(call.carried, call.topk)
        values = shard_values(shard, at, rows, names, call.topk, limit)
        merged, scored = merge_shards(call.gather(values), made, names)
        ctx.call, ctx.place, ctx.count = call, at, len(tensors)
        norm = [merged.get(name) for name in ("top", "max_logp", "entropy", "count")]
        ctx.save_for_backward(*tensors, rows, scored, *norm)
        ctx.set_materialize_grads(False)
        # The gradient needs the values as they are now, whatever the caller does with his.
        out = tuple(merged[name].clone() for name in call.names)
        fixed = [v for n, v in zip(call.names, out, strict=True) if n not in DIFFERENTIABLE]
        ctx.mark_non_differentiable(*fixed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        tensors = ctx.saved_tensors[: ctx.count]
        rows, scored, top, max_logp, entropy, count = ctx.saved_tensors[ctx.count :]
        needs = ctx.needs_input_grad[2:]
        norm = Normaliser(top, max_logp)
        given = dict(zip(call.names, grads, strict=True))
        weights = coefficients(given, norm, entropy, count, scored)
        shard = call.make(*tensors)
        made = shard_gradient(shard, ctx.place, rows, norm, weights, needs)
        if isinstance(shard, LinearShard) and made[0] is not None:
            whole = call.sum(made[0].to(shard.dtype, copy=True)).to(made[0].dtype)
            made = (whole, *made[1:])
        return None, None, *made


def _check_alone(first: int | None) -> None:
    if first:
        raise ValueError(f"first_column is {first}, but the group has one process, which holds all columns")


def _group_size(group: dist.ProcessGroup | None) -> int:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "there is no process group: call torch.distributed.init_process_group first, or use token_stats"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this process is no member of process_group; call it on the members only")
    return dist.get_world_size(group)
