"""`reward: {chain-of-step: PRM}`: trajectory rewards of a process reward model, advantages of its steps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import raise_core as rc

from .chain_judge import ChainJudge, Judged
from .method import Method
from .rollout import Rollout
from .scoring import Scored


def judge_of(method: Method, tokenizer: Any, model: Any, *, dtype: str) -> ChainJudge | None:
    """The PRM of a method, beside its policy's model; None for a reward that needs none."""
    if method.chain is None:
        return None
    return ChainJudge.load(
        method.chain.prm, tokenizer, share=method.chain.share, device=model.device, dtype=dtype,
        micro_tokens=method.micro_tokens,
    )  # fmt: skip


@torch.no_grad()
def with_chain_reward(
    scored: Scored, rollout: Rollout, judge: ChainJudge, method: Method, tokenizer: Any
) -> Scored:
    """The same completions, rewarded by their steps and their answers (Chain-of-Step, arXiv 2509.19003).

        reward = share * mean(step scores) + (1 - share) * answer score

    takes the text score's place in `scored.reward`, mixed with it by method.confidence_share; bonuses stay.
    The answer score is the PRM's, or with chain.answer "text" the text score. Where chain.per_step is above 0
    each token of a step also has that weight times its step's advantage: the step's score against those of
    all steps of its prompt (`rc.step_advantages`), in units of an advantage.
    A chain beyond the PRM's context has no scores and reward 0, and is counted.
    """
    chain = method.chain
    assert chain is not None
    judged = [one for group in judge(rollout.inputs, rollout.groups) for one in group]
    value = torch.tensor([one.reward for one in judged])
    if chain.answer == "text":
        means = torch.tensor([one.scores.mean for one in judged])
        value = chain.share * means + (1 - chain.share) * scored.score
    text, k = scored.score, method.confidence_share
    steps = [s for one in judged for s in one.scores.steps]
    answers = [one.scores.answer for one in judged if one.scores.answer is not None]
    metrics = {
        "step_score_mean": sum(steps) / max(len(steps), 1),
        "answer_score_mean": sum(answers) / max(len(answers), 1),
        "steps_mean": len(steps) / len(judged),
        "prm_too_long_share": sum(not one.fits for one in judged) / len(judged),
    }
    # What is there is the text score and the bonuses.
    reward = scored.reward + k * (value - text)
    metrics["reward_mean"] = float(reward.mean())
    advantage = None
    if chain.per_step:
        advantage = chain.per_step * _per_token(rollout, judged, method, tokenizer)
    return replace(scored, reward=reward, step_advantage=advantage, metrics=scored.metrics | metrics)


def _per_token(rollout: Rollout, judged: Sequence[Judged], method: Method, tokenizer: Any) -> Tensor:
    """Advantage of each completion token, [T]; 0 outside of steps."""
    found = rc.find_step_spans(rollout.completions, tokenizer)
    # A chain beyond the PRM's context has steps but no scores.
    found = [
        spans if len(spans) == len(one.scores.steps) else [] for spans, one in zip(found, judged, strict=True)
    ]
    scores = [s for spans, one in zip(found, judged, strict=True) for s in one.scores.steps if spans]
    lengths = torch.tensor([0, *map(len, rollout.completions)]).cumsum(0)
    spans = rc.build_spans(found, rollout.completions, lengths[:-1], rollout.owner)
    return rc.step_advantages(
        torch.tensor(scores), spans, int(lengths[-1]),
        scale="none" if method.scale == "none" else "group", min_std=method.min_std,
    )  # fmt: skip
