"""Confidence rewards on a `DataProto` (batch, non_tensor_batch, meta_info), which verl and EasyR1 share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raise_core.integrations.common import mixed, rewards_from_logps
from raise_core.pieces import TokenizerLike

Strict = bool | str | Callable[[Any], Sequence[bool]]
"""True or False for all rows, a key of non_tensor_batch, or a function of the DataProto that gives [B]."""


def rewrite_scores(
    data: Any,
    tokenizer: TokenizerLike,
    *,
    logp_key: str,
    scores_keys: Sequence[str],
    strict: Strict,
    temperature: float | None,
    any_temperature: bool,
    group_size: int | None,
    confidence_share: float,
    **options: Any,
) -> Any:
    """Replace the text score of each response by its confidence reward, in place; returns `data`.

    Read: batch["responses"] [B, C], batch["response_mask"] [B, C] (a response ends at its last 1),
    batch[logp_key] [B, C] nats, non_tensor_batch["uid"] [B], and the text score: the sum over the tokens of
    batch[scores_keys[0]] [B, C], in [0, 1]. Written: the difference to the reward, at the last token of each
    response, into all of scores_keys that are there; batch["confidence"] and batch["text_score"], [B].
    temperature: what the logits were divided by; None: meta_info["temperature"]. ValueError, naming key or
    row, for what is missing, for a text score outside [0, 1] and for an empty response.
    """
    batch, first = data.batch, scores_keys[0]
    for key in ("responses", "response_mask", first):
        _has(batch, key, "batch")
    if logp_key not in batch.keys():  # noqa: SIM118 (a TensorDict iterates over its rows)
        raise ValueError(
            f"batch[{logp_key!r}] is missing: no reference policy was run; switch its KL on (with a "
            "coefficient of 0 or nearly so), or name another key of log-probabilities"
        )
    _has(data.non_tensor_batch, "uid", "non_tensor_batch")
    at = data.meta_info.get("temperature") if temperature is None else temperature
    if at is None:
        raise ValueError(
            'temperature: got None and no meta_info["temperature"], wanted what their logits were '
            "divided by: the rollout's temperature"
        )
    mask = batch["response_mask"].cpu().bool()
    lengths = [int(row.nonzero()[-1]) + 1 if bool(row.any()) else 0 for row in mask]
    if 0 in lengths:
        raise ValueError(f"response_mask[{lengths.index(0)}]: got no response token, wanted one or more")
    ids = [row[:n].tolist() for row, n in zip(batch["responses"].cpu(), lengths, strict=True)]
    score = batch[first].float().sum(-1).cpu()
    for b, value in enumerate(score.tolist()):
        if not 0 <= value <= 1:
            raise ValueError(
                f"{first}[{b}]: got a text score of {value:.4g}, wanted 0 to 1; let the reward function "
                "return the score of the answer alone"
            )
    made = rewards_from_logps(
        batch[logp_key], ids, tokenizer, score, _strict(data, strict, len(ids)),
        list(data.non_tensor_batch["uid"]), temperature=at, any_temperature=any_temperature,
        group_size=group_size, **options,
    )  # fmt: skip
    reward = mixed(score, made.reward, confidence_share)
    rows, last = torch.arange(len(ids)), torch.tensor(lengths) - 1
    for key in (k for k in scores_keys if k in batch.keys()):  # noqa: SIM118
        changed = batch[key].clone()
        changed[rows, last] += (reward - score).to(changed)
        batch[key] = changed
    batch["confidence"], batch["text_score"] = made.confidence, score
    return data


def _has(mapping: Any, key: str, name: str) -> None:
    if key not in mapping.keys():  # noqa: SIM118
        raise ValueError(f"{name}[{key!r}] is missing, got {sorted(map(str, mapping.keys()))}")


def _strict(data: Any, strict: Strict, rows: int) -> Tensor:
    if isinstance(strict, bool):
        return torch.full((rows,), strict)
    if isinstance(strict, str):
        _has(data.non_tensor_batch, strict, "non_tensor_batch")
        values = list(data.non_tensor_batch[strict])
    else:
        values = list(strict(data))
    if len(values) != rows:
        raise ValueError(f"strict: got {len(values)} values, wanted one for each of {rows} responses")
    return torch.tensor([bool(value) for value in values])
