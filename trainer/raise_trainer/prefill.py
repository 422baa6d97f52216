"""Prompts run once, all in one pass, and what their completions need from it: keys, values, positions.

Several prompts share a pass as a packed forest (`raise_core.scoring`) without padding. Their keys and values
are then padded on the left to one length, so that completions of all prompts grow side by side.
Positions come from the model's own `get_rope_index` of the whole sequence: after a video, text continues from
the spatial extent, so neither lengths nor maxima give them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from raise_core.scoring.backbone import Backbone, VisionFeatures
from raise_core.scoring.packing import Tree, lay_out
from raise_core.scoring.prompts import Prompt, read_prompts

MAX_TOKENS = 32768  # of prompts in one pass, unless a single one is longer


@dataclass(frozen=True)
class Prefilled:
    """Prompts after their pass, one entry for each row of a batch.

    last [B, D]: hidden state that predicts the first completion token.
    cache: keys and values, padded on the left; mask [B, L]: 1 where a prompt token is.
    position_ids [R, B, room]: of what may follow each prompt; R is 3, or 1 for text models.
    """

    last: Tensor
    cache: Any
    mask: Tensor
    position_ids: Tensor

    def select(self, rows: Sequence[int]) -> "Prefilled":
        """These rows, each as often as it is named; the cache is taken over, so use the original no more."""
        index = torch.tensor(rows, dtype=torch.long, device=self.last.device)
        self.cache.batch_select_indices(index)
        return Prefilled(self.last[index], self.cache, self.mask[index], self.position_ids[:, index])


def prefill(
    backbone: Backbone,
    prompts: Sequence[Mapping[str, Any]],
    room: int,
    features: Sequence[VisionFeatures | None] | None = None,
) -> Prefilled:
    """Run prompts (each as the processor returns it); `room` is the length of the longest completion to come.

    features: of their media, where they are known (`Scorer.vision_features`).
    Raises ValueError for a model whose groups cannot be packed, with the reason.
    """
    if backbone.why_plain is not None:
        raise ValueError(f"model: {backbone.why_plain}; its prompts cannot be run together")
    read = read_prompts(prompts, backbone.media)
    if features is None:
        features = backbone.vision_features(read) if backbone.family else [None] * len(read)
    positions = {i: backbone.positions(p, len(p) + room) for i, p in enumerate(read)}
    last, layers = list[Tensor](), list[list[tuple[Tensor, Tensor]]]()
    passes = _passes([len(p) for p in read], backbone.window)
    for some in passes:
        hidden, cache = _run(backbone, read, features, positions, some)
        ends = list(accumulate(len(read[i]) for i in some))
        last.append(hidden[[end - 1 for end in ends]])
        layers.append([(layer.keys, layer.values) for layer in cache.layers])
    width = max(map(len, read))
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in read]).long().to(backbone.device)
    after = [positions[i][:, len(p) :] for i, p in enumerate(read)]
    sizes = [[len(read[i]) for i in some] for some in passes]
    return Prefilled(
        torch.cat(last),
        _batched(layers, sizes, width),
        mask,
        torch.stack(after, 1).to(backbone.device),
    )


def _passes(lengths: Sequence[int], window: int | None) -> list[list[int]]:
    """Prompts by their index, as many in a pass as MAX_TOKENS allow.

    One longer than a sliding window has a pass of its own, where the mask is the model's.
    """
    found, room = list[list[int]](), 0
    for i, n in enumerate(lengths):
        alone = window is not None and n > window
        if not found or n > room or alone:
            found.append([])
            room = MAX_TOKENS
        found[-1].append(i)
        room = 0 if alone else room - n
    return found


def _run(
    backbone: Backbone,
    read: Sequence[Prompt],
    features: Sequence[Any],
    positions: dict[int, Tensor],
    some: Sequence[int],
) -> tuple[Tensor, Any]:
    """Hidden states and cache of some prompts, one after the other, none of which sees another."""
    from transformers import DynamicCache

    cache = DynamicCache()
    pack = lay_out([(Tree(i, len(read[i]), []), []) for i in some])
    return backbone.run(pack, read, features, positions, cache), cache


def _batched(
    passes: Sequence[Sequence[tuple[Tensor, Tensor]]], sizes: Sequence[Sequence[int]], width: int
) -> Any:
    """A cache with one row for each prompt, padded on the left with zeros."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, parts in enumerate(zip(*passes, strict=True)):
        keys, values = (
            torch.cat(
                [
                    torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0))
                    for part, lengths in zip(parts, sizes, strict=True)
                    for x in part[which].split(list(lengths), 2)
                ]
            )
            for which in (0, 1)
        )
        cache.update(keys, values, layer)
    return cache
