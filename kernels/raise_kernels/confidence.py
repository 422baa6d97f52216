"""Rewards of whole groups in one launch: tokens of every span in order, then SCRE or the rerank of IGSR.

One program holds one group, a span to a lane. The log-probability of a token is read, or joined from the
vocabulary splits of `token_stats` or `linear_stats`, so that logits or hidden states become rewards in two
launches. The meaning is
`reference.span_rewards`; pairs of spans of a group are compared as [GROUP, GROUP] tiles.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
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
    check_index,
    check_linear,
    check_per_span,
    check_spans,
    check_stats,
    on_host,
)
from raise_kernels._linear_operator import MEMORY_CPU, scratch_bytes
from raise_kernels._tiles import add_token, finish, merge_partials, no_tokens, scre_of, settle
from raise_kernels.linear_stats import linear_stats_forward, partial_bytes, partial_linear_stats
from raise_kernels.token_stats import Partials, partial_stats

MAX_GROUP = 64  # spans of a group: the tiles of 128 spill registers (raise_kernels.aot)
NO_BIN = tl.constexpr(1 << 30)


@triton.jit
def _median(same, rank, n, s):
    """Median score of each row's bin: the mean of the middle two. same [G, G]; rank, n, s [G]."""
    at_low = same & (rank[None, :] == ((n - 1) // 2)[:, None])
    at_high = same & (rank[None, :] == (n // 2)[:, None])
    low = tl.sum(tl.where(at_low, s[None, :], 0.0), 1)
    high = tl.sum(tl.where(at_high, s[None, :], 0.0), 1)
    return (low + high) / 2.0


@triton.jit
def _rerank(s, e, member, o_g, tau, penalty, min_bonus, slack, min_spread, BALANCED: tl.constexpr):
    """(reward, bin, bonus, applied) of the members of one group; s, e, member [G], o_g their indices."""
    k = tl.where(member, tl.floor(tl.div_rn(s, tau + tl.zeros_like(s)) + slack).to(tl.int32), -1)
    pair = member[:, None] & member[None, :]
    same = pair & (k[:, None] == k[None, :])
    n = tl.sum(same.to(tl.int32), 1)
    before = (s[None, :] < s[:, None]) | ((s[None, :] == s[:, None]) & (o_g[None, :] < o_g[:, None]))
    rank = tl.sum((same & before).to(tl.int32), 1)
    m = _median(same, rank, n, s)
    most = tl.max(tl.where(same, e[None, :], -float("inf")), 1)
    least = tl.min(tl.where(same, e[None, :], float("inf")), 1)
    spread = tl.maximum(most - least, min_spread)
    c = 0.5 + ((most + least) / 2.0 - e) / spread
    c = tl.minimum(tl.maximum(c, 0.0), 1.0)

    k_above = tl.min(tl.where(pair & (k[None, :] > k[:, None]), k[None, :], NO_BIN), 1)
    above = tl.max(tl.where(pair & (k[None, :] == k_above[:, None]), m[None, :], 0.0), 1)
    is_top = k_above == NO_BIN
    if BALANCED:
        k_below = tl.max(tl.where(pair & (k[None, :] < k[:, None]), k[None, :], -1), 1)
        below = tl.max(tl.where(pair & (k[None, :] == k_below[:, None]), m[None, :], 0.0), 1)
        room = tl.minimum(m - below, tau)
        a = tl.where(is_top, (c - 1.0) * room, (2.0 * c - 1.0) * tl.minimum(room, above - m))
        applied = member
    else:
        gap = tl.where(is_top, 1.0, above) - m
        a = c * gap - penalty * (1.0 - 1.0 / (n.to(tl.float32) + 1.0))
        applied = member & (a >= min_bonus)
    a = tl.where(member, a, 0.0)
    square = tl.where(member, m * (m + tl.where(applied, a, 0.0)), 0.0)
    return tl.sqrt_rn(square), k, a, applied


@triton.jit
def _whole_block(p_group, o_s, m_s, S, size, BLOCK: tl.constexpr):
    """Whether the spans o_s of a block are all the spans of one group; only the device knows these ids."""
    mine = tl.load(p_group + tl.program_id(0) * size).to(tl.int64)
    inside = tl.load(p_group + o_s, mask=m_s, other=0).to(tl.int64)
    everywhere = tl.zeros([BLOCK], tl.int32)
    for i_b in range(0, S, BLOCK):
        o_b = i_b + tl.arange(0, BLOCK)
        everywhere += ((tl.load(p_group + o_b, mask=o_b < S, other=0) == mine) & (o_b < S)).to(tl.int32)
    return (tl.sum((m_s & (inside == mine)).to(tl.int32), 0) == size) & (tl.sum(everywhere, 0) == size)


@triton.jit
def _join_logp(p_part, p_zy, p_y, p_rows, o_t, live, T, N, V, splits, ignore):
    """Log-probabilities of tokens o_t, joined from their vocabulary splits as `token_stats` does."""
    y = tl.load(p_y + o_t, mask=live, other=0).to(tl.int64)
    i_n = tl.load(p_rows + o_t, mask=live, other=0).to(tl.int64)
    known = live & (y != ignore) & (y >= 0) & (y < V) & (i_n >= 0) & (i_n < N)
    m, s0, _, _, _, _, _ = merge_partials(p_part, o_t, known, T, splits, 0)
    logp, _ = finish(m, s0, tl.load(p_zy + o_t, mask=known, other=0.0))
    return settle(logp, known & (s0 > 0.0), y != ignore)


@triton.jit(do_not_specialize=["T", "N", "S", "splits", "ignore", "size", "first"])
def _group_kernel(
    p_logp,  # [T], read, or written when FROM_SPLITS
    p_part,  # [fields, splits, T], or unused
    p_zy,  # [T], or unused
    p_y,  # [T], or unused
    p_rows,  # [T], or unused
    p_off,  # [S + 1]
    p_score,  # [S]
    p_strict,  # [S] bool
    p_group,  # [S]
    p_order,  # [S] spans sorted by group, or unused
    p_lo,  # [groups] bounds into p_order, or unused
    p_hi,
    p_real,  # [5, S]: reward, confidence, variance, nll, bonus
    p_bin,  # [S] int64
    p_applied,  # [S] bool
    T,
    N,
    V,
    S,
    splits,
    ignore,
    size,
    eta,
    lam,
    first,
    log_delta,
    tau,
    penalty,
    min_bonus,
    slack,
    min_spread,
    FROM_SPLITS: tl.constexpr,
    SORTED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BALANCED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_g = tl.arange(0, GROUP)
    if SORTED:
        i_lo = tl.load(p_lo + tl.program_id(0)).to(tl.int32)
        count = tl.load(p_hi + tl.program_id(0)).to(tl.int32) - i_lo
        if count == 0:
            return
        m_s = o_g < count
        o_s = tl.load(p_order + i_lo + o_g, mask=m_s, other=0).to(tl.int32)
        whole = count <= GROUP
    else:
        m_s = o_g < size
        o_s = tl.program_id(0) * size + tl.where(m_s, o_g, 0)
        whole = _whole_block(p_group, o_s, m_s, S, size, BLOCK)

    lo = tl.load(p_off + o_s, mask=m_s, other=0).to(tl.int64)
    hi = tl.load(p_off + o_s + 1, mask=m_s, other=0).to(tl.int64)
    fits = (lo >= 0) & (lo <= hi) & (hi <= T)
    n = tl.where(m_s & fits, hi - lo, 0).to(tl.int32)
    sums = no_tokens(o_g)
    for j in range(0, tl.max(n, 0)):
        live = j < n
        o_t = lo + j
        if FROM_SPLITS:
            logp = _join_logp(p_part, p_zy, p_y, p_rows, o_t, live, T, N, V, splits, ignore)
            tl.store(p_logp + o_t, logp, mask=live)
        else:
            logp = tl.load(p_logp + o_t, mask=live, other=0.0).to(tl.float32)
        sums = add_token(sums, logp, j, live, eta, first, log_delta)
    length = n.to(tl.float32)
    r, e, var = scre_of(sums, length, lam, NORMALIZE)

    s = tl.load(p_score + o_s, mask=m_s, other=0.0).to(tl.float32)
    strict = tl.load(p_strict + o_s, mask=m_s, other=0) != 0
    good = (s >= 0.0) & (s <= 1.0) & (e > -float("inf"))
    member = m_s & good & (s > 0.0) & (n > 0) & (strict == 0)
    ranked, k, a, applied = _rerank(s, e, member, o_g, tau, penalty, min_bonus, slack, min_spread, BALANCED)
    nothing = float("nan")
    reward = tl.where(strict, s * r, ranked)
    reward = tl.where(good & fits & whole, reward, nothing)
    sure = tl.where(n > 0, tl.exp(-e), 0.0)
    p = p_real + o_s
    tl.store(p, reward, mask=m_s)
    tl.store(p + S, tl.where(fits, tl.where(strict, r, sure), nothing), mask=m_s)
    tl.store(p + 2 * S, tl.where(fits, var, nothing), mask=m_s)
    tl.store(p + 3 * S, tl.where(fits, e, nothing), mask=m_s)
    tl.store(p + 4 * S, a, mask=m_s)
    tl.store(p_bin + o_s, k.to(tl.int64), mask=m_s)
    tl.store(p_applied + o_s, applied, mask=m_s)


class SpanRewards(NamedTuple):
    """Confidence rewards of packed spans with their working, [S] each; see `reference.SpanRewards`."""

    reward: Tensor
    confidence: Tensor
    variance: Tensor
    nll: Tensor
    bin: Tensor
    bonus: Tensor
    applied: Tensor


def group_warps(lanes: int) -> int:
    """Warps of a program whose tiles are [lanes, lanes]; others make some variants spill (aot.py)."""
    return 8 if lanes > 32 else 2


class _Groups(NamedTuple):
    programs: int
    lanes: int
    order: Tensor | None
    lo: Tensor | None
    hi: Tensor | None


def _arrange(group: Tensor, group_size: int | None) -> _Groups:
    """One program per group: blocks of `group_size`, or wherever a sorted id begins."""
    count = len(group)
    if group_size is not None:
        if group_size > MAX_GROUP:
            raise ValueError(_too_large(group_size))
        return _Groups(count // group_size, max(16, triton.next_power_of_2(group_size)), None, None, None)
    ids, order = torch.sort(group, stable=True)
    lo = torch.searchsorted(ids, ids)
    hi = torch.searchsorted(ids, ids, right=True)
    largest = count
    if on_host(group):
        largest = int((hi - lo).max())
        if largest > MAX_GROUP:
            raise ValueError(_too_large(largest))
    # Every span but the first of its group gets an empty program, so that no count is read back.
    hi = torch.where(lo == torch.arange(count, device=group.device), hi, lo)
    return _Groups(count, max(16, min(triton.next_power_of_2(largest), MAX_GROUP)), order, lo, hi)


def _too_large(size: int) -> str:
    return f'a group has {size} spans, the Triton rerank takes at most {MAX_GROUP}: use impl="reference"'


def span_rewards(
    logp: Tensor,
    offsets: Tensor,
    score: Tensor,
    strict: Tensor,
    group: Tensor,
    group_size: int | None = None,
    scre_how: Scre = SCRE,
    igsr_how: Igsr = IGSR,
    partials: Partials | None = None,
) -> SpanRewards:
    """As `reference.span_rewards`, in one launch; with `partials`, logp [T] is written, not read.

    Groups of up to `MAX_GROUP` spans. Equal ids belong together wherever they are; with group_size, each
    block of that many spans must be one whole group. Where only the device can see that this fails, rewards
    are NaN.
    """
    check_spans(logp, offsets)
    for name, value in (("score", score), ("strict", strict), ("group", group)):
        check_per_span(name, value, offsets)
    check_index("group", group, logp.device)
    if strict.dtype != torch.bool:
        raise TypeError(f"strict is {strict.dtype}; give bool: True for SCRE, False for IGSR")
    count = len(score)
    real = torch.empty(5, count, dtype=torch.float32, device=logp.device)
    bins = torch.empty(count, dtype=torch.int64, device=logp.device)
    applied = torch.empty(count, dtype=torch.bool, device=logp.device)
    if group_size is None:
        # A group that only the device sees to be too large has spans without a lane.
        for out, nothing in ((real, math.nan), (bins, -1), (applied, False)):
            out.fill_(nothing)
        if partials is not None:
            logp.fill_(math.nan)
    if count:
        groups = _arrange(group, group_size)
        logp = logp.contiguous()
        unused = logp
        rows = unused if partials is None or partials.rows is None else partials.rows
        _group_kernel[(groups.programs,)](
            logp,
            unused if partials is None else partials.values,
            unused if partials is None else partials.z_y,
            unused if partials is None else partials.targets,
            rows,
            offsets.contiguous(),
            score.contiguous(),
            strict.contiguous(),
            group.contiguous(),
            unused if groups.order is None else groups.order,
            unused if groups.lo is None else groups.lo,
            unused if groups.hi is None else groups.hi,
            real,
            bins,
            applied,
            len(logp),
            0 if partials is None else partials.row_count,
            0 if partials is None else partials.columns,
            count,
            0 if partials is None else partials.values.shape[1],
            0 if partials is None else partials.ignore_index,
            group_size or 0,
            scre_how.eta,
            scre_how.lam,
            scre_how.start,
            math.log(igsr_how.delta),
            igsr_how.tau,
            igsr_how.penalty,
            igsr_how.threshold,
            BIN_SLACK,
            MIN_SPREAD,
            FROM_SPLITS=partials is not None,
            SORTED=groups.order is not None,
            NORMALIZE=scre_how.normalize,
            BALANCED=igsr_how.variant == "balanced",
            GROUP=groups.lanes,
            BLOCK=256,
            num_warps=group_warps(groups.lanes),
        )
    return SpanRewards(real[0], real[1], real[2], real[3], bins, real[4], applied)


class Linear(NamedTuple):
    """Logits that are not stored: hidden [..., D] @ weight [V, D].T + bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


def confidence_rewards(
    source: Tensor | Linear | None,
    rows: Tensor,
    targets: Tensor,
    logp: Tensor | None,
    offsets: Tensor,
    score: Tensor,
    strict: Tensor,
    group: Tensor,
    group_size: int | None = None,
    how: LogitMap = PLAIN,
    scre_how: Scre = SCRE,
    igsr_how: Igsr = IGSR,
    memory: int | None = None,
) -> tuple[Tensor, SpanRewards]:
    """Log-probabilities [T] and rewards [S]: two launches from logits [..., V] or `Linear`, one from logp.

    targets, rows [T]; with logp, neither they nor the source are used. memory: bytes for what the splits of
    `Linear` leave, 1.2 KB a token; where they need more, two launches for each of several chunks of tokens
    come before the one for the rewards. Results do not depend on it.
    """
    partials = None
    if logp is None:
        if source is None:
            raise ValueError("got neither logits nor logp; give one of them")
        if isinstance(source, Linear):
            logp, partials = _from_hidden(source, targets, rows, how, memory)
        else:
            logp, partials = _from_logits(source, targets, rows, how)
    result = span_rewards(logp, offsets, score, strict, group, group_size, scre_how, igsr_how, partials)
    return logp, result


def _from_logits(
    source: Tensor, targets: Tensor, rows: Tensor, how: LogitMap
) -> tuple[Tensor, Partials | None]:
    """Room for log-probabilities [T], and the numbers of each (row, vocabulary split) to make them from."""
    check_stats(source, targets, rows)
    logp = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
    if not len(targets):
        return logp, None
    return logp, partial_stats(source, targets.contiguous(), rows.contiguous(), how, 0)


def _from_hidden(
    source: Linear, targets: Tensor, rows: Tensor, how: LogitMap, memory: int | None
) -> tuple[Tensor, Partials | None]:
    """As `_from_logits`; or log-probabilities [T] alone, where the splits leave more than `memory`."""
    hidden, weight, bias = source
    check_linear(hidden, weight, bias, targets, rows)
    y, n = targets.long(), rows.long()
    memory = scratch_bytes(memory, hidden, MEMORY_CPU)
    if partial_bytes(len(y), how.columns(len(weight)), 0) > memory:
        return linear_stats_forward(hidden, weight, bias, y, n, how, ("logp",), 1, memory)["logp"], None
    logp = torch.empty(len(y), dtype=torch.float32, device=y.device)
    if not len(y):
        return logp, None
    return logp, partial_linear_stats(hidden, weight, bias, y, n, how, 0)
