"""Rewards of packed answer spans: SCRE, IGSR, and both straight from logits or hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raise_core.ops import reward_operator
from raise_core.ops.impl import chosen_impl
from raise_kernels import _span_operator, reference
from raise_kernels._checks import (
    Igsr,
    LogitMap,
    Scre,
    check_linear,
    check_memory,
    check_per_span,
    check_spans,
    check_stats,
    check_tensor,
    check_whole,
)

if TYPE_CHECKING:
    from raise_core.spans import Spans


SPAN_FIELDS = ("rows", "targets", "offsets", "group")


@dataclass(frozen=True)
class Rewards:
    """Rewards of S spans.

    reward [S]: what training uses. confidence [S]: SCRE value (strict) or exp(-e) (open), also of wrong
    answers. parts: logp [T]; per span [S]: length (tokens), variance (of the probabilities), nll (e, nats),
    bin (-1: in none), bonus (a_i), is_bonus, strict, group.
    """

    reward: Tensor
    confidence: Tensor
    parts: dict[str, Tensor]

    def metrics(self) -> dict[str, Tensor]:
        """Shares over the open-ended rows that are in a bin; 0-d tensors, NaN when there are none.

        bonus_share: rows whose bonus was given and is above 0. no_effect_share: groups in which every bin
        gives all its rows one reward, so that confidence changed nothing.
        """
        bins = self.parts["bin"]
        member = bins >= 0
        given = self.parts["is_bonus"] & member & (self.parts["bonus"] > 0)
        same = (self.parts["group"][:, None] == self.parts["group"][None, :]) & member[None, :]
        apart = (bins[:, None] == bins[None, :]) & (self.reward[:, None] != self.reward[None, :])
        changed = member & (same & apart).any(1)
        # A group's first member stands for it, so that nothing depends on the number of groups.
        first = member & ~same.tril(-1).any(1)
        still = first & ~(same & changed[None, :]).any(1)
        return {
            "bonus_share": given.sum() / member.sum(),
            "no_effect_share": still.sum() / first.sum(),
        }


def scre(
    logp: Tensor,
    offsets: Tensor,
    *,
    eta: float = 0.1,
    lam: float = 1.0,
    first_index: int = 1,
    normalize: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Self-confidence reward of each span, [S] in [0, 1] (SCRE, Video-RAISE, CVPR 2026).

        w_j = exp(-eta * j), j = first_index, ...      r = exp(sum_j w_j * logp_j - lam * var(p))

    logp [T] in nats, packed; offsets [S+1]. An empty span gives 0, a NaN or +inf in it NaN. The defaults of
    eta and lam are this project's. Differentiable in logp, so that it can be a loss; where the result is 0 or
    NaN the gradient is 0. Raises ValueError for options out of range and for offsets that do not fit logp;
    where only the device knows them, a span that leaves [0, T] is NaN.
    """
    how = Scre(eta=eta, lam=lam, first_index=first_index, normalize=normalize)
    check_tensor("logp", logp)
    if chosen_impl(logp, impl) == "triton":
        return _span_operator.run("scre", logp, offsets, how)
    return reference.scre(logp, _span_operator.seen_offsets(logp, offsets), how)


def igsr(
    logp: Tensor,
    offsets: Tensor,
    score: Tensor,
    group: Tensor,
    *,
    tau: float = 0.1,
    delta: float = 1e-6,
    penalty: float = 0.05,
    min_bonus: float | None = None,
    variant: str = "paper",
    impl: str = "auto",
) -> Tensor:
    """Text scores reranked by confidence inside each group, [S] (IGSR, Video-RAISE, CVPR 2026).

    Rows fall into bins of width tau by score; the more confident rows of a bin are lifted towards the next
    bin. The paper's bonus is not public: `raise_kernels.reference.igsr_parts` has this project's
    reconstruction (variant="paper") and its alternative ("balanced"). logp [T] nats, offsets [S+1], score [S]
    in [0, 1], group [S] (equal ids belong together). Score 0 or an empty span gives 0; a score outside [0, 1]
    gives NaN. No gradient. Raises ValueError for options out of range (tau in (0, 0.5]) and for shapes that
    do not fit.
    """
    Igsr(tau=tau, delta=delta, penalty=penalty, min_bonus=min_bonus, variant=variant)
    check_tensor("logp", logp)
    chosen = chosen_impl(logp, impl)
    check_spans(logp, offsets)
    _check_per_span(offsets, score=score, group=group)
    out: Tensor = torch.ops.raise_core.igsr(
        logp.detach(), offsets, score, group, tau, delta, penalty, min_bonus, variant, chosen
    )
    return out


@torch.no_grad()
def confidence_rewards(
    spans: Spans,
    score: Tensor,
    strict: Tensor,
    *,
    logits: Tensor | None = None,
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    logp: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int | None = None,
    eta: float = 0.1,
    lam: float = 1.0,
    first_index: int = 1,
    normalize: bool = False,
    tau: float = 0.1,
    delta: float = 1e-6,
    penalty: float = 0.05,
    min_bonus: float | None = None,
    variant: str = "paper",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    memory: int | None = None,
    impl: str = "auto",
) -> Rewards:
    """Rewards of packed answer spans: SCRE where strict, IGSR elsewhere. No gradient.

    spans: S spans over T tokens. score [S] in [0, 1]: text score; strict [S] bool. One source of
    log-probabilities: logits [..., V] (row spans.rows[t] predicts token t), hidden [..., D] with weight [V,
    D] (and bias [V]), or logp [T]. A strict reward is score * SCRE. An empty span and a wrong answer (score
    0) give 0; a score that is NaN or outside [0, 1] gives NaN. group_size: every group must be that many
    adjacent spans; else ValueError where the ids are on the CPU, and NaN for the spans of such a group where
    only the device knows them. Triton never waits for the device, and takes at most 64 spans a group.
    memory: bytes of scratch from hidden states, as in `linear_token_stats`; results do not depend on it. The
    other options are those of `scre`, `igsr` and `token_stats`; no token of a span is ever ignored.
    """
    _check_spans(spans)
    _check_source(logits, hidden, weight, logp)
    if hidden is None and bias is not None:
        raise ValueError("bias is given without hidden and weight; give all three, or no bias")
    name, source = next(
        (n, x) for n, x in (("logits", logits), ("hidden", hidden), ("logp", logp)) if x is not None
    )
    check_tensor(name, source)
    chosen = chosen_impl(source, impl)
    # Built for their checks; a graph holds the scalars.
    Scre(eta=eta, lam=lam, first_index=first_index, normalize=normalize)
    Igsr(tau=tau, delta=delta, penalty=penalty, min_bonus=min_bonus, variant=variant)
    LogitMap(temperature=temperature, logit_scale=logit_scale, softcap=softcap, valid_vocab=valid_vocab)
    if group_size is not None:
        check_whole("group_size", group_size, "None for groups of any size")
    check_memory(memory)
    # Beside a tensor without values the operator would run its form without values, which checks nothing.
    if hidden is not None and weight is not None:
        check_linear(hidden, weight, bias, spans.targets, spans.rows)
    elif logits is not None:
        check_stats(logits, spans.targets, spans.rows)
    elif logp is not None:
        check_spans(logp, spans.offsets)
    _check_per_span(spans.offsets, score=score, strict=strict, group=spans.group)
    parts, bins, applied, made = torch.ops.raise_core.confidence_rewards(
        logits, hidden, weight, bias, logp, spans.rows, spans.targets, spans.offsets, spans.group, score,
        strict, temperature, logit_scale, softcap, valid_vocab, eta, lam, first_index, normalize, tau, delta,
        penalty, min_bonus, variant, group_size, memory, chosen,
    )  # fmt: skip
    found = dict(zip(reward_operator.PARTS, parts.unbind(), strict=True))
    working = {
        "logp": made if logp is None else logp,
        "length": spans.offsets[1:] - spans.offsets[:-1],
        "variance": found["variance"],
        "nll": found["nll"],
        "bin": bins,
        "bonus": found["bonus"],
        "is_bonus": applied,
        "strict": strict,
        "group": spans.group,
    }
    return Rewards(found["reward"], found["confidence"], working)


def _check_spans(spans: Spans) -> None:
    """Refuse what has not the tensors of `Spans`, such as the list that a finder of spans returns."""
    if any(not isinstance(getattr(spans, name, None), Tensor) for name in SPAN_FIELDS):
        raise TypeError(
            f"spans is a {type(spans).__name__}; give Spans(rows, targets, offsets, group, owner), which "
            "build_spans(found, completion_ids, first_rows, group) makes of a list of found spans"
        )


def _check_per_span(offsets: Tensor, **given: Tensor) -> None:
    for name, values in given.items():
        check_per_span(name, values, offsets)


def _check_source(
    logits: Tensor | None, hidden: Tensor | None, weight: Tensor | None, logp: Tensor | None
) -> None:
    if (hidden is None) != (weight is None):
        raise ValueError("hidden and weight go together: give both, or neither")
    given = [n for n, x in (("logits", logits), ("hidden", hidden), ("logp", logp)) if x is not None]
    if len(given) != 1:
        raise ValueError(f"got {given or 'nothing'}; give exactly one of logits, hidden with weight, or logp")
