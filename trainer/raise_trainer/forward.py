"""The plain forward pass over [prompt | completion], the video encoded once per clip.

Positions come from the model's own `get_rope_index` of the whole sequence: after a video, text continues from the
spatial extent, so neither lengths nor maxima give them.  Sequences are padded on the right; under a causal mask the
padding is never seen, so no mask is passed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .prompts import Prompt


@dataclass(frozen=True)
class Hidden:
    """Hidden states `[B*L, D]` and, per completion, the row that predicts its first token."""

    states: Tensor
    first_rows: list[int]

    def completion_rows(self, completions: Sequence[Sequence[int]]) -> Tensor:
        """The rows `[T]` that predict the tokens of all completions, in order."""
        spans = [torch.arange(f, f + len(c)) for f, c in zip(self.first_rows, completions, strict=True)]
        return torch.cat(spans).to(self.states.device)


def embed_prompts(model: Any, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Input embeddings `[L, D]` of every prompt; a clip that several prompts share passes the vision tower once."""
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


def forward(
    model: Any, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], owner: Sequence[int]
) -> Hidden:
    """Hidden states of every `[prompts[owner[b]] | completions[b]]`."""
    device = model.device
    embedded = embed_prompts(model, prompts)
    flat = torch.tensor([t for c in completions for t in c], dtype=torch.long, device=device)
    answers = model.get_input_embeddings()(flat).split([len(c) for c in completions])
    sequences = [torch.cat([embedded[p], a]) for p, a in zip(owner, answers, strict=True)]
    length = max(map(len, sequences))
    embeds = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # [B, L, D]
    # Text positions run on by one, so those of the longest completion serve every completion of the prompt.
    longest = [positions(model, p, length - len(p.ids)) for p in prompts]
    position_ids = torch.stack([longest[p] for p in owner], 1).to(device)  # [3, B, L]
    out = model.model.language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False)
    first_rows = [b * length + len(prompts[p].ids) - 1 for b, p in enumerate(owner)]
    return Hidden(out.last_hidden_state.flatten(0, 1), first_rows)
