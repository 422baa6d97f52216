"""Sampling G completions per prompt: a prompt is encoded once, its key-value cache serves its group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forward import prefill
from .prompts import Prompt


@dataclass(frozen=True)
class Rollout:
    """B = P*G sampled completions, the G of a prompt adjacent.

    completions: token ids up to and including the end-of-sequence token (which a truncated one lacks).
    logp: per completion, log-probability [nats] of each sampled token at temperature 1 over the whole
    vocabulary. owner: per completion, the index of its prompt.
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

    suppress: token ids never sampled. The media placeholders must be among them: one of those in a
    completion makes the next forward pass look for a video that is not there.
    """
    b = len(prompts) * group_size
    owner = [i // group_size for i in range(b)]
    start = prefill(model, prompts, max_new_tokens).select(owner)
    hidden, mask, device = start.last, start.mask, start.last.device
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
            position_ids=start.following(step, step + 1),
            past_key_values=start.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    completions, kept = [], []
    for row, logp in zip(torch.stack(tokens, 1).tolist(), torch.stack(logps, 1), strict=True):
        n = row.index(eos) + 1 if eos in row else len(row)
        completions.append(row[:n])
        kept.append(logp[:n])
    return Rollout(list(prompts), completions, kept, owner)


def _pick(
    logits: Tensor, temperature: float, suppress: Sequence[int], generator: torch.Generator | None
) -> Tensor:
    never = torch.tensor(list(suppress), dtype=torch.long, device=logits.device)
    allowed = logits.index_fill(1, never, float("-inf"))
    if temperature == 0:
        return allowed.argmax(-1)
    return torch.multinomial(torch.softmax(allowed / temperature, -1), 1, generator=generator)[:, 0]
