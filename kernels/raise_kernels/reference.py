"""What every operation means, in plain torch.

Float64 in, float64 out; any other float gives float32. Runs anywhere, follows autograd, saves nothing at the
price of clarity. The fast implementations never import this file; tests and users compare them with it.
Logs are natural: log-probabilities and entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raise_kernels._checks import (
    BIN_SLACK,
    IGSR,
    MIN_SPREAD,
    PLAIN,
    SCRE,
    Igsr,
    LogitMap,
    Scre,
    check_candidates,
    check_index,
    check_linear,
    check_per_span,
    check_spans,
    check_stats,
    check_want,
)
from raise_kernels.reference_product import linear_logits, wide
from raise_kernels.reference_spans import Spans, spans_of

INF = math.inf


def transform(x: Tensor, how: LogitMap) -> Tensor:
    """Raw logits x [..., V] to z [..., V]: scale, softcap, temperature, and the vocabulary mask last."""
    columns = torch.arange(x.shape[-1], device=x.device)
    masked = (x == -INF) | (columns >= how.columns(x.shape[-1]))
    # Masked before and after: the first keeps infinities out of the gradient, the second is the mask.
    z = wide(x).masked_fill(masked, 0.0) * how.logit_scale
    if how.softcap is not None:
        z = how.softcap * torch.tanh(z / how.softcap)
    return (z / how.temperature).masked_fill(masked, -INF)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
) -> dict[str, Tensor]:
    """Statistics of softmax(z) for each scored row.

        logp            z[y] - lse                    lse       log sum_v exp z[v]
        entropy         -sum_v p[v] log p[v]          max_logp  max_v log p[v]
        self_certainty  lse - mean z - log V'         the V' columns of finite z: KL(uniform || p)
        varentropy      sum_v p[v] (log p[v] + entropy)^2
        rank            columns with z[v] > z[y]      topk_logp_mean   mean of the k highest log p

    logits [..., V]; targets [...]; with rows [T], targets [T] and only those rows of the flattened leading
    axes. Outputs have the shape of targets, one for each name in `want`. Gradients flow through logp, lse,
    entropy and self_certainty. A row whose target is `ignore_index` gives 0 and gradient 0. A row with no
    finite logit, a NaN, z = +inf, a target outside the valid vocabulary or a row number outside gives
    NaN and gradient 0.
    """
    names = check_want(want)
    check_stats(logits, targets, rows)
    flat = logits.reshape(-1, logits.shape[-1])
    y = targets.reshape(-1).long()
    n = torch.arange(len(flat), device=flat.device) if rows is None else rows.long()
    scored = y != how.ignore_index
    known = (n >= 0) & (n < len(flat))
    x = flat[torch.where(known & scored, n, 0)] if len(flat) else flat.new_zeros(len(y), flat.shape[-1])
    stats = _row_stats(x, y, scored, known, how, names, topk)
    return {name: value.reshape(targets.shape) for name, value in stats.items()}


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
) -> dict[str, Tensor]:
    """`token_stats` of the logits hidden @ weight.T + bias. hidden [..., D], weight [V, D], bias [V]."""
    check_linear(hidden, weight, bias, targets, rows)
    logits = linear_logits(hidden, weight, bias)
    return token_stats(logits, targets, rows=rows, how=how, want=want, topk=topk)


def candidate_logp(
    logits: Tensor, candidates: Tensor, *, rows: Tensor | None = None, how: LogitMap = PLAIN
) -> Tensor:
    """log p of each of K candidates as `token_stats` gives it alone, in the shape of candidates [..., K]."""
    check_candidates(candidates, logits.device)
    check_stats(logits, candidates[..., 0], rows)
    n = torch.arange(candidates[..., 0].numel(), device=logits.device) if rows is None else rows
    each = n.repeat_interleave(candidates.shape[-1])
    logp = token_stats(logits, candidates.reshape(-1), rows=each, how=how)["logp"]
    return logp.view(candidates.shape)


def linear_candidate_logp(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
) -> Tensor:
    """`candidate_logp` of the logits hidden @ weight.T + bias. hidden [..., D], weight [V, D], bias [V]."""
    check_candidates(candidates, hidden.device)
    check_linear(hidden, weight, bias, candidates[..., 0], rows)
    return candidate_logp(linear_logits(hidden, weight, bias), candidates, rows=rows, how=how)


def _row_stats(
    x: Tensor, y: Tensor, scored: Tensor, known: Tensor, how: LogitMap, names: Sequence[str], topk: int
) -> dict[str, Tensor]:
    vocab = how.columns(x.shape[-1])
    in_range = (y >= 0) & (y < vocab)
    with torch.no_grad():
        z = transform(x, how)
        bad = ~known | ~in_range | ~z.isfinite().any(-1) | z.isnan().any(-1) | (z == INF).any(-1)
    # A row without a result takes part in no arithmetic: its gradient is 0 and its NaN reaches nothing else.
    z = transform(torch.where((scored & ~bad)[:, None], x, 0.0), how)
    finite = z.isfinite()
    count = finite.sum(-1)
    log_p = torch.log_softmax(z, -1)
    support = torch.where(finite, log_p, 0.0)
    chosen = torch.where(in_range, y, 0)[:, None]
    entropy = -(support.exp() * support).sum(-1)
    frozen, held = log_p.detach(), support.detach()
    makers = {
        "logp": lambda: log_p.gather(-1, chosen)[:, 0],
        "lse": lambda: torch.logsumexp(z, -1),
        "entropy": lambda: entropy,
        "self_certainty": lambda: -support.sum(-1) / count - count.to(z.dtype).log(),
        "max_logp": lambda: frozen.amax(-1),
        "varentropy": lambda: (
            torch.where(finite, frozen.exp(), 0.0) * (held + entropy.detach()[:, None]) ** 2
        ).sum(-1),
        "rank": lambda: (z > z.gather(-1, chosen)).sum(-1).to(z.dtype),
        "topk_logp_mean": lambda: _topk_mean(frozen, count, topk),
    }
    out = {}
    for name in names:
        value = makers[name]().masked_fill(bad, math.nan)
        out[name] = torch.where(scored, value, 0.0)
    return out


def _topk_mean(log_p: Tensor, count: Tensor, topk: int) -> Tensor:
    if topk < 1:
        raise ValueError(f"topk is {topk}; give at least 1")
    best = log_p.topk(min(topk, log_p.shape[-1]), dim=-1).values
    kept = best.isfinite()
    return torch.where(kept, best, 0.0).sum(-1) / torch.minimum(count, torch.tensor(best.shape[-1]))


def scre(logp: Tensor, offsets: Tensor, how: Scre = SCRE) -> Tensor:
    """Self-confidence reward of each span, in [0, 1]; 0 for an empty span (Video-RAISE, CVPR 2026).

        w_j = exp(-eta * j),  j = first_index, first_index + 1, ...
        r   = exp(sum_j w_j * logp_j - lam * var(p))

    var is the population variance of the probabilities. A token of probability 0 makes the reward 0; a NaN or
    +inf makes its span NaN, and so do bounds that leave [0, T] or fall, where only a device knows them. logp
    [T] in nats, offsets [S+1] -> [S]. Differentiable in logp: the gradient of a span whose reward is 0 or NaN
    is 0.
    """
    check_spans(logp, offsets)
    spans = spans_of(offsets.long(), len(logp))
    known, lost = _known(wide(logp), spans)
    r = torch.exp(_weighted_sum(known, spans, how) - how.lam * probability_variance(known, spans))
    return torch.where(spans.lengths > 0, r, 0.0).masked_fill(lost, math.nan)


def span_logp(logp: Tensor, offsets: Tensor, how: Scre) -> Tensor:
    """sum_j w_j * logp_j of each span, with the weights of `scre`; 0 for an empty span.

    eta = 0 gives the sum, and normalized the mean, whose exponentials are the likelihood of the answer
    (VeriFree, arXiv 2505.21493) and its geometric mean for a token. A token of probability 0 gives -inf, a
    NaN or +inf gives NaN. logp [T] in nats, offsets [S+1] -> [S]. Differentiable in logp: 0 for tokens of
    probability 0 and in spans that are NaN.
    """
    check_spans(logp, offsets)
    spans = spans_of(offsets.long(), len(logp))
    known, lost = _known(wide(logp), spans)
    return _weighted_sum(known, spans, how).masked_fill(lost, math.nan)


def _known(logp: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """logp with 0 in the spans that hold a NaN or +inf or do not fit, and which spans [S] do."""
    lost = (spans.sum((~(logp < INF)).to(logp.dtype)) > 0) | ~spans.fits
    return torch.where(lost[spans.owner] | ~spans.inside, 0.0, logp), lost


def _weighted_sum(logp: Tensor, spans: Spans, how: Scre) -> Tensor:
    """sum_j w_j * logp_j of each span, [S]."""
    weight = torch.exp(-how.eta * (spans.position + how.start).to(logp.dtype))
    if how.normalize:
        weight = weight / spans.sum(weight)[spans.owner]
    # where, not multiply: a weight that underflows to 0 must not turn log 0 into NaN
    return spans.sum(torch.where(logp == -INF, -INF, weight * logp))


def probability_variance(logp: Tensor, spans: Spans) -> Tensor:
    """Population variance of exp(logp) in each span [S], by two passes over 1 - p, exact near p = 1."""
    q = -torch.expm1(logp)
    return spans.mean((q - spans.mean(q)[spans.owner]) ** 2)


def mean_nll(logp: Tensor, spans: Spans, delta: float) -> Tensor:
    """e = mean over the span of -log(p + delta), [S], in nats; smaller is more confident; 0 when empty."""
    return spans.mean(-torch.logaddexp(logp, logp.new_tensor(math.log(delta))))


class Reranked(NamedTuple):
    """IGSR with its working. Rows in no bin have bin -1 and zeros."""

    reward: Tensor  # [S]
    nll: Tensor  # [S] e_i, nats
    bin: Tensor  # [S] int64
    bonus: Tensor  # [S] a_i ("paper") or t_i * h_k ("balanced")
    applied: Tensor  # [S] bool: the bonus was given


def igsr(logp: Tensor, offsets: Tensor, score: Tensor, group: Tensor, how: Igsr = IGSR) -> Tensor:
    """Reward of each open-ended answer: its text score, reranked by confidence. See `igsr_parts`."""
    return igsr_parts(logp, offsets, score, group, how).reward


def igsr_parts(
    logp: Tensor,
    offsets: Tensor,
    score: Tensor,
    group: Tensor,
    how: Igsr = IGSR,
    among: Tensor | None = None,
) -> Reranked:
    """IGSR of Video-RAISE (CVPR 2026) as this project reconstructs it: the paper's a_i is not public.

    Inside one group, rows of score s in (0, 1] with a non-empty span fall into bins floor(s / tau + 1e-4).
    With m_k the median score of bin k, n_k its size, e_i the mean -log(p + delta) of row i, mid and spread
    the midrange and range of e in the bin, and "above" the next non-empty bin (a median of 1 over the top):

        c_i = clamp(1/2 + (mid - e_i) / max(spread, 0.01), 0, 1)
        paper     a_i = c_i * (m_above - m_k) - penalty * (1 - 1 / (n_k + 1))
                  reward_i = sqrt(m_k * (m_k + a_i * [a_i >= min_bonus]))
        balanced  h_k = min(m_above - m_k, m_k - m_below, tau), the top bin without its first term
                  t_i = 2 c_i - 1, in the top bin c_i - 1;    reward_i = sqrt(m_k * (m_k + t_i * h_k))

    Score 0 or an empty span gives 0. A score that is NaN or outside [0, 1], or a NaN or +inf in the span,
    gives NaN for that row, which joins no bin. logp [T], offsets [S+1], score [S], group [S] (equal ids
    belong together, adjacent or not), among [S] bool (rows that may join a bin; all when None).
    """
    check_spans(logp, offsets)
    check_per_span("score", score, offsets)
    check_per_span("group", group, offsets)
    check_index("group", group, logp.device)
    logp = wide(logp)
    score = score.to(logp.dtype)
    spans = spans_of(offsets.long(), len(logp))
    e = mean_nll(logp, spans, how.delta).masked_fill(~spans.fits, math.nan)
    bad = ~((score >= 0) & (score <= 1)) | ~e.isfinite()
    member = ~bad & (score > 0) & (spans.lengths > 0)
    if among is not None:
        member &= among
    bins = torch.where(member, torch.floor(score / how.tau + BIN_SLACK), -1.0).long()
    reward, bonus = torch.zeros_like(e), torch.zeros_like(e)
    applied = torch.zeros_like(member)
    for g in torch.unique(group[member]):
        levels = torch.unique(bins[member & (group == g)])  # ascending
        inside = [member & (group == g) & (bins == k) for k in levels]
        medians = [_median(score[rows]) for rows in inside]
        for k, rows in enumerate(inside):
            below = medians[k - 1] if k > 0 else torch.zeros_like(medians[k])
            above = medians[k + 1] if k + 1 < len(medians) else None
            bonus[rows], applied[rows] = _bonus(e[rows], medians[k], below, above, how)
            reward[rows] = torch.sqrt(medians[k] * (medians[k] + torch.where(applied, bonus, 0.0)[rows]))
    return Reranked(reward.masked_fill(bad, math.nan), e, bins, bonus, applied)


def _median(values: Tensor) -> Tensor:
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _bonus(e: Tensor, m: Tensor, below: Tensor, above: Tensor | None, how: Igsr) -> tuple[Tensor, Tensor]:
    """The bonus of each row of one bin, and which rows are given it. e [n_k]."""
    mid, spread = (e.max() + e.min()) / 2, e.max() - e.min()
    c = (0.5 + (mid - e) / spread.clamp(min=MIN_SPREAD)).clamp(0, 1)
    if how.variant == "paper":
        gap = (1 if above is None else above) - m
        a = c * gap - how.penalty * (1 - 1 / (len(e) + 1))
        return a, a >= how.threshold
    room = torch.minimum(m - below, torch.full_like(m, how.tau))
    t = c - 1 if above is None else 2 * c - 1
    h = room if above is None else torch.minimum(room, above - m)
    return t * h, torch.ones_like(e, dtype=torch.bool)


class SpanRewards(NamedTuple):
    """Confidence rewards of packed spans with their working, [S] each."""

    reward: Tensor
    confidence: Tensor  # SCRE value of a strict row, exp(-e) of an open one; 0 for an empty span
    variance: Tensor  # of the token probabilities
    nll: Tensor  # e, nats
    bin: Tensor  # int64, -1 for rows in no bin
    bonus: Tensor
    applied: Tensor  # bool


def span_rewards(
    logp: Tensor,
    offsets: Tensor,
    score: Tensor,
    strict: Tensor,
    group: Tensor,
    scre_how: Scre = SCRE,
    igsr_how: Igsr = IGSR,
) -> SpanRewards:
    """Reward of every span: strict rows score * SCRE, the others IGSR among the open rows of their group.

    logp [T], offsets [S+1], score [S] in [0, 1], strict [S] bool, group [S]. A score outside [0, 1] gives
    NaN.
    """
    check_per_span("strict", strict, offsets)
    if strict.dtype != torch.bool:
        raise TypeError(f"strict is {strict.dtype}; give bool: True for SCRE, False for IGSR")
    open_rows = igsr_parts(logp, offsets, score, group, igsr_how, among=~strict)
    r = scre(logp, offsets, scre_how)
    spans = spans_of(offsets.long(), len(logp))
    score = score.to(r.dtype)
    valid = (score >= 0) & (score <= 1)
    sure = torch.where(spans.lengths == 0, 0.0, torch.exp(-open_rows.nll))
    return SpanRewards(
        reward=torch.where(strict, torch.where(valid, score * r, math.nan), open_rows.reward),
        confidence=torch.where(strict, r, sure),
        variance=probability_variance(wide(logp), spans).masked_fill(~spans.fits, math.nan),
        nll=open_rows.nll,
        bin=open_rows.bin,
        bonus=open_rows.bonus,
        applied=open_rows.applied,
    )
