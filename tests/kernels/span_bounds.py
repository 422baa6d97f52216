"""How far fp32 span rewards may be from the definition, counted rounding by rounding.

Unlike a peer's error these bounds hold for each element alone, so that a large reward excuses no other. Each
is to first order, doubled by `bound`. A sum of n numbers loses at most n roundings of their magnitudes, in
any order (Higham, Accuracy and Stability of Numerical Algorithms, 4.2); exp(x) is off by 3 |x| + 4 roundings
of itself (x, log2 e and their product are rounded; exp2 by its own error); numbers are in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raise_kernels import reference
from raise_kernels._checks import BIN_SLACK, MIN_SPREAD, Igsr, Scre
from tests.budget import half_ulp

Parts = reference.Reranked | reference.SpanRewards
ONE = half_ulp(torch.float32)
OWN = 4  # roundings of an elementary function, or of a handful of operations


def bound(roundings: Tensor) -> Tensor:
    """What so many roundings of 1 come to; twice, for what is of second order."""
    return (2 * ONE * roundings).nan_to_num(0.0, 0.0)


class Exact:
    """Packed spans in fp64: what SCRE and the weighted log-probability are made of."""

    def __init__(self, logp: Tensor, offsets: Tensor, how: Scre) -> None:
        self.how = how
        x = logp.detach().double()
        self.spans = reference.spans_of(offsets.long(), len(x))
        # An infinity or a NaN makes its span a known number, which needs no bound.
        self.x = torch.where(x.isfinite(), x, 0.0)
        self.p = torch.where(x == -math.inf, 0.0, self.x.exp())
        self.n = self.spans.lengths.double()
        j = (self.spans.position + how.start).double()
        self.weight = torch.exp(-how.eta * j)
        self.of_weight = 3 * how.eta * j + OWN  # roundings of a weight, of itself
        if how.normalize:
            total = self.spans.sum(self.weight)[self.spans.owner]
            share = self.weight / total
            lost = self.spans.sum(share * self.of_weight) + self.n
            self.weight, self.of_weight = share, self.of_weight + lost[self.spans.owner] + 1

    def span_logp(self) -> Tensor:
        """Roundings of sum_j w_j logp_j, [S]."""
        terms = (self.weight * self.x).abs()
        return self.spans.sum(terms * (self.of_weight + 1)) + (self.n + 1) * self.spans.sum(terms)

    def variance(self) -> Tensor:
        """Roundings of the population variance of p, [S].

        q = 1 - p is off by 2 * OWN roundings of itself; updates of mean and squares, or two passes, by n
        times sqrt(var * mean q^2) <= mean q^2 (Chan, Golub, LeVeque 1983).
        """
        return (2 * self.n + 4 * OWN) * self.spans.mean((1 - self.p) ** 2)

    def exponent(self, reward: Tensor) -> Tensor:
        """Roundings of the logarithm of SCRE, [S]; with them those of its exponential."""
        size = torch.where(reward > 0, reward.clamp(min=1e-300).log().abs(), 0.0)
        return self.span_logp() + self.how.lam * self.variance() + 3 * size + OWN

    def scre(self, reward: Tensor) -> Tensor:
        """Roundings of SCRE, whose exact values are `reward` [S]."""
        return reward.nan_to_num() * self.exponent(reward)

    def scre_slope(self, reward: Tensor, autograd: bool) -> Tensor:
        """Roundings of d SCRE / d logp [T]: reward * (w - 2 lam / n * p * (p - mean p)).

        autograd: p, the derivative of expm1, is its result + 1, off by a rounding of 1 or two.
        """
        owner = self.spans.owner
        n = self.n[owner].clamp(min=1)
        q = 1 - self.p
        mean = self.spans.mean(q)[owner]
        steep = 2 * self.how.lam / n * self.p
        inside = self.weight * self.of_weight + steep * (n + 3 * self.x.abs() + 2 * OWN) * (q + mean)
        if autograd:
            inside = inside + 2 * 2 * self.how.lam / n * (q - mean).abs()
        whole = (self.weight + steep * (q - mean).abs()) * (self.exponent(reward)[owner] + OWN)
        return reward.nan_to_num()[owner] * (inside + whole)

    def span_logp_slope(self) -> Tensor:
        """Roundings of d sum_j w_j logp_j / d logp [T]."""
        return self.weight * (self.of_weight + 1)

    def nll(self, delta: float) -> Tensor:
        """Roundings of e = mean -log(p + delta), [S].

        A term is the larger of log p and log delta, which is rounded, and log(1 + t) of t = exp(-gap) <= 1.
        """
        size, of_delta = (self.p + delta).log().abs(), math.log(delta)
        gap = (torch.where(self.p > 0, self.x, -1e4) - of_delta).abs()
        t = (-gap).exp()
        of_delta_too = torch.where(self.p < delta, 1.0, t) * abs(of_delta)
        terms = (self.n[self.spans.owner] + 2) * size + t * (3 * gap + 2 * OWN) + of_delta_too
        return self.spans.mean(terms)


def _most(values: Tensor, where: Tensor) -> Tensor:
    """Largest of values [S] among the spans of each row of where [S, S]; 0 where there are none."""
    if not len(values):
        return values
    found = torch.where(where, values[None, :], -math.inf).amax(1)
    return torch.where(where.any(1), found, 0.0)


class Ranked:
    """Bounds, [S] each, of IGSR, whose exact parts are given, and of what it rests on."""

    def __init__(self, exact: Exact, score: Tensor, group: Tensor, parts: Parts, how: Igsr) -> None:
        self.how, self.bin = how, parts.bin
        member = parts.bin >= 0
        pair = member[:, None] & member[None, :] & (group[:, None] == group[None, :])
        same = pair & (parts.bin[:, None] == parts.bin[None, :])
        self.nll = bound(exact.nll(how.delta))

        e = parts.nll.nan_to_num()
        off = _most(self.nll + bound(e.abs()), same)
        spread = _most(e, same) + _most(-e, same)
        # mid - e and the spread are each off by twice as much as the e of the bin.
        c = 4 * off / spread.clamp(min=MIN_SPREAD) + bound(torch.full_like(e, OWN))
        low = ((parts.bin.double() - BIN_SLACK) * how.tau).clamp(0, 1)
        reach = 1 - low if how.variant == "paper" else torch.full_like(e, 2 * how.tau)
        self.bonus = torch.where(member, c.clamp(max=1.0) * reach + bound(torch.full_like(e, 2 * OWN)), 0.0)
        # An exact threshold may be met or missed.
        self.edge = member & ((parts.bonus - how.threshold).abs() <= self.bonus) & (how.variant == "paper")
        given = torch.where(parts.applied | self.edge, self.bonus, 0.0)
        high = (low + (1 + 2 * BIN_SLACK) * how.tau).clamp(max=1)
        square = high * given + bound(2 * OWN * high * high)
        reward = parts.reward.nan_to_num()
        root = torch.minimum(square / reward.clamp(min=1e-300), square.sqrt())
        self.reward = torch.where(member, root, 0.0)
        # A score whose quotient by tau may round over a border makes the bins of its group uncertain.
        ratio = score.double() / how.tau + BIN_SLACK
        near = ((ratio - ratio.round()).abs() <= bound(OWN * (1 + ratio.abs()))) & (score > 0)
        self.unsure = (near[None, :] & (group[:, None] == group[None, :])).any(1)
