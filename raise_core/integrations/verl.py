"""verl, read at 0.10.0.dev (verl-project/verl 1dda039b9, 2026-08-22): text score, then confidence.

verl's reward functions see one response and no model, so the confidence is taken later, where the
log-probabilities are: before the advantages. Not run with verl itself; tested against its published
signatures.

    reward.custom_reward_function.path=…/raise_core/integrations/verl.py     # name: compute_score
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

from raise_core.integrations.common import STRICT_KINDS, grade
from raise_core.integrations.data_proto import Strict, rewrite_scores
from raise_core.pieces import TokenizerLike


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | Sequence[str],
    extra_info: dict[str, Any] | None = None,
    *,
    kind: str | None = None,
    kind_key: str = "problem_type",
    **_: Any,
) -> dict[str, float]:
    """Text score of one response: {"score", "acc", "strict"}, the first of which is the reward.

    The kind of question is `kind` (reward.custom_reward_function.reward_kwargs), else extra_info[kind_key].
    "strict" is 1 where SCRE will reward. ValueError without a kind, for an unknown one and without a truth.
    """
    kind = kind or (extra_info or {}).get(kind_key)
    if kind is None:
        raise ValueError(
            f"{data_source}: got no kind of question; put it into extra_info[{kind_key!r}], or give kind="
        )
    if ground_truth is None:
        raise ValueError(f"{data_source}: ground_truth is None, wanted the right answer")
    graded = grade([solution_str], [ground_truth], kind, strict_kinds=STRICT_KINDS)
    score = float(graded.score[0])
    return {"score": score, "acc": score, "strict": float(graded.strict[0])}


def apply_confidence(
    data: Any,
    tokenizer: TokenizerLike,
    *,
    logp_key: str = "ref_log_prob",
    strict: Strict = "strict",
    temperature: float | None = None,
    any_temperature: bool = False,
    group_size: int | None = None,
    confidence_share: float = 1.0,
    **options: Any,
) -> Any:
    """Rewrite the scores of a `DataProto` before `compute_advantage`, in place; returns it.

    data: with responses, response_mask, token_level_scores (or rm_scores), `logp_key` ("ref_log_prob", or
    "old_log_probs" for the policy's own confidence) and uid. token_level_rewards and rm_scores follow
    where they are there. strict: by default the column that `compute_score` makes. temperature: verl divides
    logits by actor_rollout_ref.rollout.temperature, so anything but 1 is refused unless any_temperature.
    options: those of `rc.confidence_rewards`. Everything else as in `data_proto.rewrite_scores`.
    """
    given = list(data.batch.keys())
    keys = [k for k in ("token_level_scores", "rm_scores", "token_level_rewards") if k in given]
    return rewrite_scores(
        data, tokenizer, logp_key=logp_key, scores_keys=keys or ["token_level_scores"], strict=strict,
        temperature=temperature, any_temperature=any_temperature, group_size=group_size,
        confidence_share=confidence_share, **options,
    )  # fmt: skip


class ConfidenceMixin:
    """For a v1 trainer: `class T(ConfidenceMixin, PPOTrainerSync)`, then `TRAINER_REGISTRY["sync"] = T`.

    The name must stay "sync": verl compares trainer_mode with it, so a new name would get the buffers of the
    asynchronous trainers.

    Before the advantages the scores in the transfer queue are rewritten by `apply_confidence`; the metrics
    then show the confidence rewards, and metrics["confidence/mean"] the confidence itself. `confidence` holds
    the keyword arguments of `apply_confidence`; temperature and group_size are taken from the run's settings.
    """

    confidence: dict[str, Any] = {}  # noqa: RUF012 (a class sets its own)
    fields = (
        "uid",
        "responses",
        "response_mask",
        "rm_scores",
        "old_log_probs",
        "ref_log_prob",
        "extra_fields",
    )

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        queue, proto, padding = (
            cast("Any", import_module(name))
            for name in ("transfer_queue", "verl.protocol", "verl.workers.utils.padding")
        )
        mine = cast("Any", self)
        got = queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=list(self.fields)
        )
        extra = [row.get("reward_extra_info", {}) for row in list(got.pop("extra_fields"))]
        uid, mask = got.pop("uid").tolist(), got["response_mask"]
        data = proto.DataProto(batch=got.to_padded_tensor())
        data.non_tensor_batch["uid"] = uid
        if all("strict" in row for row in extra):
            data.non_tensor_batch["strict"] = [row["strict"] for row in extra]
        rollout = mine.config.actor_rollout_ref.rollout
        apply_confidence(
            data, mine.tokenizer,
            **{"temperature": rollout.temperature, "group_size": rollout.n, **self.confidence},
        )  # fmt: skip
        metrics["confidence/mean"] = float(data.batch["confidence"].mean())
        metrics["confidence/text_score"] = float(data.batch["text_score"].mean())
        written = type(got)(
            {"rm_scores": padding.response_to_nested(data.batch["rm_scores"], mask)}, batch_size=len(batch)
        )
        queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=written)
        return cast("Any", super())._compute_advantage(batch, metrics)
