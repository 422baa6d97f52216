"""EasyR1, read at 0.3.3.dev0 (hiyouga/EasyR1 b44b311, 2026-07-30): a batch reward and an advantage.

    worker.reward.reward_function=…/raise_core/integrations/easyr1.py:compute_score

EasyR1 hands its reward function the response and the ground truth, no prompt and no kind of question; the
log-probabilities come afterwards. Not run with EasyR1 itself; tested against its published signatures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raise_core.integrations.common import grade
from raise_core.integrations.data_proto import Strict, rewrite_scores
from raise_core.pieces import TokenizerLike
from raise_core.tags import answer_in

REWARD_NAME = "raise_core"
REWARD_TYPE = "batch"


def compute_score(
    reward_inputs: Sequence[Mapping[str, Any]], *, kind: str | None = None
) -> list[dict[str, float]]:
    """Text scores of B responses: {"overall", "accuracy", "answered"} each; overall is the reward.

    reward_inputs: {"response", "response_length", "ground_truth"}. kind: of all rows
    (worker.reward.reward_function_kwargs); without it ground_truth is JSON, {"solution": …,
    "problem_type": …}. ValueError naming the row for a truth that is neither.
    """
    truths = [_truth(b, row, kind) for b, row in enumerate(reward_inputs)]
    texts = [str(row["response"]) for row in reward_inputs]
    graded = grade(texts, [s for s, _ in truths], [k for _, k in truths])
    return [
        {"overall": score, "accuracy": score, "answered": float(answer_in(text)[1] is None)}
        for score, text in zip(graded.score.tolist(), texts, strict=True)
    ]


def apply_confidence(
    data: Any,
    tokenizer: TokenizerLike,
    *,
    strict: Strict,
    logp_key: str = "ref_log_probs",
    temperature: float | None = None,
    any_temperature: bool = False,
    group_size: int | None = None,
    confidence_share: float = 1.0,
    **options: Any,
) -> Any:
    """Rewrite token_level_scores (and token_level_rewards) of a DataProto in place; returns it.

    strict: True, False, or `strict_of_truth` for JSON ground truths. logp_key: "ref_log_probs" (a KL must be
    on: algorithm.disable_kl=false) or "old_log_probs". temperature: worker.rollout.temperature, which the
    workers leave in meta_info; anything but 1 is refused unless any_temperature. Otherwise as in
    `data_proto.rewrite_scores`.
    """
    return rewrite_scores(
        data, tokenizer, logp_key=logp_key, scores_keys=["token_level_scores", "token_level_rewards"],
        strict=strict, temperature=temperature, any_temperature=any_temperature, group_size=group_size,
        confidence_share=confidence_share, **options,
    )  # fmt: skip


def strict_of_truth(data: Any) -> list[bool]:
    """Which rows SCRE rewards, by the kind in their JSON ground truths."""
    truths = [
        _truth(b, {"ground_truth": t}, None) for b, t in enumerate(data.non_tensor_batch["ground_truth"])
    ]
    return grade([""] * len(truths), [s for s, _ in truths], [k for _, k in truths]).strict.tolist()


def with_confidence(
    compute_advantage: Callable[..., Any], tokenizer: TokenizerLike, **options: Any
) -> Callable[..., Any]:
    """`compute_advantage` (verl/trainer/ray_trainer.py) with `apply_confidence(**options)` before it.

    EasyR1 has no hook there: an entry script of one's own sets `ray_trainer.compute_advantage` to this in the
    process that runs the trainer.
    """

    def wrapped(data: Any, *args: Any, **kwargs: Any) -> Any:
        return compute_advantage(apply_confidence(data, tokenizer, **options), *args, **kwargs)

    return wrapped


def _truth(b: int, row: Mapping[str, Any], kind: str | None) -> tuple[str, str]:
    truth = row.get("ground_truth")
    if kind is not None and isinstance(truth, str):
        return truth, kind
    try:
        read = json.loads(truth or "")
        return str(read["solution"]), str(read["problem_type"])
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f'row {b}: ground_truth {str(truth)[:80]!r} is not {{"solution": …, "problem_type": …}}; write '
            "it so, or give kind= for all rows (worker.reward.reward_function_kwargs)"
        ) from None
