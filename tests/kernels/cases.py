"""Implementations under test, the peer they are judged by, and random rows of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from raise_kernels import native, reference, token_stats
from raise_kernels._checks import PLAIN, STATS, LogitMap
from tests.budget import (
    assert_rank,
    assert_within_error_budget,
    floor_of,
    half_ulp,
    less_exact,
    rank_slack,
    slope_roundings,
)

Stats = Callable[..., dict[str, Tensor]]
IMPLS: dict[str, Stats] = {
    "reference": reference.token_stats,
    "native": native.token_stats,
    "triton": token_stats.token_stats,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100


def names_of(impl: str) -> tuple[str, ...]:
    """What most tests ask for: test_token_topk.py has the one that takes the interpreter long."""
    return tuple(n for n in STATS if impl != "triton" or n != "topk_logp_mean")


def permuted_peers(
    logits: Tensor, y: Tensor, oracle: dict[str, Tensor], how: LogitMap, **kwargs: Any
) -> dict[str, Tensor]:
    """fp32 PyTorch on the same numbers, several ways: of each element the least exact result.

    The error of a single run can be small by luck. The ways differ in the order of the columns and in how
    the temperature is applied. Of equal logits every order gives the same: all ways may have luck, and none
    is taken to be better than `floor_of`.
    """
    columns = how.columns(logits.shape[-1])
    size = size_of_z(logits, how)
    worst = {name: (v + floor_of(name, v, size, columns)).float() for name, v in oracle.items()}
    for k in range(3):
        order = torch.arange(columns) if k == 0 else torch.randperm(columns)
        place = torch.empty_like(order)
        place[order] = torch.arange(columns)
        inside = (y >= 0) & (y < columns)
        moved = torch.where(inside, place[y.clamp(0, columns - 1)], y)
        peer = reference.token_stats(logits[..., :columns][..., order], moved, how=folded(how, k), **kwargs)
        worst = {name: less_exact(worst[name], value, oracle[name]) for name, value in peer.items()}
    return worst


def size_of_z(logits: Tensor, how: LogitMap) -> float:
    """Largest finite |z|, and 0 where z is the logit itself, which nothing rounds."""
    if how.factors == (1.0, 1.0) and how.softcap is None:
        return 0.0
    z = reference.transform(logits.detach().double(), how)
    return float(z.abs().masked_fill(~z.isfinite(), 0.0).max()) if z.numel() else 0.0


def ties(logits: Tensor, y: Tensor, how: LogitMap, rows: Tensor | None) -> Tensor:
    """Columns that the rounding of z may move past the target's, shaped as y; none where z is the logit."""
    if not size_of_z(logits, how):
        return torch.zeros_like(y)
    z = reference.transform(logits.detach().double().reshape(-1, logits.shape[-1]), how)
    if rows is not None:
        inside = (rows >= 0) & (rows < len(z))
        z, y = z[torch.where(inside, rows, 0)], torch.where(inside, y, -1)
    return rank_slack(z, y.reshape(-1), 0.0, 0).view(y.shape)


def folded(how: LogitMap, k: int) -> LogitMap:
    """`how` on the valid columns alone; for k > 0 with the temperature folded into the other factors."""
    t = 1.0 if k == 0 else how.temperature * (1 + (k - 1) * half_ulp(torch.float32))
    return LogitMap(
        temperature=how.temperature if k == 0 else 1.0,
        logit_scale=how.logit_scale / t,
        softcap=None if how.softcap is None else how.softcap / t,
        ignore_index=how.ignore_index,
    )


def judge(
    impl: str,
    logits: Tensor,
    y: Tensor,
    *,
    how: LogitMap = PLAIN,
    want: Sequence[str] | None = None,
    **kw: Any,
) -> dict[str, Tensor]:
    """Run `impl` and hold every statistic to its budget."""
    want = names_of(impl) if want is None else want
    oracle = reference.token_stats(logits.double(), y, how=how, want=want, **kw)
    peer = permuted_peers(logits, y, oracle, how, want=want, **kw)
    actual = IMPLS[impl](logits, y, how=how, want=want, **kw)
    for name in want:
        assert actual[name].dtype == torch.float32
        if name == "rank":
            assert_rank(actual[name], oracle[name], ties(logits, y, how, kw.get("rows")), name=f"{impl} rank")
        else:
            assert_within_error_budget(actual[name], oracle[name], peer[name], name=f"{impl} {name}")
    return actual


def gradient(stats: Stats, logits: Tensor, y: Tensor, upstream: dict[str, Tensor], **kw: Any) -> Tensor:
    """d (sum of upstream * statistic) / d logits, whose strides are kept."""
    leaf = logits.detach().requires_grad_()
    out = stats(leaf, y, want=tuple(upstream), **kw)
    values = [out[name] for name in upstream]
    return torch.autograd.grad(values, [leaf], [upstream[n].to(out[n].dtype) for n in upstream])[0]


def judge_gradient(
    impl: str, logits: Tensor, y: Tensor, up: dict[str, Tensor], how: LogitMap = PLAIN, **kw: Any
) -> Tensor:
    """Hold d (sum of up * statistics) / d logits of `impl` to the budget of fp32 autograd."""
    actual = gradient(IMPLS[impl], logits, y, up, how=how, **kw)
    assert actual.dtype == logits.dtype and actual.shape == logits.shape
    oracle, worst = gradient_budget(logits, y, up, how, **kw)
    assert_within_error_budget(actual, oracle, worst, name=f"{impl} gradient of {tuple(up)}")
    return actual


def gradient_budget(
    logits: Tensor, y: Tensor, up: dict[str, Tensor], how: LogitMap = PLAIN, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(oracle, least exact of its peers) of d (sum of up * statistics) / d logits."""
    named = {} if rows is None else {"rows": rows}
    oracle = gradient(reference.token_stats, logits.double(), y, up, how=how, **named)
    columns = how.columns(logits.shape[-1])
    # p is rounded at 1, z at its size; every upstream gradient and the slope of z multiply that
    reach = upstream_of_rows(logits, up, rows) * how.factors[0] * how.factors[1]
    roundings = 1 + size_of_z(logits, how) + slope_roundings(how.softcap)
    worst = (oracle + half_ulp(torch.float32) * roundings * reach).to(logits.dtype)
    for k in range(3):
        peer = torch.zeros_like(oracle)
        part = gradient(
            reference.token_stats, logits[..., :columns].float(), y, up, how=folded(how, k), **named
        )
        peer[..., :columns] = part.double()
        worst = less_exact(worst, peer.to(logits.dtype), oracle)
    return oracle, worst


def upstream_of_rows(logits: Tensor, up: dict[str, Tensor], rows: Tensor | None) -> float:
    """The most that |up| of all statistics adds up to over the tokens of one row."""
    each = sum(u.abs().double().reshape(-1) for u in up.values())
    assert isinstance(each, Tensor)
    if not each.numel():
        return 0.0
    if rows is None:
        return float(each.max())
    total = logits.shape[:-1].numel()
    inside = (rows >= 0) & (rows < total)
    return float(each.new_zeros(total + 1).index_add(0, torch.where(inside, rows, total), each)[:-1].max())


def some_targets(draw: st.DrawFn, g: torch.Generator, vocab: int, shape: tuple[int, ...]) -> Tensor:
    """Targets of which some are ignored and some lie outside the vocabulary."""
    y = torch.randint(0, vocab, shape, generator=g)
    y = torch.where(torch.rand(shape, generator=g) < 0.15, IGNORED, y)
    return torch.where(torch.rand(shape, generator=g) < 0.1, draw(st.sampled_from([-1, vocab, 2**40])), y)


@st.composite
def rows_of_logits(draw: st.DrawFn, largest: int = 700) -> tuple[Tensor, Tensor, LogitMap]:
    """Logits with shapes, strides, masks and sizes that broke other kernels, their targets, a LogitMap."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lead = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    vocab = draw(st.one_of(st.sampled_from([1, 2, 63, 64, 65, 512, 513]), st.integers(1, largest)))
    spread = draw(st.sampled_from([0.0, 1.0, 5.0, 40.0]))
    x = torch.randn(*lead, vocab, generator=g) * spread + draw(st.sampled_from([0.0, -200.0, 1e4, -1e4]))
    if draw(st.booleans()):
        x[..., int(torch.randint(vocab, (), generator=g))] += draw(st.sampled_from([20.0, 200.0]))
    mask = draw(st.sampled_from(["none", "some", "first half", "rows"]))
    if mask == "some":
        x[torch.rand(x.shape, generator=g) < 0.3] = float("-inf")
    elif mask == "first half":
        x[..., : vocab // 2] = float("-inf")
    elif mask == "rows":
        x[torch.rand(x.shape[:-1], generator=g) < 0.3] = draw(
            st.sampled_from([float("-inf"), float("nan"), float("inf")])
        )
    y = some_targets(draw, g, vocab, tuple(lead))
    how = LogitMap(
        temperature=draw(st.sampled_from([1.0, 0.3, 2.5])),
        logit_scale=draw(st.sampled_from([1.0, 0.0625, 3.0])),
        softcap=draw(st.sampled_from([None, 0.5, 5.0, 30.0])),
        valid_vocab=draw(st.one_of(st.none(), st.integers(1, vocab))),
    )
    return strided(draw, x.to(draw(st.sampled_from(DTYPES)))), y, how


def strided(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same numbers behind other strides."""
    kind = draw(st.sampled_from(["contiguous", "padded", "transposed", "offset", "every other"]))
    if kind == "padded":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), float("nan"), dtype=x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if kind == "transposed":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "offset":
        flat = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype)
        flat[3:] = x.reshape(-1)
        return flat[3:].view(x.shape)
    if kind == "every other" and x.dim() > 1:
        wide = torch.full((2 * x.shape[0], *x.shape[1:]), float("nan"), dtype=x.dtype)
        wide[1::2] = x
        return wide[1::2]
    return x
