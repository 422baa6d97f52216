"""Rewards from the log-probabilities of an answer: the model's own, or the reference one."""

from __future__ import annotations

from torch import Tensor

from raise_core.family.segments import (
    EMPTY_MEAN,
    EMPTY_SUM,
    by_span,
    each_alone,
    packed,
    packed_logp,
    per_span,
    span_mean,
    span_sum,
    with_empty,
)


def sequence_likelihood(logp: Tensor, offsets: Tensor) -> Tensor:
    """R = exp(sum_t logp_t), the probability of the whole span, [S] in [0, 1] (VeriFree, arXiv 2505.21493).

    The paper takes the reference answer. logp [T] in nats; an empty span gives 0. It vanishes as answers
    grow.
    """
    return with_empty(span_sum(packed_logp(logp, offsets), offsets).exp(), offsets, 0.0, logp)


def sum_logp(logp: Tensor, offsets: Tensor, *, empty: float = EMPTY_SUM) -> Tensor:
    """R = sum_t logp_t, [S] in nats, at most 0 (log-probability reward, arXiv 2602.03979).

    empty: reward of a span without tokens, whose sum 0 would be certainty. A token of probability 0 gives
    -inf.
    """
    return with_empty(span_sum(packed_logp(logp, offsets), offsets), offsets, empty, logp)


def mean_logp(logp: Tensor, offsets: Tensor, *, empty: float = EMPTY_MEAN) -> Tensor:
    """R = mean_t logp_t, [S] in nats per token, at most 0 (average log-probability, arXiv 2602.03979).

    empty: reward of a span without tokens, whose mean 0 would be certainty. A token of probability 0 gives
    -inf.
    """
    return with_empty(span_mean(packed_logp(logp, offsets), offsets), offsets, empty, logp)


def mean_prob(logp: Tensor, offsets: Tensor) -> Tensor:
    """R = mean_t exp(logp_t), [S] in [0, 1] (RLPR before it is debiased, arXiv 2506.18254). Empty: 0."""
    return with_empty(span_mean(packed_logp(logp, offsets).exp(), offsets), offsets, 0.0, logp)


def min_prob(logp: Tensor, offsets: Tensor) -> Tensor:
    """R = min_t exp(logp_t), [S] in [0, 1]: the least certain token (Video-RAISE's comparison). Empty: 0."""
    values = packed_logp(logp, offsets)
    least = values.new_zeros(len(offsets) - 1)
    for s, part in enumerate(by_span(values, offsets)):
        if len(part):
            least[s] = part.amin().exp()
    return with_empty(least, offsets, 0.0, logp)


def rlpr(logp: Tensor, offsets: Tensor, baseline: Tensor | None = None) -> Tensor:
    """r = clip(mean_t p_t - r', 0, 1), [S] (RLPR, arXiv 2506.18254); without a baseline r' the mean alone.

    logp [T]: of the reference answer after the model's reasoning. baseline [S]: `mean_prob` of the same
    answer right after the prompt, so that an answer that is likely anyway earns nothing. The paper weighs
    the result 0.9 beside 0.1 for the form. Empty: 0.
    """
    mean = mean_prob(logp, offsets)
    if baseline is None:
        return mean
    prior = packed("baseline", per_span("baseline", baseline, offsets), each_alone(len(mean), offsets))
    return with_empty((mean.double() - prior).clamp(0.0, 1.0), offsets, 0.0, logp)
