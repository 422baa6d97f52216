"""Hidden states that predict wanted tokens: groups packed, over a cached prompt, or one by one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from raise_core.scoring.backbone import Backbone, VisionFeatures
from raise_core.scoring.packing import Pack, Part, Tree, chunks, fill, lay_out
from raise_core.scoring.prompts import Prompt


@dataclass(frozen=True, eq=False)
class Call:
    """What the passes of one call share: by prompt, its features and rotary positions [R, longest path]."""

    backbone: Backbone
    prompts: Sequence[Prompt]
    features: Sequence[VisionFeatures | None]
    positions: dict[int, Tensor]
    max_tokens: int

    def run(self, pack: Pack, cache: Any = None, jitter: float = 0.0) -> Tensor:
        """Hidden states of a pack's queries."""
        return self.backbone.run(pack, self.prompts, self.features, self.positions, cache, jitter)


def wanted_rows(call: Call, trees: Sequence[Tree], modes: Sequence[str]) -> Tensor:
    """Hidden states [T, D] of the rows that predict the wanted tokens: by tree, by branch, by token.

    modes: for each tree "packed", "suffix" or "plain". Differentiable.
    """
    pieces: list[Tensor] = []
    todo = [(t, m) for t, m in zip(trees, modes, strict=True) if t.wanted]
    for mode, run in groupby(todo, key=lambda pair: pair[1]):
        members = [tree for tree, _ in run]
        if mode == "packed":
            several = call.backbone.attention == "sdpa"  # a dense mask grows with the square of all prompts
            for parts in fill(members, call.max_tokens, several=several):
                pieces.append(_packed(call, parts))
        else:
            one = _suffix if mode == "suffix" else _plain
            pieces.extend(one(call, tree) for tree in members)
    weight = call.backbone.head().weight
    if not pieces:
        return weight.new_zeros(0, weight.shape[1])
    return torch.cat(pieces).to(weight.device)


def _take(hidden: Tensor, rows: Sequence[int]) -> Tensor:
    return hidden.index_select(0, torch.tensor(rows, dtype=torch.long, device=hidden.device))


def _packed(call: Call, parts: Sequence[Part]) -> Tensor:
    pack = lay_out(parts)
    return _take(call.run(pack), pack.rows)


def _suffix(call: Call, tree: Tree) -> Tensor:
    """The prompt once, its keys and values kept with gradient; then the branches in chunks."""
    from transformers import DynamicCache

    cache = DynamicCache()
    last = call.run(lay_out([(tree, [])]), cache)[-1:]
    pieces = []
    for members in chunks(tree, call.max_tokens):
        pack = lay_out([(tree, members)], cached=True)
        hidden = torch.cat([last, call.run(pack, _fork(cache))]) if pack.layout.queries else last
        pieces.append(_take(hidden, pack.rows))
    return torch.cat(pieces)


def _fork(cache: Any) -> Any:
    """A cache that grows by itself; what it holds so far is shared."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def _plain(call: Call, tree: Tree) -> Tensor:
    """A pass of its own for each branch with wanted tokens."""
    pieces = []
    for b, branch in enumerate(tree.branches):
        if branch.start < branch.stop:
            hidden = plain_branch(call, tree, b)
            first = tree.first(b) - 1
            pieces.append(hidden[first + branch.start : first + branch.stop])
    return torch.cat(pieces)


def plain_branch(call: Call, tree: Tree, branch: int) -> Tensor:
    """Hidden states of [prompt | … | branch] by the model's own forward pass.

    A known family takes media placeholders among completion tokens as text: the model's forward pass would
    look for media that are not there. So does a prompt whose features were passed in without its pixels.
    """
    prompt, path = call.prompts[tree.index], [branch]
    while (parent := tree.branches[path[0]].parent) >= 0:
        path.insert(0, parent)
    ids = [i for b in path[:-1] for i in tree.branches[b].ids]
    ids += tree.branches[branch].ids[: max(tree.branches[branch].stop - 1, 0)]
    placeholders = bool((call.backbone.media.kinds(torch.tensor(ids, dtype=torch.long)) > 0).any())
    if placeholders or not prompt.has_pixels:
        return chain(call, tree, path)
    return call.backbone.plain(prompt, ids)


def chain(call: Call, tree: Tree, path: Sequence[int], jitter: float = 0.0) -> Tensor:
    """Hidden states of the prompt and some branches one after the other, each following the one before."""
    pack = lay_out([(tree, list(path))])
    return call.run(pack, jitter=jitter)
