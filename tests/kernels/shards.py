"""Rows cut into vocabulary shards: what each shard gives, and what is joined from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from hypothesis import strategies as st
from torch import Tensor

from raise_kernels._backward import Normaliser, coefficients
from raise_kernels._checks import STATS, LogitMap
from raise_kernels.parallel import Place, Shard, fields, merge_shards, place, shard_gradient, shard_values

# What the statistics and their gradient need.
EVERYTHING = (*STATS, "top", "count")


class Cut(NamedTuple):
    """Shards of whole rows, with what each gives."""

    shards: Sequence[Shard]
    at: list[Place]
    values: list[Tensor]
    topk: int

    def merged(self) -> tuple[dict[str, Tensor], Tensor]:
        """The statistics of the whole rows, and which of them are scored."""
        return merge_shards(self.values, fields(EVERYTHING, self.topk), EVERYTHING)

    def gradients(self, up: dict[str, Tensor], rows: Tensor | None, inputs: int) -> list[list[Tensor | None]]:
        """For each shard the gradients of the tensors, `inputs` of them, that it was made from."""
        merged, scored = self.merged()
        norm = Normaliser(merged["top"], merged["max_logp"])
        weights = coefficients(up, norm, merged["entropy"], merged["count"], scored)
        return [
            list(shard_gradient(shard, at, rows, norm, weights, (True,) * inputs))
            for shard, at in zip(self.shards, self.at, strict=True)
        ]


def cut(shards: Sequence[Shard], y: Tensor, rows: Tensor | None, how: LogitMap, topk: int) -> Cut:
    """Adjacent shards, in the order of their columns, for targets y [T] and rows [T]."""
    first, at = 0, []
    for shard in shards:
        at.append(place(shard, y, rows, first, how))
        first += shard.width
    pairs = list(zip(shards, at, strict=True))
    limit = sum(s.target_logits(p, rows) for s, p in pairs)
    assert isinstance(limit, Tensor)
    return Cut(shards, at, [shard_values(s, p, rows, EVERYTHING, topk, limit) for s, p in pairs], topk)


def some_bounds(draw: st.DrawFn, vocab: int, how: LogitMap) -> tuple[list[int], LogitMap]:
    """Bounds of uneven shards of `vocab` columns, some of one column, some of padding only; and the map."""
    cuts = set(draw(st.sets(st.integers(1, max(vocab - 1, 1)), max_size=2))) if vocab > 1 else set()
    kind = draw(st.sampled_from(["any", "one column", "padding"]))
    if kind == "one column" and vocab > 1:
        at = draw(st.integers(0, vocab - 1))
        cuts |= {at, at + 1} - {0, vocab}
    if kind == "padding" and vocab > 1:
        end = draw(st.integers(1, vocab - 1))
        cuts |= {end, draw(st.integers(end, vocab - 1))}
        how = replace(how, valid_vocab=draw(st.integers(1, end)))
    return [0, *sorted(cuts), vocab], how
