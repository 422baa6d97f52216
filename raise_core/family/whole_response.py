"""Rewards of everything the model wrote, without a reference answer: sharper is better.

They raise what the model already does, right or wrong, and can collapse it (arXiv 2602.03979): keep a share
of the text score beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raise_core.family.segments import (
    EMPTY_SUM,
    packed,
    packed_logp,
    per_span,
    span_mean,
    span_sum,
    with_empty,
)


def intuitor(self_certainty: Tensor, offsets: Tensor) -> Tensor:
    """R = mean_t KL(uniform || p_t), [S] in nats, at least 0 (Intuitor, arXiv 2505.19590). Empty: 0.

    self_certainty [T]: lse - mean z - log V' as `token_stats` gives it, over all response tokens. The
    published code leaves log V out, which shifts every reward alike.
    """
    return with_empty(
        span_mean(packed("self_certainty", self_certainty, offsets), offsets), offsets, 0.0, self_certainty
    )


def rent(entropy: Tensor, offsets: Tensor, *, answered: Tensor | None = None, missing: float = 7.0) -> Tensor:
    """R = -mean_t H_t, [S] in nats, at most 0 (RENT, arXiv 2505.22660).

    entropy [T]: over all response tokens. answered [S] bool: a response without an answer counts as one of
    entropy `missing`, the published code's option; so does one without tokens, always.
    """
    reward = -span_mean(packed("entropy", entropy, offsets), offsets)
    if answered is not None:
        reward = torch.where(per_span("answered", answered, offsets).bool(), reward, -missing)
    return with_empty(reward, offsets, -missing, entropy)


def em_rl_sequence(logp: Tensor, offsets: Tensor, *, empty: float = EMPTY_SUM) -> Tensor:
    """R = sum_t logp_t = log p(response), [S] in nats, at most 0 (EM-RL, sequence form, arXiv 2505.15134).

    logp [T]: over all response tokens. empty: reward of a response without tokens.
    """
    return with_empty(span_sum(packed_logp(logp, offsets), offsets), offsets, empty, logp)


def em_rl_token(entropy: Tensor, offsets: Tensor, *, empty: float = EMPTY_SUM) -> Tensor:
    """R = -sum_t H_t, [S] in nats, at most 0 (EM-RL, token form, arXiv 2505.15134).

    entropy [T]: over all response tokens; differentiable, as EM-FT wants it. empty: reward without tokens.
    """
    return with_empty(-span_sum(packed("entropy", entropy, offsets), offsets), offsets, empty, entropy)
