"""Packed spans in plain torch: which span each token belongs to, sums and means over spans."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Per-token view of packed spans. Bounds that do not fit, which only a device knows, are told apart."""

    owner: Tensor  # [T] span of each token
    position: Tensor  # [T] in that span, from 0
    lengths: Tensor  # [S]
    inside: Tensor  # [T] bool: the token lies in a span at all
    fits: Tensor  # [S] bool: the span lies in [0, T], and all of its tokens are its own

    def sum(self, values: Tensor) -> Tensor:
        """Sum of values [T] over each span, [S]; 0 for an empty span."""
        kept = torch.where(self.inside, values, 0.0)
        return values.new_zeros(len(self.lengths)).index_add(0, self.owner, kept)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of values [T] over each span, [S]; 0 for an empty span."""
        return self.sum(values) / self.lengths.clamp(min=1)


def spans_of(offsets: Tensor, tokens: int) -> Spans:
    """CSR bounds [S+1] of `tokens` packed tokens as per-token indices; S = 0 has no tokens."""
    first, end = offsets[:-1], offsets[1:]
    t = torch.arange(tokens, device=offsets.device)
    # The spans that end at or before a token; unlike repeat_interleave this can be traced.
    owner = torch.searchsorted(end.cummax(0).values, t, right=True).clamp(max=max(len(end) - 1, 0))
    inside = (t >= first[owner]) & (t < end[owner])
    owned = torch.zeros_like(end).index_add(0, owner, inside.to(end.dtype))
    fits = (first >= 0) & (end <= tokens) & (owned == end - first)
    return Spans(owner, torch.where(inside, t - first[owner], 0), end - first, inside, fits)
