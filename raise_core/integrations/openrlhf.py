"""OpenRLHF, read at 0.11.0 (OpenRLHF/OpenRLHF 3c3be623, 2026-08-13): a reward function and an agent's part.

    --reward.remote_url reward.py          # reward_func = make_reward_func(kind=…)
    --train.agent_func_path agent.py       # examples/adapters/openrlhf_agent.py: SCRE from the rollout

Both see one completion at a time, so IGSR, which compares a prompt's completions, cannot be had here.
OpenRLHF logs what a reward function raises and goes on without a reward. Not run with OpenRLHF itself; tested
against its published signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raise_core.integrations.common import check_temperature, grade, mixed, rewards_from_logps
from raise_core.pieces import TokenizerLike
from raise_core.tags import answer_in


def make_reward_func(
    *, kind: str, response_start: str | None = None
) -> Callable[..., dict[str, Tensor | dict[str, Tensor]]]:
    """A `reward_func(queries, prompts, labels, **kwargs)`: text scores as "rewards" and "scores", both [B].

    queries: prompt and response decoded together, special tokens shown. The response is what follows the
    prompt, or, where the text does not begin with it (images, truncation), what follows the last
    response_start, such as "<|im_start|>assistant\\n". ValueError naming the row where neither finds it.
    """

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        pairs = enumerate(zip(queries, prompts, strict=True))
        texts = [_response(b, query, prompt, response_start) for b, (query, prompt) in pairs]
        score = grade(texts, list(labels), kind).score
        answered = torch.tensor([float(answer_in(text)[1] is None) for text in texts])
        return {"rewards": score, "scores": score, "extra_logs": {"text_score": score, "answered": answered}}

    return reward_func


def add_confidence(
    output: dict[str, Any],
    tokenizer: TokenizerLike,
    *,
    kind: str,
    temperature: float,
    confidence_share: float = 1.0,
    any_temperature: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Reward an AgentExecutor's result by SCRE on its own rollout log-probabilities; returns `output`.

    output: observation_tokens, action_ranges, rollout_log_probs (sampling_params.logprobs must be set:
    algo.advantage.is_correction_enable), label. The last action is the completion. "reward" becomes the
    reward, "scores" the text score; extra_logs gains text_score and confidence. kind: a strict one;
    ValueError for one that IGSR rewards. temperature: of the sampler, 1 unless any_temperature (vLLM's
    default logprobs are at temperature 1 whatever the sampling: give 1 then).
    """
    check_temperature(temperature, any_temperature)
    logps = output.get("rollout_log_probs")
    if logps is None:
        raise ValueError(
            "rollout_log_probs: got None, wanted one for each token; switch --algo.advantage.is_correction_"
            "enable on, which makes vLLM return them"
        )
    start, stop = output["action_ranges"][-1]
    ids = [list(output["observation_tokens"][start:stop])]
    graded = grade([tokenizer.decode(ids[0])], [output["label"]], kind)
    if not bool(graded.strict[0]):
        raise ValueError(
            f"kind: got {kind!r}, which IGSR rewards inside a prompt's group; OpenRLHF's agents see one "
            "completion: wanted a strict kind (multiple_choice, numerical)"
        )
    made = rewards_from_logps(
        [logps[start:stop]], ids, tokenizer, graded.score, graded.strict, [0], **options
    )
    reward = mixed(graded.score, made.reward, confidence_share)
    text = float(graded.score[0])
    logs = {"text_score": graded.score, "confidence": made.confidence}
    return {
        **output,
        "reward": float(reward[0]),
        "scores": text,
        "extra_logs": {**output["extra_logs"], **logs},
    }


def _response(b: int, query: str, prompt: str, start: str | None) -> str:
    if query.startswith(prompt):
        return query[len(prompt) :]
    if start is not None and start in query:
        return query.rpartition(start)[2]
    raise ValueError(
        f"queries[{b}]: does not begin with its prompt (images, truncation), wanted response_start: the text "
        "after which the response begins, such as '<|im_start|>assistant\\n'"
    )
