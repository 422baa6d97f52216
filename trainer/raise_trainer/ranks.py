"""Sums over the processes of a run. All of them call every function, in one order, whatever they hold."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import distributed as dist
from torch import nn

from .checkpoints.ranks import gather, rank, size

__all__ = ["gather", "joined", "mean", "rank", "size", "sum_gradients", "totals"]
BUCKET = 1 << 26  # elements summed by one call


def totals(*values: float) -> tuple[float, ...]:
    """The sum of each value over the processes."""
    return tuple(map(sum, zip(*gather(values), strict=True)))


def joined(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums of figures that are shares of one step, over its parts and the processes; maxima of `*_max`."""
    found = dict[str, float]()
    for part in (p for own in gather(list(parts)) for p in own):
        for name, value in part.items():
            if name.endswith("_max"):
                found[name] = max(found.get(name, value), value)
            else:
                found[name] = found.get(name, 0.0) + value
    return found


def mean(figures: Mapping[str, float], weight: float) -> dict[str, float]:
    """Means over the processes, each weighted by what it counted; a process with weight 0 has no say."""
    known = [(f, w) for f, w in gather((dict(figures), weight)) if w > 0]
    total = sum(w for _, w in known)
    return {k: sum(f[k] * w for f, w in known) / total for k in (known[0][0] if known else {})}


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes in place; a missing one counts as 0, also for one process.

    Those of shards (DTensors) are sums already.
    """
    bucket, filled = list[torch.Tensor](), 0
    for p in parameters:
        if p.grad is None:
            # of weights whose gradient may be of any dtype it is fp32 (`adamw.MasterAdamW`)
            p.grad = torch.zeros_like(p, dtype=torch.float32 if p.grad_dtype is None else p.grad_dtype)
        if size() == 1 or hasattr(p, "to_local"):
            continue
        if bucket and (filled + p.numel() > BUCKET or p.grad.dtype != bucket[0].dtype):
            _sum(bucket)
            bucket, filled = [], 0
        bucket.append(p.grad)
        filled += p.numel()
    if bucket:
        _sum(bucket)


def _sum(gradients: Sequence[torch.Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))
