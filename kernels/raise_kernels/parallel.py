"""Token statistics of a vocabulary that is cut into shards: what one shard gives, and how shards are joined.

A shard is described by one tensor [F, T], whose rows `fields` names. "owner" comes first: 1 where the shard
holds the target, 0 where it does not, -1 where the target is ignored. The others are what `merge` needs. The
gradient of a shard needs its own columns and the log-normaliser of the whole row, and no other shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from raise_kernels._backward import Coefficients, Engine, LinearEngine, Normaliser
from raise_kernels._checks import LogitMap
from raise_kernels._layout import block_rows
from raise_kernels._maps import wide_dtype
from raise_kernels.merge import merge_parts, part_names

NOBODY = -1  # local target of a token that is not scored
COLUMNS = 8192  # of a tile of logits from hidden states, where columns are looked at one by one
Gradients = tuple[Tensor | None, ...]


def fields(names: Sequence[str], topk: int) -> tuple[str, ...]:
    """What the rows of a shard's tensor are, for `names` to be merged."""
    return ("owner", *part_names(names, topk))


class Place(NamedTuple):
    """Where a shard lies, and where its targets do."""

    columns: int  # that belong to the vocabulary; the rest is padding
    y: Tensor  # [T] the column nearest to the target, NOBODY where there is nothing to score
    owner: Tensor  # [T] bool: the target is a column of this shard
    ignored: Tensor  # [T] bool
    how: LogitMap  # of the shard alone


class Shard(Protocol):
    """Columns of logits, stored or made from hidden states, and what computes on them."""

    @property
    def width(self) -> int:
        """Columns, padding included."""

    @property
    def row_count(self) -> int:
        """Rows of the flattened leading axes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""

    def stats(self, at: Place, rows: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Every name [T] of an engine, of the shard's columns alone."""

    def target_logits(self, at: Place, rows: Tensor | None) -> Tensor:
        """Raw logit [T] of each target that this shard holds, 0 for the others."""

    def tiles(self, tokens: Tensor, at: Place, rows: Tensor | None) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(some of the tokens, first column, raw logits [tokens, columns]) until all columns were seen."""

    def gradient(
        self, at: Place, rows: Tensor | None, norm: Normaliser, weights: Coefficients, needs: Sequence[bool]
    ) -> Gradients:
        """Gradients of the tensors that the shard was made from, None where not needed."""


def place(shard: Shard, targets: Tensor, rows: Tensor | None, first: int, how: LogitMap) -> Place:
    """The shard that starts at column `first` of the vocabulary that `how` and targets [T] refer to."""
    whole = first + shard.width if how.valid_vocab is None else how.valid_vocab
    columns = min(max(whole - first, 0), shard.width)
    ignored = targets == how.ignore_index
    known = ~ignored & (targets >= 0)
    if how.valid_vocab is not None:
        known &= targets < how.valid_vocab
    if rows is not None:
        known &= (rows >= 0) & (rows < shard.row_count)
    nearest = (targets - first).clamp(0, max(columns - 1, 0))
    owner = known & (targets - first == nearest) & (columns > 0)
    local = replace(how, valid_vocab=max(columns, 1), ignore_index=NOBODY)
    return Place(columns, torch.where(known, nearest, NOBODY), owner, ignored, local)


def shard_values(
    shard: Shard,
    at: Place,
    rows: Tensor | None,
    names: Sequence[str],
    topk: int,
    target_logit: Tensor | None,
) -> Tensor:
    """The shard's tensor [F, T], `fields` by name. target_logit [T]: raw, of every target; rank needs it."""
    values = {"owner": torch.where(at.ignored, -1.0, at.owner.to(shard.dtype))}
    needed = part_names(names, topk)
    if at.columns:
        values |= shard.stats(at, rows, tuple(n for n in needed if n != "rank" and not n.startswith("best")))
    else:
        nothing = torch.zeros_like(values["owner"])
        values |= {name: nothing - math.inf if name == "top" else nothing for name in needed}
    if {"rank", "topk_logp_mean"} & set(names):
        limit = target_logit if "rank" in names else None
        values |= _looked_at(shard, at, rows, limit, topk if "topk_logp_mean" in names else 0)
    return torch.stack([values[name].to(shard.dtype) for name in fields(names, topk)])


def _looked_at(
    shard: Shard, at: Place, rows: Tensor | None, limit: Tensor | None, topk: int
) -> dict[str, Tensor]:
    """ "rank" [T] where there is a limit, and `best0`, ... [T]: what takes a second look at the columns."""
    count = len(at.y)
    rank = torch.zeros(count, dtype=torch.int64, device=at.y.device)
    best = torch.full((count, topk), -math.inf, dtype=shard.dtype, device=at.y.device)
    tokens = (at.y != NOBODY).nonzero()[:, 0]
    for some, start, x in shard.tiles(tokens, at, rows) if at.columns else ():
        if limit is not None:
            above = x > limit[some, None]
            if at.how.softcap is not None:
                # What saturates is equal.
                above &= _to_z64(x, at.how) > _to_z64(limit[some, None], at.how)
            own = (at.y[some] - start).clamp(0, x.shape[1] - 1)
            itself = above.gather(1, own[:, None])[:, 0] & at.owner[some] & (at.y[some] - start == own)
            rank[some] += above.sum(-1) - itself.long()
        if topk:
            best[some] = torch.cat([best[some], x], -1).topk(topk).values
    z = _to_z64(best, at.how)
    # Below the largest: rounded to fp32, z itself would lose what its size costs.
    below = torch.where(best > -math.inf, z - z[:, :1], -math.inf)
    out = {f"best{k}": column for k, column in enumerate(below.unbind(1))}
    return out if limit is None else out | {"rank": rank}


def _to_z64(x: Tensor, how: LogitMap) -> Tensor:
    """z of raw logits as float64: a product rounded as engines round it, a softcap not rounded at all.

    Rounded to fp32, what a vector loop and its end make of a float64 tanh is the same.
    """
    a, b = how.factors
    if how.softcap is None:
        return (a * x).double()
    x = x.double()
    return torch.where(x == -math.inf, x, b * torch.tanh(a * x))


def merge_shards(
    values: Sequence[Tensor], made: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """(each of `names` [T], whether a token is scored) from tensors [F, T], whose rows are `made`."""
    stacked = torch.stack(list(values), 1)
    parts = dict(zip(made, stacked, strict=True))
    owner = parts.pop("owner")
    scored = owner[0] >= 0
    merged = merge_parts(parts, owner == 1, names)
    return {name: torch.where(scored, value, 0.0) for name, value in merged.items()}, scored


def shard_gradient(
    shard: Shard,
    at: Place,
    rows: Tensor | None,
    norm: Normaliser,
    weights: Coefficients,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of the shard's own tensors for the normaliser and the weights [T] of the whole rows."""
    here = weights._replace(on_target=torch.where(at.owner, weights.on_target, 0.0))
    return shard.gradient(at, rows, norm, here, needs)


@dataclass(frozen=True)
class LogitShard:
    """logits [..., V_k], and the engine for them."""

    engine: Engine
    logits: Tensor

    @property
    def width(self) -> int:
        """V_k."""
        return self.logits.shape[-1]

    @property
    def row_count(self) -> int:
        """Rows of the flattened leading axes."""
        return self.logits.shape[:-1].numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""
        return wide_dtype(self.logits)

    def stats(self, at: Place, rows: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Every name [T] of an engine, of the shard's columns alone."""
        return self.engine.forward(self.logits, at.y, rows, at.how, names, 1)

    def _index(self, tokens: Tensor, rows: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        n = tokens if rows is None else rows[tokens]
        x = self.logits if self.logits.dim() > 1 else self.logits[None]
        return x, torch.unravel_index(n, x.shape[:-1])

    def target_logits(self, at: Place, rows: Tensor | None) -> Tensor:
        """Raw logit [T] of each target that this shard holds, 0 for the others."""
        out = torch.zeros(len(at.y), dtype=self.dtype, device=at.y.device)
        held = at.owner.nonzero()[:, 0]
        x, index = self._index(held, rows)
        index = (*index, at.y[held])
        out[held] = x[index].to(self.dtype)
        return out

    def tiles(self, tokens: Tensor, at: Place, rows: Tensor | None) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(some of the tokens, first column, raw logits [tokens, columns]) until all columns were seen."""
        for some in torch.split(tokens, block_rows(at.columns)) if len(tokens) else ():
            x, index = self._index(some, rows)
            yield some, 0, x[..., : at.columns][index].to(self.dtype)

    def gradient(
        self, at: Place, rows: Tensor | None, norm: Normaliser, weights: Coefficients, needs: Sequence[bool]
    ) -> Gradients:
        """Gradient of logits, in their dtype."""
        if not at.columns or not len(at.y):
            return (torch.zeros_like(self.logits, memory_format=torch.contiguous_format),)
        return (self.engine.backward(self.logits, at.y, rows, norm, weights, at.how),)


@dataclass(frozen=True)
class LinearShard:
    """The columns hidden [..., D] @ weight [V_k, D].T + bias [V_k], and the engine for them."""

    engine: LinearEngine
    memory: int
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def width(self) -> int:
        """V_k."""
        return len(self.weight)

    @property
    def row_count(self) -> int:
        """Rows of the flattened leading axes."""
        return self.hidden.shape[:-1].numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""
        return wide_dtype(self.hidden)

    def stats(self, at: Place, rows: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Every name [T] of an engine, of the shard's columns alone."""
        return self.engine.forward(
            self.hidden, self.weight, self.bias, at.y, rows, at.how, names, 1, self.memory
        )

    def _rows(self, tokens: Tensor, rows: Tensor | None) -> Tensor:
        n = tokens if rows is None else rows[tokens]
        return self.hidden.reshape(-1, self.hidden.shape[-1])[n].to(self.dtype)

    def target_logits(self, at: Place, rows: Tensor | None) -> Tensor:
        """Raw logit [T] of each target that this shard holds, 0 for the others."""
        out = torch.zeros(len(at.y), dtype=self.dtype, device=at.y.device)
        held = at.owner.nonzero()[:, 0]
        y = at.y[held]
        logit = (self._rows(held, rows) * self.weight[y].to(self.dtype)).sum(-1)
        out[held] = logit if self.bias is None else logit + self.bias[y].to(self.dtype)
        return out

    def tiles(self, tokens: Tensor, at: Place, rows: Tensor | None) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(some of the tokens, first column, raw logits [tokens, columns]) until all columns were seen."""
        size = max(1, self.memory // (2 * min(COLUMNS, at.columns) * self.dtype.itemsize))
        for some in torch.split(tokens, size) if len(tokens) else ():
            h = self._rows(some, rows)
            for start in range(0, at.columns, COLUMNS):
                block = slice(start, min(start + COLUMNS, at.columns))
                w = self.weight[block].to(self.dtype)
                # Into a tensor of its dtype: autocast would round the product, and leaves this one alone.
                x = torch.mm(h, w.T, out=h.new_empty(len(h), len(w)))
                yield some, start, x if self.bias is None else x + self.bias[block].to(self.dtype)

    def gradient(
        self, at: Place, rows: Tensor | None, norm: Normaliser, weights: Coefficients, needs: Sequence[bool]
    ) -> Gradients:
        """Gradients of hidden (the share of these columns), weight and bias, in their dtypes."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if not at.columns:
            return tuple(
                torch.zeros_like(x, memory_format=torch.contiguous_format) if x is not None and need else None
                for x, need in zip((hidden, weight, bias), needs, strict=True)
            )
        return self.engine.backward(
            hidden, weight, bias, at.y, rows, norm, weights, at.how, tuple(needs), self.memory
        )
