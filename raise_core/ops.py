"""Reward operations over packed answer spans, and the choice of what runs them.

    impl="auto"        CUDA, HIP and XPU tensors: triton; CPU tensors: native; anything else: the reference
    impl="triton"      Triton kernels; on CPU tensors only under TRITON_INTERPRET=1
    impl="native"      PyTorch on the CPU, in blocks; span rewards are the reference's own lines
    impl="reference"   the definition, in plain PyTorch, anywhere, fp64-capable

A fallback is announced once; `chosen_impl` says beforehand what a call will run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raise_kernels import _operator, linear, reference
from raise_kernels._checks import Igsr, LogitMap, Scre, on_host

if TYPE_CHECKING:
    from raise_core.spans import Spans

IMPLS = ("auto", "triton", "native", "reference")
_announced: set[str] = set()


@dataclass(frozen=True)
class TokenStats:
    """Statistics of each scored row: one tensor with the shape of targets per wanted name, None for the rest.

    logp, lse, entropy, max_logp and topk_logp_mean are in nats, self_certainty and varentropy in nats and
    nats squared, rank counts the columns with a larger logit than the target's. fp32 (fp64 for fp64 logits on
    the CPU). A row that is not scored (`ignore_index`) holds 0; a row without a result holds NaN: no finite
    logit, a NaN or +inf, a target outside the vocabulary, a row number outside the logits.
    """

    logp: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    self_certainty: Tensor | None = None
    max_logp: Tensor | None = None
    varentropy: Tensor | None = None
    rank: Tensor | None = None
    topk_logp_mean: Tensor | None = None


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


def chosen_impl(x: Tensor, impl: str = "auto") -> str:
    """The implementation that a call on x runs: "triton", "native" or "reference".

    Raises ValueError for an implementation that is unknown or cannot run on x's device here.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; give one of {IMPLS}")
    kind = x.device.type
    if impl == "native" and kind != "cpu":
        raise ValueError(
            f'impl="native" runs on the CPU, the tensors are on {x.device}; use "auto" or "triton"'
        )
    # Neither look-up can be traced; a graph that is being compiled finds triton missing when it runs.
    tracing = torch.compiler.is_compiling()
    if impl == "triton" and not tracing:
        _check_triton(kind)
    if impl != "auto":
        return impl
    if kind == "cpu":
        return "native"
    if kind in ("cuda", "xpu") and (tracing or find_spec("triton") is not None):
        return "triton"
    why = "triton is not installed" if kind in ("cuda", "xpu") else "there are no kernels for this device"
    if kind not in _announced:
        _announced.add(kind)
        warnings.warn(f"raise_core runs its reference implementation on {kind}: {why}", stacklevel=3)
    return "reference"


def _check_triton(kind: str) -> None:
    if find_spec("triton") is None:
        raise ValueError('impl="triton" needs the package triton, which is not installed; use impl="auto"')
    if kind == "cpu" and not import_module("triton").knobs.runtime.interpret:
        raise ValueError(
            'impl="triton" on CPU tensors runs in the Triton interpreter only: set TRITON_INTERPRET=1 before '
            'triton is first imported, or use impl="native"'
        )


def _kernels(name: str) -> Any:
    """A module of Triton kernels, imported at first use: `import raise_core` works without triton."""
    return import_module(f"raise_kernels.{name}")


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
    impl: str = "auto",
) -> TokenStats:
    """Statistics of softmax(z) for each scored row, from one read of the logits.

        z = softcap * tanh(logit_scale * logits / softcap) / temperature         (no tanh without a softcap)
        logp = z[y] - lse      entropy = -sum p log p      self_certainty = lse - mean z - log V'      (nats)

    logits [..., V], any float dtype and strides; targets [...] int64 or int32. With rows [T], only those rows
    of the flattened leading axes are scored and targets is [T]. valid_vocab: columns from there on are
    padding. want: names of `TokenStats`. topk: k of topk_logp_mean (DeepConf), "native" and "reference" only.
    Differentiable in logits through logp, lse, entropy and self_certainty. Raises ValueError or TypeError for
    arguments that do not fit; what only the data shows gives NaN for its row.
    """
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    stats = _stats(logits, targets, rows, how, want, topk, chosen_impl(logits, impl))
    return TokenStats(**stats)


def _stats(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    how: LogitMap,
    want: Sequence[str],
    topk: int,
    impl: str,
) -> dict[str, Tensor]:
    if impl == "reference":
        return reference.token_stats(logits, targets, rows=rows, how=how, want=want, topk=topk)
    return _operator.token_stats(impl, logits, targets, rows=rows, how=how, want=want, topk=topk)


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

    logp [T] in nats, packed; offsets [S+1]. An empty span gives 0. The defaults of eta and lam are this
    project's. Raises ValueError for options out of range and for offsets that do not fit logp.
    """
    how = Scre(eta=eta, lam=lam, first_index=first_index, normalize=normalize)
    if chosen_impl(logp, impl) == "triton":
        out: Tensor = _kernels("scre").scre(logp, offsets, how)
        return out
    return reference.scre(logp, offsets, how)


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
    gives NaN. Raises ValueError for options out of range (tau in (0, 0.5]) and for shapes that do not fit.
    """
    how = Igsr(tau=tau, delta=delta, penalty=penalty, min_bonus=min_bonus, variant=variant)
    if chosen_impl(logp, impl) == "triton":
        out: Tensor = _kernels("igsr").igsr(logp, offsets, score, group, how)
        return out
    return reference.igsr(logp, offsets, score, group, how)


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
    impl: str = "auto",
) -> Rewards:
    """Rewards of packed answer spans: SCRE where strict, IGSR elsewhere. No gradient.

    spans: S spans over T tokens. score [S] in [0, 1]: text score; strict [S] bool. One source of
    log-probabilities: logits [..., V] (row spans.rows[t] predicts token t), hidden [..., D] with weight [V,
    D] (and bias [V]), or logp [T]. A strict reward is score * SCRE. An empty span and a wrong answer (score
    0) give 0; a score that is NaN or outside [0, 1] gives NaN. group_size: every group must be that many
    adjacent spans; else ValueError where the ids are on the CPU, and NaN for the spans of such a group where
    only the device knows them. Triton never waits for the device, and takes at most 64 spans a group. The
    other options are those of `scre`, `igsr` and `token_stats`; no token of a span is ever ignored.
    """
    _check_source(logits, hidden, weight, logp)
    source = next(x for x in (logits, hidden, logp) if x is not None)
    chosen = chosen_impl(source, impl)
    scre_how = Scre(eta=eta, lam=lam, first_index=first_index, normalize=normalize)
    igsr_how = Igsr(tau=tau, delta=delta, penalty=penalty, min_bonus=min_bonus, variant=variant)
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
    )
    check_groups(spans.group, group_size)
    if hidden is not None and weight is not None:
        logp = linear.linear_token_stats(
            lambda x, y, how, want: _stats(x, y, None, how, want, 20, chosen),
            hidden, weight, spans.targets, bias=bias, rows=spans.rows, how=how,
        )["logp"]  # fmt: skip
    if chosen == "triton":
        logp, result = _kernels("confidence").confidence_rewards(
            logits, spans.rows, spans.targets, logp, spans.offsets, score, strict, spans.group,
            group_size, how, scre_how, igsr_how,
        )  # fmt: skip
    else:
        if logp is None and logits is not None:
            logp = _stats(logits, spans.targets, spans.rows, how, ("logp",), 20, chosen)["logp"]
        assert logp is not None
        result = reference.span_rewards(logp, spans.offsets, score, strict, spans.group, scre_how, igsr_how)
    parts = {
        "logp": logp,
        "length": spans.offsets[1:] - spans.offsets[:-1],
        "variance": result.variance,
        "nll": result.nll,
        "bin": result.bin,
        "bonus": result.bonus,
        "is_bonus": result.applied,
        "strict": strict,
        "group": spans.group,
    }
    return Rewards(result.reward, result.confidence, parts)


def _check_source(
    logits: Tensor | None, hidden: Tensor | None, weight: Tensor | None, logp: Tensor | None
) -> None:
    if (hidden is None) != (weight is None):
        raise ValueError("hidden and weight go together: give both, or neither")
    given = [n for n, x in (("logits", logits), ("hidden", hidden), ("logp", logp)) if x is not None]
    if len(given) != 1:
        raise ValueError(f"got {given or 'nothing'}; give exactly one of logits, hidden with weight, or logp")


def check_groups(group: Tensor, group_size: int | None) -> None:
    """Refuse groups that are not `group_size` adjacent spans each, as far as no sync is needed to see it."""
    if group_size is None:
        return
    if group_size < 1 or len(group) % group_size:
        raise ValueError(f"group_size is {group_size}, which does not divide the {len(group)} spans")
    if not on_host(group):
        return
    blocks = group.view(-1, group_size)
    if (blocks != blocks[:, :1]).any() or len(torch.unique(blocks[:, 0])) != len(blocks):
        raise ValueError(
            f"group_size is {group_size}, but a group is split or incomplete: give the {group_size} "
            "completions of a prompt next to each other with one group id, or leave group_size out"
        )
