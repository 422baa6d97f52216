"""slime, read at 0.3.1 (THUDM/slime 624b824a8, 2026-08-21): a custom advantage.

    --custom-advantage-function-path raise_core.integrations.slime.custom_advantage

Called on the last pipeline stage of each data-parallel rank with its part of the rollout; a prompt's samples
may be on several ranks. Not run with slime itself; tested against its published signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed

from raise_core.advantages import group_advantages
from raise_core.integrations.common import (
    answer_logps,
    check_temperature,
    mixed,
    rewards_over_processes,
)
from raise_core.pieces import TokenizerLike
from raise_core.spans import find_answer_spans

StrictOf = bool | Callable[[Mapping[str, Any]], Sequence[bool]]


def make_custom_advantage(
    tokenizer: TokenizerLike | None = None,
    *,
    strict: StrictOf = True,
    logp_key: str = "ref_log_probs",
    confidence_share: float = 1.0,
    any_temperature: bool = False,
    min_std: float = 0.02,
    process_group: Any = None,
    **options: Any,
) -> Callable[[Any, dict[str, Any]], None]:
    """A function (args, rollout_data) -> None for --custom-advantage-function-path.

    Read from rollout_data: tokens, response_lengths, sample_indices, raw_reward or local_raw_reward (text
    scores in [0, 1], not centred by slime), loss_masks and logp_key: lists over the rank's samples. Written:
    "advantages" and "returns", a tensor [response length] each, the group's advantage on every token.
    tokenizer: None loads that of args.hf_checkpoint. strict: for all samples, or a function of rollout_data.
    process_group: the ranks that share groups; None is Megatron's data-parallel group.

    ValueError: no reference log-probabilities (--kl-coef, --use-kl-loss), context parallelism, which cuts the
    responses, a rollout temperature other than 1, a text score outside [0, 1], a group that is not whole.
    """
    loaded: dict[str, Any] = {}

    def custom_advantage(args: Any, rollout_data: dict[str, Any]) -> None:
        if getattr(args, "context_parallel_size", 1) > 1:
            raise ValueError(
                f"context_parallel_size: got {args.context_parallel_size}, wanted 1: it cuts responses"
            )
        check_temperature(float(getattr(args, "rollout_temperature", 1.0)), any_temperature)
        logps = rollout_data.get(logp_key)
        if not logps:
            raise ValueError(
                f"{logp_key}: missing, no reference was run; use --use-kl-loss with --kl-loss-coef 0, or "
                'logp_key="log_probs" for the policy\'s own confidence'
            )
        own = tokenizer or loaded.setdefault("tokenizer", None) or _tokenizer(args)
        loaded["tokenizer"] = own
        lengths = rollout_data["response_lengths"]
        ids = [
            list(t[len(t) - n :]) for t, n in zip(map(_list, rollout_data["tokens"]), lengths, strict=True)
        ]
        score = torch.tensor(_scores(rollout_data), dtype=torch.float32)
        size = args.n_samples_per_prompt
        keys = [int(i) // size for i in rollout_data["sample_indices"]]
        flags = [strict] * len(ids) if isinstance(strict, bool) else list(strict(rollout_data))
        made = rewards_over_processes(
            answer_logps(logps, ids, find_answer_spans(ids, own)), score, torch.tensor(flags), keys,
            group_size=size, process_group=_group(process_group), **options,
        )  # fmt: skip
        reward = mixed(score, made.reward, confidence_share)
        advantage = _advantages(reward, keys, _group(process_group), min_std)
        like = [torch.as_tensor(x, dtype=torch.float32) for x in logps]
        rollout_data["advantages"] = [torch.full_like(x, a) for x, a in zip(like, advantage, strict=True)]
        rollout_data["returns"] = list(rollout_data["advantages"])
        rollout_data["confidence"] = made.confidence.tolist()

    return custom_advantage


custom_advantage = make_custom_advantage()
"""`make_custom_advantage()` as it is: all samples strict, the tokenizer of args.hf_checkpoint."""


def _advantages(reward: Tensor, keys: Sequence[int], group: Any, min_std: float) -> list[float]:
    """Advantages of this rank's samples inside their groups, wherever the rest of a group is."""
    own = list(zip(reward.tolist(), keys, strict=True))
    rows, first = own, 0
    if distributed.is_available() and distributed.is_initialized():
        every: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(every, own, group=group)
        first = sum(len(part) for part in every[: distributed.get_rank(group)])
        rows = [row for part in every for row in part]
    made = group_advantages(
        torch.tensor([r for r, _ in rows]),
        torch.tensor([k for _, k in rows], dtype=torch.long),
        min_std=min_std,
    )
    return [float(a) for a in made[first : first + len(own)]]


def _scores(rollout_data: Mapping[str, Any]) -> list[float]:
    """The rank's own text scores: slime ships raw_reward whole and adds the rank's part beside it."""
    values = rollout_data.get("local_raw_reward") or rollout_data.get("raw_reward")
    count = len(rollout_data["tokens"])
    if values is None or len(values) != count:
        raise ValueError(
            f"raw_reward: got {0 if values is None else len(values)}, wanted one for each of {count} samples"
        )
    for i, value in enumerate(values):
        if value is None or not 0 <= value <= 1:
            raise ValueError(f"raw_reward[{i}]: got {value}, wanted the text score of an answer, 0 to 1")
    return [float(value) for value in values]


def _list(tokens: Any) -> list[int]:
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)


def _group(given: Any) -> Any:
    if given is not None or not (distributed.is_available() and distributed.is_initialized()):
        return given
    try:
        mpu: Any = import_module("megatron.core.mpu")
    except ImportError:
        return None
    return mpu.get_data_parallel_group()


def _tokenizer(args: Any) -> Any:
    try:
        transformers: Any = import_module("transformers")
    except ImportError:
        raise ImportError("slime's tokenizer needs transformers: pip install transformers") from None
    return transformers.AutoTokenizer.from_pretrained(args.hf_checkpoint)
