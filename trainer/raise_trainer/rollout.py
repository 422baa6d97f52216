"""Sampling G completions per prompt: every prompt is encoded once, its key-value cache shared by its group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forward import embed_prompts, positions
from .prompts import Prompt


@dataclass(frozen=True)
class Rollout:
    """B = P*G sampled completions, the G of a prompt adjacent.

    completions: token ids up to and including the end-of-sequence token (which a truncated one lacks).
    logp: per completion, log-probability [nats] of each sampled token at temperature 1 over the whole vocabulary.
    owner: per completion, the index of its prompt.
    """

    prompts: list[Prompt]
    completions: list[list[int]]
    logp: list[Tensor]
    owner: list[int]


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    eos: int,
    suppress: Sequence[int],
    generator: torch.Generator | None,
) -> Rollout:
    """Sample until every completion has ended or `max_new_tokens` are reached; temperature 0 is greedy.

    suppress: token ids never sampled.  The media placeholders must be among them: one of those in a completion
    makes the next forward pass look for a video that is not there.
    """
    device, g = model.device, group_size
    embedded = embed_prompts(model, prompts)
    lengths = [len(e) for e in embedded]
    width, b = max(lengths), len(prompts) * g
    embeds = torch.stack([torch.nn.functional.pad(e, (0, 0, width - len(e), 0)) for e in embedded])  # [P, L, D]
    is_token = torch.stack([torch.arange(width) >= width - n for n in lengths]).to(device)  # [P, L]
    # Positions of the prompt and of everything that may follow it; [3, P, L + new], padded on the left.
    found = [positions(model, p, max_new_tokens) for p in prompts]
    position_ids = torch.stack(
        [torch.nn.functional.pad(q, (width - n, 0)) for q, n in zip(found, lengths, strict=True)], 1
    ).to(device)

    out = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=is_token.long(),
        position_ids=position_ids[:, :, :width],
        use_cache=True,
    )
    cache = out.past_key_values
    cache.batch_repeat_interleave(g)
    hidden = out.last_hidden_state[:, -1].repeat_interleave(g, 0)  # [B, D]
    position_ids = position_ids.repeat_interleave(g, 1)
    mask = is_token.repeat_interleave(g, 0).long()

    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    ended = torch.zeros(b, dtype=torch.bool, device=device)
    tokens, logps = [], []
    for step in range(max_new_tokens):
        logits = head(hidden).float()  # [B, V]
        token = _pick(logits, temperature, suppress, generator)
        logps.append(torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0])
        tokens.append(torch.where(ended, eos, token))
        ended |= token == eos
        if bool(ended.all()) or step == max_new_tokens - 1:
            break
        mask = torch.cat([mask, mask.new_ones(b, 1)], 1)
        hidden = model.model.language_model(
            inputs_embeds=embed(token)[:, None],
            attention_mask=mask,
            position_ids=position_ids[:, :, width + step : width + step + 1],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    completions, kept = [], []
    for row, logp in zip(torch.stack(tokens, 1).tolist(), torch.stack(logps, 1), strict=True):
        n = row.index(eos) + 1 if eos in row else len(row)
        completions.append(row[:n])
        kept.append(logp[:n])
    return Rollout(list(prompts), completions, kept, [i // g for i in range(b)])


def _pick(
    logits: Tensor, temperature: float, suppress: Sequence[int], generator: torch.Generator | None
) -> Tensor:
    allowed = logits.index_fill(1, torch.tensor(list(suppress), device=logits.device), float("-inf"))
    if temperature == 0:
        return allowed.argmax(-1)
    return torch.multinomial(torch.softmax(allowed / temperature, -1), 1, generator=generator)[:, 0]
