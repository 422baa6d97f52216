"""Prompts run once, together where they can be, and what their completions need: keys, values, positions.

Several prompts share a pass as a packed forest (`raise_core.scoring`) without padding. Their keys and values
are then padded on the left to one length, so that completions of all prompts grow side by side.
Positions come from the model's own `get_rope_index` of the whole sequence: after a video, text continues from
the spatial extent, so neither lengths nor maxima give them.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from raise_core.scoring.backbone import Backbone, VisionFeatures
from raise_core.scoring.packing import Tree, lay_out
from raise_core.scoring.prompts import Prompt, read_prompts

from .errors import UserError

MAX_TOKENS = 32768  # of prompts in one pass, unless a single one is longer


@dataclass(frozen=True)
class Prefilled:
    """Prompts after their pass, one entry for each row of a batch.

    last [B, D]: hidden state that predicts the first completion token.
    cache: keys and values, padded on the left; mask [B, L]: 1 where a prompt token is.
    position_ids [R, B, room]: of what may follow each prompt; R is 3, or 1 for text models; None where the
    model finds them itself.
    """

    last: Tensor
    cache: Any
    mask: Tensor
    position_ids: Tensor | None

    def select(self, rows: Sequence[int]) -> "Prefilled":
        """These rows, each as often as it is named; the cache is taken over, so use the original no more."""
        index = torch.tensor(rows, dtype=torch.long, device=self.last.device)
        self.cache.batch_select_indices(index)
        where = None if self.position_ids is None else self.position_ids[:, index]
        return replace(self, last=self.last[index], mask=self.mask[index], position_ids=where)


def together(backbone: Backbone) -> bool:
    """Whether several prompts can grow side by side: their positions can be told, and padding is masked.

    FlashAttention can; it only has no mask for several prompts in one pass.
    """
    return backbone.why_plain is None or backbone.why_plain.startswith("its attention is")


def prefill(
    backbone: Backbone,
    prompts: Sequence[Mapping[str, Any]],
    room: int,
    features: Sequence[VisionFeatures | None] | None = None,
) -> Prefilled:
    """Run prompts (each as the processor returns it); `room` is the length of the longest completion to come.

    features: of their media, where they are known (`Scorer.vision_features`). Under FlashAttention each
    prompt has a pass of its own. Raises ValueError for several prompts of a model that is not `together`.
    """
    if not together(backbone):
        if len(prompts) > 1:
            raise ValueError(f"prompts: got {len(prompts)}, wanted one at a time: {backbone.why_plain}")
        return _by_the_model(backbone, prompts[0])
    read = read_prompts(prompts, backbone.media)
    if features is None:
        features = backbone.vision_features(read) if backbone.family else [None] * len(read)
    positions = {i: backbone.positions(p, len(p) + room) for i, p in enumerate(read)}
    last, layers = list[Tensor](), list[list[tuple[Tensor, Tensor]]]()
    lengths = [len(p) for p in read]
    passes = _passes(lengths, backbone.window)
    if backbone.why_plain is not None:
        passes = [[i] for i in range(len(read))]
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


def _by_the_model(backbone: Backbone, inputs: Mapping[str, Any]) -> Prefilled:
    """One prompt by the model's own forward pass, whatever its layers keep."""
    (prompt,) = read_prompts([inputs], backbone.media)
    given = {k: v.to(backbone.device) if isinstance(v, Tensor) else v for k, v in prompt.inputs.items()}
    ids = prompt.ids[None].to(backbone.device)
    takes = inspect.signature(backbone.core.forward).parameters
    given = {k: v for k, v in given.items() if k in takes}
    out = backbone.core(input_ids=ids, use_cache=True, **given)
    if getattr(out, "past_key_values", None) is None:
        raise UserError(
            f"model: {type(backbone.model).__name__} keeps what it has read in a way of its own, and cannot "
            "be sampled by the built-in engine; use engine=vllm"
        )
    return Prefilled(out.last_hidden_state[:, -1], out.past_key_values, torch.ones_like(ids), None)


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
