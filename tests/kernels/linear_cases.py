"""Random rows of hidden states, and what plain PyTorch makes of them: the oracle in fp64, its peers in fp32.

A chain is written token by token, [T, V]: logits, statistics, dz = d objective / d logits, two products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from raise_kernels import reference
from raise_kernels._checks import LogitMap
from tests.budget import floor_of, half_ulp, less_exact, rank_slack, rounding, slope_roundings
from tests.kernels.cases import DTYPES, IGNORED, folded, some_targets, strided

ONE = half_ulp(torch.float32)
Slopes = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # statistics [T] -> d objective / d each of them


class Case(NamedTuple):
    """Arguments of `linear_token_stats`."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    y: Tensor  # [...], or [T] with rows
    rows: Tensor | None  # [T]
    how: LogitMap

    @property
    def low(self) -> torch.dtype:
        """The dtype that dz is rounded to before it is multiplied."""
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `linear_token_stats`, without the implementation and what is wanted."""
        return {"bias": self.bias, "rows": self.rows, **vars(self.how)}


class Tokens(NamedTuple):
    """A case token by token, in one dtype."""

    hidden: Tensor  # [T, D], zeros where the token has no result
    weight: Tensor  # [V', D], the columns of the vocabulary
    bias: Tensor | None
    y: Tensor  # [T]
    n: Tensor  # [T] row of hidden
    spoilt: Tensor  # [T] a NaN or infinity in the row

    def logits(self) -> Tensor:
        x = self.hidden @ self.weight.T
        x = x if self.bias is None else x + self.bias
        return torch.where(self.spoilt[:, None], float("nan"), x)

    def size(self) -> float:
        """Largest sum of magnitudes that a logit is added up from."""
        bias = 0.0 if self.bias is None else self.bias.abs().masked_fill(self.bias.isinf(), 0.0)
        sizes = self.hidden.abs() @ self.weight.abs().T + bias
        return float(sizes.max()) if sizes.numel() else 0.0


@st.composite
def rows_of_hidden(draw: st.DrawFn, every_token: bool = False) -> Case:
    """Hidden states and a head with the shapes, strides, masks and sizes that broke other kernels.

    With `every_token`, all targets are in the vocabulary and unmasked, as a loss wants them.
    """
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lead = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    depth = draw(st.sampled_from([1, 3, 16, 31, 32, 65]))
    vocab = draw(st.one_of(st.sampled_from([1, 2, 63, 64, 65, 257]), st.integers(1, 300)))
    dtype = draw(st.sampled_from(DTYPES))
    mixed = draw(st.sampled_from([False, False, False, True]))
    hidden = torch.randn(*lead, depth, generator=g) * draw(st.sampled_from([0.0, 1.0, 6.0]))
    weight = torch.randn(vocab, depth, generator=g) * draw(st.sampled_from([0.02, 1.0]))
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(vocab, generator=g) + draw(st.sampled_from([0.0, -200.0, 1e4]))
        if draw(st.booleans()):
            bias[torch.rand(vocab, generator=g) < 0.3] = float("-inf")
    how = LogitMap(
        temperature=draw(st.sampled_from([1.0, 0.3, 2.5])),
        logit_scale=draw(st.sampled_from([1.0, 0.0625, 3.0])),
        softcap=draw(st.sampled_from([None, 0.5, 5.0, 30.0])),
        valid_vocab=draw(st.one_of(st.none(), st.integers(1, vocab))),
    )
    if not every_token and draw(st.booleans()):
        # Under a softcap an infinity may come out finite: that is not what "a row without a result" is about.
        bad = [float("nan")] if how.softcap else [float("nan"), float("inf"), float("-inf")]
        hidden[torch.rand(lead, generator=g) < 0.2] = draw(st.sampled_from(bad))
    rows = None
    if draw(st.booleans()):
        total = hidden.shape[:-1].numel()
        rows = torch.randint(0, total, (draw(st.integers(0, 9)),), generator=g)
        if not every_token:
            rows[torch.rand(rows.shape, generator=g) < 0.1] = draw(st.sampled_from([-1, total, 2**40]))
    columns = how.columns(vocab)
    if every_token:
        if bias is not None:
            bias[0] = 1.0
        open_columns = torch.arange(columns) if bias is None else bias[:columns].isfinite().nonzero()[:, 0]
        pick = torch.randint(0, len(open_columns), lead if rows is None else rows.shape, generator=g)
        y = open_columns[pick]
    else:
        y = some_targets(draw, g, columns, lead if rows is None else tuple(rows.shape))
    return Case(
        strided(draw, hidden.to(dtype)),
        strided(draw, weight.to(torch.float32 if mixed else dtype)),
        None if bias is None else bias.to(dtype),
        y,
        rows,
        how,
    )


def by_token(case: Case, dtype: torch.dtype, k: int = 0) -> Tokens:
    """The case token by token; for k > 0 with the terms of each logit in another order."""
    flat = case.hidden.reshape(-1, case.hidden.shape[-1]).to(dtype)
    n = torch.arange(len(flat)) if case.rows is None else case.rows
    y = case.y.reshape(-1)
    inside = (n >= 0) & (n < len(flat))
    y = torch.where(inside | (y == case.how.ignore_index), y, -1)
    h = flat[torch.where(inside, n, 0)] if len(flat) else flat.new_zeros(len(y), flat.shape[-1])
    spoilt = ~h.isfinite().all(-1)
    columns = case.how.columns(len(case.weight))
    order = torch.arange(h.shape[-1]) if k == 0 else torch.randperm(h.shape[-1])
    return Tokens(
        h.masked_fill(spoilt[:, None], 0.0)[:, order],
        case.weight[:columns].to(dtype)[:, order],
        None if case.bias is None else case.bias[:columns].to(dtype),
        y,
        torch.where(inside, n, 0),
        spoilt,
    )


def stats_of(
    case: Case, want: Sequence[str], topk: int = 20
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """(oracle, least exact of its peers, columns that may or may not count in rank), each with y's shape."""
    exact = by_token(case, torch.float64)
    how = folded(case.how, 0)
    oracle = reference.token_stats(exact.logits(), exact.y, how=how, want=want, topk=topk)
    size = exact.size() * how.factors[0] * how.factors[1]
    columns = len(exact.weight)
    worst = {name: (v + floor_of(name, v, size, columns)).float() for name, v in oracle.items()}
    for k in range(3):
        logits = by_token(case, torch.float32, k).logits()
        peer = reference.token_stats(logits, exact.y, how=folded(case.how, k), want=want, topk=topk)
        worst = {name: less_exact(worst[name], peer[name], oracle[name]) for name in oracle}
    z = reference.transform(exact.logits(), how)
    tied = rank_slack(z, exact.y, size, case.hidden.shape[-1] + 1)
    shape = case.y.shape
    oracle = {name: value.view(shape) for name, value in oracle.items()}
    return oracle, {name: value.view(shape) for name, value in worst.items()}, tied.view(shape)


class Gradients(NamedTuple):
    """What backward hands to each input; None where there is no such input."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def gradients_of(
    case: Case, slopes: Slopes, want: Sequence[str], tiles: int = 1, gathered: bool = False
) -> tuple[Gradients, Gradients]:
    """(oracle, least exact of its peers): gradients of what has these slopes in the statistics.

    A peer rounds dz to 16 bits where the operands have 16, as autograd does. tiles: sums of that many tiles
    are added up in the dtype of the weight, one rounding each. gathered: so are the rows of weight and bias,
    one for each token, that autograd hands back.
    """
    exact = by_token(case, torch.float64)
    dz = _dz(case, exact, slopes, want, 0)
    oracle = _products(case, exact, dz, dz)
    a, b = case.how.factors
    # What p owes to its logit's rounding and its own, times the slope of z; then the rounding of dz.
    roundings = 1 + exact.size() * a * b + slope_roundings(case.how.softcap)
    of_dz = (ONE * roundings * _reach(case, exact, slopes, want))[:, None]
    of_dz = of_dz + rounding(dz, case.low if case.low.itemsize == 2 else torch.float32)
    sizes = exact._replace(hidden=exact.hidden.abs(), weight=exact.weight.abs())
    floor = _products(case, sizes, of_dz, of_dz)
    if gathered:
        tiles = len(case.y.reshape(-1)) + 1
    if tiles > 1:
        whole = _products(case, sizes, dz.abs(), dz.abs())
        floor = floor._replace(weight=floor.weight + tiles * rounding(whole.weight, case.weight.dtype))
        if gathered and case.bias is not None and floor.bias is not None and whole.bias is not None:
            floor = floor._replace(bias=floor.bias + tiles * rounding(whole.bias, case.bias.dtype))
    made = []
    for k in range(3):
        part = by_token(case, torch.float32, k)
        fp32 = _dz(case, part, slopes, want, k)
        plain = part if k == 0 else by_token(case, torch.float32)
        made.append(_products(case, plain, fp32, fp32.to(case.low).float()))
    return oracle, Gradients(
        *(_least_exact(*one) for one in zip(case[:3], oracle, floor, *made, strict=True))
    )


def _least_exact(like: Tensor | None, oracle: Tensor | None, floor: Tensor | None, *peers: Tensor | None) -> (
    Tensor | None
):  # fmt: skip
    if like is None or oracle is None or floor is None:
        return None
    worst = (oracle + floor).to(like.dtype)
    for peer in peers:
        assert peer is not None
        worst = less_exact(worst, peer.to(like.dtype), oracle)
    return worst


def _dz(case: Case, tokens: Tokens, slopes: Slopes, want: Sequence[str], k: int) -> Tensor:
    """d objective / d logits [T, V']."""
    leaf = tokens.logits().requires_grad_()
    if not leaf.numel():
        return leaf.detach()
    stats = reference.token_stats(leaf, tokens.y, how=folded(case.how, k), want=want)
    up = slopes({name: value.detach() for name, value in stats.items()})
    return torch.autograd.grad([stats[name] for name in want], leaf, [up[name] for name in want])[0]


def _reach(case: Case, tokens: Tokens, slopes: Slopes, want: Sequence[str]) -> Tensor:
    """Sum over the statistics of |d objective / d statistic| [T], times the slope of z."""
    with torch.no_grad():
        stats = reference.token_stats(tokens.logits(), tokens.y, how=folded(case.how, 0), want=want)
    a, b = case.how.factors
    return a * b * sum(slope.abs().nan_to_num(0.0) for slope in slopes(stats).values())


def _products(case: Case, tokens: Tokens, dz: Tensor, low: Tensor) -> Gradients:
    columns = dz.shape[1]
    on_hidden = dz.new_zeros(case.hidden.shape[:-1].numel(), case.hidden.shape[-1])
    on_hidden.index_add_(0, tokens.n, low @ tokens.weight)
    on_weight = dz.new_zeros(case.weight.shape)
    on_weight[:columns] = low.T @ tokens.hidden
    on_bias = None
    if case.bias is not None:
        on_bias = dz.new_zeros(case.bias.shape)
        on_bias[:columns] = dz.sum(0)
    return Gradients(on_hidden.view(case.hidden.shape), on_weight, on_bias)


__all__ = ["IGNORED", "Case", "Gradients", "gradients_of", "rows_of_hidden", "stats_of"]
