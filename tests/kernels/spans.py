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
def cases(
    draw: st.DrawFn,
    most_groups: int = 3,
    odd: bool = True,
    largest: int = 8,
    longest: int = 9,
    blocks: bool = False,
) -> Case:
    """Spans of 0 to `longest` tokens in interleaved groups of up to `largest`.

    With `odd`, now and then a -inf, NaN or bad score; with `blocks`, adjacent groups of one size.
    """
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = draw(st.integers(0, most_groups))
    sizes = torch.randint(1, largest + 1, (groups,), generator=g)
    if blocks:
        sizes[:] = draw(st.integers(1, largest))
    group = torch.repeat_interleave(torch.arange(groups), sizes) * 7 - 3
    if not blocks and draw(st.booleans()):
        group = group[torch.randperm(len(group), generator=g)]
    lengths = torch.randint(0, draw(st.sampled_from([1, 2, longest + 1])), (len(group),), generator=g)
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


LOGP = [torch.float32, torch.bfloat16, torch.float16]
INDEX = [torch.int64, torch.int32]


@st.composite
def packed(draw: st.DrawFn, blocks: bool = False) -> Case:
    """`cases` with other dtypes and strides, longer spans and several odd tokens.

    No logp is above 0 but +inf, which no softmax gives: its span is NaN.
    """
    largest, longest = draw(st.sampled_from([1, 3, 8, 64])), draw(st.sampled_from([1, 9, 40]))
    case = draw(cases(largest=largest, longest=longest, blocks=blocks))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logp = case.logp.clone()
    odd = [float("-inf"), float("nan"), float("inf"), -0.0]
    for value in draw(st.lists(st.sampled_from(odd), max_size=3)):
        logp[torch.rand(len(logp), generator=g) < 0.05] = value
    logp = one_dimensional(draw, logp.to(draw(st.sampled_from(LOGP))))
    score = case.score.to(draw(st.sampled_from([torch.float32, torch.float32, torch.float64])))
    bounds, group = (x.to(draw(st.sampled_from(INDEX))) for x in (case.offsets, case.group))
    return Case(logp, bounds, score, case.strict, group)


def one_dimensional(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same numbers [T] behind another stride or another start."""
    kind = draw(st.sampled_from(["contiguous", "column", "offset"]))
    if kind == "column":
        wide = torch.full((len(x), 3), float("nan"), dtype=x.dtype)
        wide[:, 1] = x
        return wide[:, 1]
    if kind == "offset":
        flat = torch.full((len(x) + 3,), float("nan"), dtype=x.dtype)
        flat[3:] = x
        return flat[3:]
    return x
