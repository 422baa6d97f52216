"""Video-R1 and its kin, read at tulerfeng/Video-R1 59d65c3 and TencentARC/GRPO-CARE b0628fc: one call.

These trainers (R1-V, Video-R1, GRPO-CARE, VLM-R1) compute reference log-probabilities and rewards inside
`compute_loss`, for one prompt. After `rewards_per_func` is filled:

    rewards_per_func[:, 0] = confidence_column(
        self.processing_class, completion_ids, completion_mask, ref_per_token_logps, rewards_per_func[:, 0],
        kind=inputs[0]["problem_type"])

Their logits are divided by nothing, so these are log-probabilities at temperature 1. When the reference pass
fails they go on with log-probabilities of the text without its media; nothing here can see that. Not run with
these trainers; tested against their published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raise_core.integrations.common import STRICT_KINDS, grade, mixed, rewards_from_logps
from raise_core.verify import canonical_kind


def accuracy_reward(
    completions: Sequence[Any], solution: Sequence[str], problem_type: Sequence[str] | str, **_: Any
) -> list[float]:
    """A reward function of these trainers: text scores in [0, 1], each row by its own kind.

    completions: [[{"role", "content"}], …] or texts; the columns are repeated for each completion.
    """
    texts = [c if isinstance(c, str) else str(c[0]["content"]) for c in completions]
    made: list[float] = grade(texts, list(solution), problem_type).score.tolist()
    return made


@torch.no_grad()
def confidence_column(
    processing_class: Any,
    completion_ids: Tensor,
    completion_mask: Tensor,
    ref_per_token_logps: Tensor,
    accuracy: Tensor,
    *,
    kind: str | Sequence[str],
    num_generations: int | None = None,
    confidence_share: float = 1.0,
    **options: Any,
) -> Tensor:
    """Confidence rewards [B] in place of the accuracy column, on its device and in its dtype.

    completion_ids [B, C], completion_mask [B, C] (1 up to the first end of text), ref_per_token_logps [B, C]
    nats, of the completion alone (column j: token j); accuracy [B] in [0, 1]: the text score before bonuses.
    kind: of all, or of each row. num_generations: completions that follow each other are a group; None: all
    of them are one. options: those of `rc.confidence_rewards`. ValueError for shapes that do not fit, groups
    that are not whole and a score outside [0, 1].
    """
    rows = len(completion_ids)
    shapes = {tuple(x.shape) for x in (completion_ids, completion_mask, ref_per_token_logps)}
    if len(shapes) != 1 or accuracy.shape != (rows,):
        raise ValueError(
            f"got shapes {sorted(shapes)} and accuracy {list(accuracy.shape)}, wanted one [B, C] and [B]; "
            "cut the prompt off: ref_per_token_logps[:, prompt_length - 1 :]"
        )
    if bool(((accuracy < 0) | (accuracy > 1)).any()):
        raise ValueError(
            f"accuracy: got {accuracy.tolist()}, wanted text scores from 0 to 1, without bonuses"
        )
    lengths = completion_mask.sum(1).tolist()
    ids = [row[: int(n)] for row, n in zip(completion_ids.tolist(), lengths, strict=True)]
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    kinds = [kind] * rows if isinstance(kind, str) else list(kind)
    strict = torch.tensor([canonical_kind(k) in STRICT_KINDS for k in kinds])
    size = num_generations or rows
    score = accuracy.detach().float().cpu()
    made = rewards_from_logps(
        ref_per_token_logps, ids, tokenizer, score, strict, [b // size for b in range(rows)],
        group_size=size, **options,
    )  # fmt: skip
    return mixed(score, made.reward, confidence_share).to(accuracy)
