"""Sums, means and least values over packed spans, and the checks that the family shares."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

EMPTY_MEAN = math.log(1e-6)
"""A mean log-probability [nats] where there is no token; the least that IGSR's delta lets one count."""

EMPTY_SUM = -1000.0
"""A sum of log-probabilities [nats] where there is no token."""

LEAST = -1e6
"""What the logarithm [nats] of a likelihood of 0 counts as, so that differences stay finite."""


def packed(name: str, values: Tensor, offsets: Tensor) -> Tensor:
    """values [T] in fp64. Raises TypeError / ValueError naming what does not fit offsets [S+1]."""
    if not isinstance(values, Tensor) or not values.dtype.is_floating_point or values.ndim != 1:
        raise TypeError(
            f"{name}: got {_shown(values)}, wanted a floating [T] tensor; pack it, or call .float()"
        )
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64 or offsets.ndim != 1:
        raise TypeError(
            f"offsets: got {_shown(offsets)}, wanted an int64 [S+1] tensor; use torch.tensor(...)"
        )
    bounds = offsets.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != len(values) or bounds != sorted(bounds):
        raise ValueError(
            f"offsets: got {bounds[:8]} over {len(values)} tokens, wanted bounds that start at 0, never fall "
            f"and end at {len(values)}; for lengths n use cat([0, cumsum(n)])"
        )
    return values.double()


def packed_logp(logp: Tensor, offsets: Tensor, name: str = "logp") -> Tensor:
    """logp [T] in fp64; +inf, which is no log-probability, is NaN."""
    values = packed(name, logp, offsets)
    return values.masked_fill(values == math.inf, math.nan)


def per_span(name: str, values: Tensor, offsets: Tensor) -> Tensor:
    """values [S] on the device of offsets; TypeError / ValueError for another shape."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: got {type(values).__name__}, wanted an [S] tensor; use torch.tensor(...)")
    if values.shape != (len(offsets) - 1,):
        raise ValueError(
            f"{name}: got shape {list(values.shape)}, wanted [{len(offsets) - 1}], one for each span"
        )
    return values.to(offsets.device)


def members(group: Tensor, offsets: Tensor, group_size: int | None) -> Tensor:
    """Group of each span, [S] numbered from 0. ValueError for a group that has not group_size spans."""
    group = per_span("group", group, offsets)
    if group.dtype.is_floating_point or group.dtype == torch.bool:
        raise TypeError(f"group: got {group.dtype}, wanted integer prompt indices; use group.long()")
    known, inverse, size = torch.unique(group, return_inverse=True, return_counts=True)
    for prompt, count in zip(known.tolist(), size.tolist(), strict=True):
        if group_size is not None and count != group_size:
            raise ValueError(
                f"group: prompt {prompt} has {count} of {group_size} completions here; a group that is split "
                "over processes has to be gathered first, or its prompt kept on one process"
            )
    member: Tensor = inverse
    return member


def span_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """[S]; 0 for an empty span."""
    return torch.segment_reduce(values, "sum", offsets=offsets)


def span_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """[S]; 0 for an empty span."""
    return span_sum(values, offsets) / offsets.diff().clamp(min=1)


def by_span(values: Tensor, offsets: Tensor) -> list[Tensor]:
    """values [T] of each span."""
    bounds = offsets.tolist()
    return [values[start:stop] for start, stop in pairwise(bounds)]


def each_alone(count: int, like: Tensor) -> Tensor:
    """Bounds [count + 1] of spans of one entry each, on the device of `like`."""
    return torch.arange(count + 1, device=like.device)


def as_given(reward: Tensor, like: Tensor) -> Tensor:
    """reward in fp32; in fp64 if `like` is."""
    return reward if like.dtype == torch.float64 else reward.float()


def with_empty(reward: Tensor, offsets: Tensor, empty: float, like: Tensor) -> Tensor:
    """reward [S], `empty` where a span has no tokens; fp64 only if `like` is."""
    return as_given(torch.where(offsets.diff() > 0, reward, empty), like)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    return type(value).__name__
