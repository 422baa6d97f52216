"""The forward pass over [prompt | completion]: every video and every prompt once, then all completions.

A prompt's keys and values serve all its completions, with gradient. Positions come from the model's own
`get_rope_index` of the whole sequence: after a video, text continues from the spatial extent, so neither
lengths nor maxima give them. Prompts are padded on the left and masked; completions are padded on the right,
where the causal mask hides it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .prompts import Prompt


@dataclass(frozen=True)
class Hidden:
    """Hidden states `[N, D]` and, per completion, the row that predicts its first token."""

    states: Tensor
    first_rows: list[int]

    def completion_rows(self, completions: Sequence[Sequence[int]]) -> Tensor:
        """The rows `[T]` that predict the tokens of all completions, in order."""
        spans = [torch.arange(f, f + len(c)) for f, c in zip(self.first_rows, completions, strict=True)]
        return torch.cat(spans).to(self.states.device)


def embed_prompts(model: Any, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Input embeddings `[L, D]` of every prompt; a clip that several share is encoded once."""
    device = model.device
    clips = {id(p.clip): p.clip for p in prompts}
    patches = torch.cat([c.patches for c in clips.values()]).to(device)
    grid = torch.cat([c.grid for c in clips.values()]).to(device)
    features = model.model.get_video_features(patches, grid).pooler_output
    by_clip = dict(zip(clips, features, strict=True))
    embed = model.get_input_embeddings()
    embedded = []
    for prompt in prompts:
        e = embed(prompt.ids.to(device))
        is_video = (prompt.media_kind == 2).to(device)[:, None]
        embedded.append(e.masked_scatter(is_video, by_clip[id(prompt.clip)].to(e.dtype)))
    return embedded


def positions(model: Any, prompt: Prompt, completion_length: int) -> Tensor:
    """Rotary positions `[3, L]` of a prompt followed by that many text tokens."""
    ids = torch.cat([prompt.ids, prompt.ids.new_zeros(completion_length)])
    kinds = torch.cat([prompt.media_kind, prompt.media_kind.new_zeros(completion_length)])
    found, _ = model.model.get_rope_index(
        ids[None],
        mm_token_type_ids=kinds[None],
        video_grid_thw=prompt.clip.grid,
        second_per_grid_ts=[prompt.clip.seconds_per_grid],
    )
    return found[:, 0]


@dataclass(frozen=True)
class Prefilled:
    """P prompts after one pass: what their completions need.

    last [P, D]: hidden state that predicts the first completion token.
    cache: keys and values, padded on the left; mask [P, L]: 1 where a prompt token is.
    position_ids [3, P, L+room]: of the prompt and of what may follow it.
    """

    last: Tensor
    cache: Any
    mask: Tensor
    position_ids: Tensor

    def select(self, owner: Sequence[int]) -> "Prefilled":
        """One entry per completion; the cache is taken over, so use the original no more."""
        index = torch.tensor(owner, device=self.last.device)
        self.cache.batch_select_indices(index)
        return Prefilled(self.last[index], self.cache, self.mask[index], self.position_ids[:, index])

    def following(self, start: int, stop: int) -> Tensor:
        """Positions of completion tokens `start:stop`, `[3, B, n]`."""
        width = self.mask.shape[1]
        return self.position_ids[:, :, width + start : width + stop]


def prefill(model: Any, prompts: Sequence[Prompt], room: int) -> Prefilled:
    """Run P prompts once; `room` is the length of the longest completion to come."""
    embedded = embed_prompts(model, prompts)
    lengths = [len(e) for e in embedded]
    width = max(lengths)
    embeds = torch.stack([_pad_left(e.T, width).T for e in embedded])  # [P, L, D]
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long().to(embeds.device)
    found = [_pad_left(positions(model, p, room), width + room) for p in prompts]
    position_ids = torch.stack(found, 1).to(embeds.device)  # [3, P, L + room]
    out = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids[:, :, :width], use_cache=True
    )
    return Prefilled(out.last_hidden_state[:, -1], out.past_key_values, mask, position_ids)


def _pad_left(x: Tensor, width: int) -> Tensor:
    """`[..., n]` to `[..., width]`."""
    return torch.nn.functional.pad(x, (width - x.shape[-1], 0))


def forward(
    model: Any, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], owner: Sequence[int]
) -> Hidden:
    """Hidden states that predict every token of every completion, given its prompt `prompts[owner[b]]`."""
    longest = max(map(len, completions))
    start = prefill(model, prompts, longest).select(owner)
    ids = torch.zeros(len(completions), longest, dtype=torch.long)  # what pads is never read
    for b, completion in enumerate(completions):
        ids[b, : len(completion)] = torch.tensor(completion)
    embeds = model.get_input_embeddings()(ids.to(start.last.device))
    mask = torch.cat([start.mask, start.mask.new_ones(ids.shape)], 1)
    out = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=start.following(0, longest),
        past_key_values=start.cache,
        use_cache=True,
    )
    states = torch.cat([start.last[:, None], out.last_hidden_state], 1)  # [B, 1 + longest, D]
    return Hidden(states.flatten(0, 1), [b * (longest + 1) for b in range(len(completions))])
