"""Random packed spans with scores and groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


class Case(NamedTuple):
    logp: Tensor  # [T]
    offsets: Tensor  # [S + 1]
    score: Tensor  # [S]
    strict: Tensor  # [S]
    group: Tensor  # [S]


@st.composite
def cases(draw: st.DrawFn, most_groups: int = 3, odd: bool = True) -> Case:
    """Spans of 0 to 9 tokens in interleaved groups; with `odd`, now and then a -inf, NaN or bad score."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = draw(st.integers(0, most_groups))
    group = torch.repeat_interleave(torch.arange(groups), torch.randint(1, 9, (groups,), generator=g)) * 7 - 3
    if draw(st.booleans()):
        group = group[torch.randperm(len(group), generator=g)]
    lengths = torch.randint(0, draw(st.sampled_from([1, 2, 10])), (len(group),), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    logp = -torch.rand(int(lengths.sum()), generator=g) * draw(st.sampled_from([1e-7, 1e-3, 1.0, 30.0]))
    score = torch.rand(len(group), generator=g)
    kind = draw(st.sampled_from(["uniform", "near one", "tenths", "two values"]))
    if kind == "near one":
        score = 1 - score / 50
    elif kind == "tenths":
        score = (score * 11).floor() / 10
    elif kind == "two values":
        score = torch.where(score < 0.5, 0.3, 0.8)
    score = torch.where(torch.rand(score.shape, generator=g) < 0.1, 0.0, score)
    if odd and len(logp) and draw(st.booleans()):
        logp[int(torch.randint(len(logp), (), generator=g))] = draw(
            st.sampled_from([float("-inf"), float("nan"), 0.0])
        )
    if odd and len(score) and draw(st.booleans()):
        score[0] = draw(st.sampled_from([float("nan"), -0.1, 1.5, 1.0]))
    strict = torch.rand(score.shape, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return Case(logp, offsets, score, strict, group)
