"""Sampling G completions per prompt: a prompt is encoded once, its key-value cache serves its group."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import raise_core as rc
from raise_core.scoring.backbone import Backbone, VisionFeatures

from .prefill import Prefilled, prefill, together
from .prompts import Prompt

SHRINK = 0.75  # of the rows still growing: then those that have ended leave the batch


@dataclass(frozen=True)
class Rollout:
    """B = P*G sampled completions, the G of a prompt adjacent.

    completions: token ids up to and including the end-of-sequence token (which a truncated one lacks).
    logp, entropy: per completion, of each sampled token at temperature 1 over the whole vocabulary [nats].
    owner: per completion, the index of its prompt. features: of the prompts' media, for whoever runs them
    again; None where the vision tower is trained, so that each has to run it. sampled_logp: of each sampled
    token in the distribution it was drawn from, as another engine says (`engines`); None when the policy
    itself sampled.
    """

    prompts: list[Prompt]
    completions: list[list[int]]
    logp: list[Tensor]
    entropy: list[Tensor]
    owner: list[int]
    features: Sequence[VisionFeatures | None] | None = None
    sampled_logp: list[Tensor] | None = None

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The prompts as a `raise_core.Scorer` takes them."""
        return [p.inputs for p in self.prompts]

    @property
    def groups(self) -> list[list[list[int]]]:
        """Completions by prompt."""
        found: list[list[list[int]]] = [[] for _ in self.prompts]
        for owner, ids in zip(self.owner, self.completions, strict=True):
            found[owner].append(ids)
        return found


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    eos: Sequence[int],
    suppress: Sequence[int],
    draws: Tensor | None,
    features: Sequence[VisionFeatures | None] | None = None,
) -> Rollout:
    """Sample until every completion has ended or `max_new_tokens` are reached; temperature 0 is greedy.

    draws [B, max_new_tokens] fp64 in [0, 1): where in the distribution each token is taken, so that a
    completion depends on its own draws alone, whatever shares the batch (up to roundings of the model). None
    is for temperature 0. eos: token ids that end a completion. suppress: token ids never sampled. The media
    placeholders belong there: a user of the text would take one for a medium that is not there.
    """
    if not prompts:
        return Rollout([], [], [], [], [])
    backbone = Backbone(model)
    grow = partial(
        _grow, backbone, group_size=group_size, most=max_new_tokens, temperature=temperature, eos=eos,
        suppress=suppress,
    )  # fmt: skip
    if together(backbone):
        parts = [grow(prompts, draws, features)]
    else:
        by_prompt = [None] * len(prompts) if draws is None else draws.split(group_size)
        parts = [grow([p], d, None) for p, d in zip(prompts, by_prompt, strict=True)]
    completions = [ids for part in parts for ids in part[0]]
    logp, entropy = [x for part in parts for x in part[1]], [x for part in parts for x in part[2]]
    owner = [i // group_size for i in range(len(prompts) * group_size)]
    return Rollout(list(prompts), completions, logp, entropy, owner, features)


def _grow(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    draws: Tensor | None,
    features: Sequence[VisionFeatures | None] | None,
    *,
    group_size: int,
    most: int,
    temperature: float,
    eos: Sequence[int],
    suppress: Sequence[int],
) -> tuple[list[list[int]], list[Tensor], list[Tensor]]:
    """Completions of prompts side by side, and of their tokens log-probability and entropy [nats]."""
    b = len(prompts) * group_size
    owner = [i // group_size for i in range(b)]
    start = prefill(backbone, [p.inputs for p in prompts], most, features).select(owner)
    never = torch.tensor(list(suppress), dtype=torch.long, device=start.last.device)
    head, hidden, mask = backbone.head(), start.last, start.mask
    rule = {"logit_scale": head.logit_scale, "softcap": head.softcap}
    growing = list(range(b))  # the completion of each row
    completions: list[list[int]] = [[] for _ in range(b)]
    logp: list[list[float]] = [[] for _ in range(b)]
    entropy: list[list[float]] = [[] for _ in range(b)]
    for step in range(most):
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()  # [rows, V]
        token = _pick(head.z(logits), temperature, never, None if draws is None else draws[growing, step])
        stats = rc.token_stats(logits, token, want=("logp", "entropy"), **rule)
        ids = token.tolist()
        ended = [completions[c][-1:] != [] and completions[c][-1] in eos for c in growing]
        for c, over, *values in zip(
            growing, ended, ids, stats.logp.tolist(), stats.entropy.tolist(), strict=True
        ):
            if not over:
                for kept, value in zip((completions, logp, entropy), values, strict=True):
                    kept[c].append(value)
        open_rows = [row for row, c in enumerate(growing) if completions[c][-1] not in eos]
        if not open_rows or step == most - 1:
            break
        if len(open_rows) <= SHRINK * len(growing):
            rows = torch.tensor(open_rows, device=token.device)
            start, mask, token = start.select(open_rows), mask[rows], token[rows]
            growing = [growing[row] for row in open_rows]
        mask = torch.cat([mask, mask.new_ones(len(growing), 1)], 1)
        hidden = _next(backbone, start, token, mask, step)
    logp_of, entropy_of = ([torch.tensor(row) for row in rows] for rows in (logp, entropy))
    return completions, logp_of, entropy_of


def _next(backbone: Backbone, start: Prefilled, token: Tensor, mask: Tensor, step: int) -> Tensor:
    """Hidden states [rows, D] after one more token [rows]."""
    shared = {"attention_mask": mask, "past_key_values": start.cache, "use_cache": True}
    if start.position_ids is None:
        out = backbone.core(input_ids=token[:, None], **shared)
    else:
        where = start.position_ids[:, :, step : step + 1]
        embedded = backbone.model.get_input_embeddings()(token)[:, None]
        positions = where if backbone.family else where[0]
        out = backbone.decoder(inputs_embeds=embedded, position_ids=positions, **shared)
    hidden: Tensor = out.last_hidden_state[:, -1]
    return hidden


def _pick(logits: Tensor, temperature: float, never: Tensor, draws: Tensor | None) -> Tensor:
    """A token for each row; `draws` [rows] are places in the cumulative distribution."""
    allowed = logits.index_fill(1, never, float("-inf"))
    if temperature == 0:
        return allowed.argmax(-1)
    if draws is None:
        raise ValueError(
            f"draws: got None at temperature {temperature}, wanted [B, max_new_tokens] in [0, 1)"
        )
    below = torch.softmax(allowed / temperature, -1, dtype=torch.float64).cumsum(-1)
    total = below[:, -1:]
    place = draws.to(logits.device)[:, None] * total
    # A product that rounds up to the total would name a column beyond the last one that may be drawn.
    place = torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(below, place, right=True)[:, 0]


def draws(seed: int, places: Sequence[tuple[int, int]], group_size: int, max_new_tokens: int) -> Tensor:
    """Draws [P * G, max_new_tokens] fp64 for prompts by their place (step, index in it): a function of these.

    So they are the same on every device, for any number of processes, and after a restart.
    """
    rows = [torch.zeros(0, max_new_tokens, dtype=torch.float64)]
    for step, index in places:
        digest = hashlib.sha256(f"{seed} {step} {index}".encode()).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(group_size, max_new_tokens, dtype=torch.float64, generator=source))
    return torch.cat(rows)
