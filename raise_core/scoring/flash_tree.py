"""Attention over a packed tree from FlashAttention calls that are merged by their log-sum-exps.

A query sees the keys of its own node up to itself, and all keys of each ancestor. So one causal call takes
every node by itself, and for each node that others follow one full call takes all their queries against its
keys, which are adjacent rows in depth-first order: a prompt's keys are read once for the whole group and are
never copied. Parts o_a with log-sum-exps l_a are joined as

    l = log Σ_a exp(l_a)        o = Σ_a exp(l_a - l) o_a

The softmax of any part is exp(s - l) with the joined l, and the row sums of dO * O are those of the joined O.
So each part's gradient is FlashAttention's own, given the joined output and log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
Three = tuple[Tensor, Tensor, Tensor]


class Flash(Protocol):
    """Attention kernels over packed rows: query [Lq, H, E], key and value [Lk, Hk, E], lse [Lq, H] in nats.

    `causal`: sequences of `lengths` rows, each by itself (Lq = Lk); without `lengths` every query sees every
    key. `kept` is what the backward call wants to have back.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None, scale: float
    ) -> tuple[Tensor, Tensor, Any]:
        """Output [Lq, H, E], log-sum-exp [Lq, H], kept."""

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int] | None,
        scale: float,
        kept: Any,
    ) -> Three:
        """Gradients of q, k and v."""


class CpuFlash:
    """PyTorch's FlashAttention for the CPU; neighbours of one length share a call."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None, scale: float
    ) -> tuple[Tensor, Tensor, Any]:
        """Output, log-sum-exp, nothing kept."""
        call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if lengths is None:
            out, lse = call(_batch(q, 1), _batch(k, 1), _batch(v, 1), scale=scale)
            return _rows(out), lse[0].T, None
        out = q.new_empty(len(q), q.shape[1], v.shape[2])
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, count in _runs(lengths):
            part, part_lse = call(*(_batch(x[rows], count) for x in (q, k, v)), is_causal=True, scale=scale)
            out[rows] = _rows(part)
            lse[rows] = part_lse.transpose(1, 2).flatten(0, 1)
        return out, lse, None

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int] | None,
        scale: float,
        kept: Any,
    ) -> Three:
        """Gradients of q, k and v."""
        call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        if lengths is None:
            inputs = [_batch(x, 1) for x in (grad, q, k, v, out)]
            dq, dk, dv = call(*inputs, lse.T[None], 0.0, False, scale=scale)
            return _rows(dq), _rows(dk), _rows(dv)
        found = tuple(torch.empty_like(x) for x in (q, k, v))
        for rows, count in _runs(lengths):
            inputs = [_batch(x[rows], count) for x in (grad, q, k, v, out)]
            part_lse = lse[rows].view(count, -1, lse.shape[1]).transpose(1, 2)
            for whole, part in zip(found, call(*inputs, part_lse, 0.0, True, scale=scale), strict=True):
                whole[rows] = _rows(part)
        dq, dk, dv = found
        return dq, dk, dv


def _runs(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Rows of neighbours of one length, and how many they are."""
    start = 0
    for n, run in groupby(lengths):
        count = len(list(run))
        yield slice(start, start + n * count), count
        start += n * count


def _batch(x: Tensor, count: int) -> Tensor:
    """[count * n, H, E] as [count, H, n, E], without a copy."""
    return x.view(count, -1, *x.shape[1:]).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """[count, H, n, E] as [count * n, H, E]."""
    return x.transpose(1, 2).flatten(0, 1)


class GpuFlash:
    """PyTorch's FlashAttention 2 for GPUs (fp16 and bf16); nodes of any lengths share a call."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None, scale: float
    ) -> tuple[Tensor, Tensor, Any]:
        """Output, log-sum-exp, the kernel's own random state (unused without dropout)."""
        bounds, longest = self._bounds(q, k, lengths)
        out, lse, *rest = torch.ops.aten._flash_attention_forward(
            q, k, v, *bounds, *longest, 0.0, lengths is not None, False, scale=scale
        )
        return out, lse.T, rest[:2]

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int] | None,
        scale: float,
        kept: Any,
    ) -> Three:
        """Gradients of q, k and v."""
        bounds, longest = self._bounds(q, k, lengths)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse.T.contiguous(), *bounds, *longest, 0.0, lengths is not None,
            *kept, scale=scale,
        )  # fmt: skip
        return dq, dk, dv

    @staticmethod
    def _bounds(
        q: Tensor, k: Tensor, lengths: Sequence[int] | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Offsets [sequences + 1] of queries and keys, and the longest of each."""
        if lengths is not None:
            offsets = _offsets(tuple(lengths), q.device)
            return (offsets, offsets), (max(lengths), max(lengths))
        return (_offsets((len(q),), q.device), _offsets((len(k),), q.device)), (len(q), len(k))


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 on the device, copied there once for all layers."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


@dataclass(frozen=True)
class Plan:
    """A tree as calls: lengths of the nodes that have queries, and the (queries, keys) of each full call.

    cached: leading keys without queries; they belong to no causal call.
    """

    lengths: tuple[int, ...]
    across: tuple[tuple[slice, slice], ...]
    cached: int


@lru_cache(maxsize=64)
def plan(lengths: tuple[int, ...], parents: tuple[int, ...], cached: int) -> Plan:
    """The calls of a layout (see `Layout`), whose nodes come in depth-first order."""
    if cached > 1:
        raise ValueError(f"cached: got {cached} nodes, wanted none or one prompt")
    line = list[int]()  # what the next node may follow
    for node, parent in enumerate(parents):
        if parent >= 0 and parent not in line:
            raise ValueError(f"parents[{node}]: got {parent}, wanted depth-first order")
        line = [*line[: line.index(parent) + 1 if parent >= 0 else 0], node]
    starts = [0, *accumulate(lengths)]
    before = starts[cached]
    stop = list(range(1, len(lengths) + 1))  # one past the last node that follows this one
    for node in reversed(range(len(lengths))):
        if parents[node] >= 0:
            stop[parents[node]] = max(stop[parents[node]], stop[node])
    across = [
        (slice(max(starts[node + 1], before) - before, starts[end] - before), slice(*starts[node : node + 2]))
        for node, end in enumerate(stop)
        if starts[end] > max(starts[node + 1], before)
    ]
    return Plan(lengths[cached:], tuple(across), before)


def flash_for(q: Tensor, k: Tensor, v: Tensor, *, gqa: bool) -> Flash | None:
    """The kernels for these tensors, None where there are none."""
    if not q.dtype == k.dtype == v.dtype or q.shape[-1] != v.shape[-1] or len(q) != 1:
        return None
    if q.device.type == "cpu":
        return CpuFlash()
    if q.device.type == "cuda" and q.dtype in HALF and q.shape[-1] % 8 == 0:
        params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, gqa)
        return GpuFlash() if torch.backends.cuda.can_use_flash_attention(params) else None
    return None


class TreeAttention(torch.autograd.Function):
    """q [Lq, H, E]; k, v [Lk, Hk, E] -> [Lq, H, E]."""

    @staticmethod
    def forward(ctx: Any, kernels: Flash, calls: Plan, scale: float, *qkv: Tensor) -> Tensor:
        """Parts joined in fp32 or better, rounded once."""
        q, k, v = qkv
        out, lse, own = kernels.forward(q, k[calls.cached :], v[calls.cached :], calls.lengths, scale)
        kept = [own]
        joined = out.float() if q.dtype in HALF and calls.across else out
        for rows, keys in calls.across:
            part, part_lse, state = kernels.forward(q[rows], k[keys], v[keys], None, scale)
            kept.append(state)
            both = torch.logaddexp(lse[rows], part_lse)
            joined[rows] *= (lse[rows] - both).exp_()[..., None]
            joined[rows] += part * (part_lse - both).exp_()[..., None]
            lse[rows] = both
        out = joined.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernels, ctx.calls, ctx.scale, ctx.kept = kernels, calls, scale, kept
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Each part's gradient with the joined output and log-sum-exp."""
        q, k, v, out, lse = ctx.saved_tensors
        kernels, calls = ctx.kernels, ctx.calls
        after = slice(calls.cached, None)
        own, *kept = ctx.kept
        dq, *found = kernels.backward(grad, q, k[after], v[after], out, lse, calls.lengths, ctx.scale, own)
        dk, dv = (_with_room(part, calls.cached) for part in found)
        for (rows, keys), state in zip(calls.across, kept, strict=True):
            more = kernels.backward(
                grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], None, ctx.scale, state
            )
            dq[rows] += more[0]
            dk[keys] += more[1]
            dv[keys] += more[2]
        return None, None, None, dq, dk, dv


def _with_room(grad: Tensor, cached: int) -> Tensor:
    """The gradient with zeros for the cached keys before it."""
    return torch.cat([grad.new_zeros(cached, *grad.shape[1:]), grad]) if cached else grad


def tree_attention(kernels: Flash, calls: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[1, H, Lq, E] and [1, Hk, Lk, E] to [1, H, Lq, E]."""
    # The CPU's kernel lays its output out as the query lies, and writes it as if columns were adjacent.
    rows = [(x if x.stride(-1) == 1 else x.contiguous())[0].transpose(0, 1) for x in (q, k, v)]
    out: Tensor = TreeAttention.apply(kernels, calls, scale, *rows)
    return out.transpose(0, 1)[None]
