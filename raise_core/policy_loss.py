"""Clipped policy losses on packed tokens, with every normaliser named. Logs in nats.

    ratio_t = exp(logp_t - logp_old_t)
    L_t     = -min(ratio_t * A, clip(ratio_t, 1 - eps_low, 1 + eps_high) * A) + kl * KL_t
    grpo    = sum_i mean_{t in i} L_t / num_sequences                    (arXiv 2402.03300)
    dapo    = sum_t L_t / num_tokens                                     (arXiv 2503.14476)
    dr_grpo = sum_t L_t / (num_sequences * max_length)                   (arXiv 2503.20783)
    KL_t    = d | d^2 / 2 | exp(-d) + d - 1,   d = logp - logp_ref       (k1 | k2 | k3, Schulman)

num_tokens and num_sequences count the whole optimiser step, so the gradients of its micro-batches add up to
the step's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raise_core.ops.loss import check_bounds, check_tensor

Kind = Literal["grpo", "dapo", "dr_grpo"]
KlEstimator = Literal["k1", "k2", "k3"]

# exp overflows fp32 beyond 88 nats. At a token this far off, its surrogate is clipped (A > 0) or meaningless.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """What `policy_loss` returns: `loss`, a scalar with a gradient, and `metrics`, detached scalars by name.

    Each metric but `ratio_max` is a sum over this call's tokens divided by `num_tokens`, so the step's figure
    is the sum over its micro-batches; `ratio_max` combines by maximum (0 without tokens).
    clip_low, clip_high: share of tokens whose gradient the lower or upper clip removed.
    ratio_mean, ratio_max: of `ratio_t`.
    kl: mean KL estimate in nats per token, there if `logp_ref` was given.
    `logp` [T], detached, in nats: from `linear_policy_loss` alone, which computes it.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logp: Tensor | None = None


def policy_loss(
    logp: Tensor,  # [T]
    logp_old: Tensor,  # [T]
    advantage: Tensor,  # [S]
    offsets: Tensor,  # [S+1] integer
    *,
    kind: Kind = "grpo",
    num_tokens: float | Tensor,
    num_sequences: float | Tensor,
    max_length: int | None = None,
    logp_ref: Tensor | None = None,  # [T]
    kl: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> PolicyLoss:
    """Policy loss of S completions packed into T tokens; differentiable in `logp` only.

    offsets: completion s is tokens `offsets[s]:offsets[s+1]`; starts at 0, ends at T, never falls. Where only
        the device knows its values, a token of no completion makes the loss NaN. An empty completion
        contributes 0.
    num_tokens, num_sequences: completion tokens and completions of the WHOLE optimiser step. Where a
        data-parallel wrapper averages gradients over ranks, pass the global count divided by the number of
        ranks. 0 counts as 1.
    max_length: longest allowed completion in tokens, needed by "dr_grpo".
    kl: weight of the KL penalty; needs `logp_ref`. With `logp_ref` and `kl=0` the KL is only reported.
    Log ratios under an exp (the ratio, and k3) are clamped at ±20 nats, where the gradient is then 0: exp
    stays finite and 0 * inf cannot arise. fp32 arithmetic (fp64 if `logp` is). Raises ValueError / TypeError
    naming the argument.
    """
    check_policy(logp, logp_old, advantage, offsets, logp_ref)
    step = policy_step(
        logp, advantage, offsets, kind, num_tokens, num_sequences, max_length, kl, kl_estimator, eps_low,
        eps_high, logp_ref,
    )  # fmt: skip
    return step.loss(slice(0, len(logp)), logp, logp_old, logp_ref)


@dataclass(frozen=True, eq=False)
class PolicyStep:
    """What a policy loss knows before any log-probability: a sum over tokens can then be taken in pieces."""

    kind: str
    advantage: Tensor  # [T]
    length: Tensor  # [T] tokens of the completion that a token belongs to
    tokens: Tensor
    sequences: Tensor
    max_length: float
    kl: float
    kl_estimator: str
    eps_low: float
    eps_high: float

    def loss(self, piece: slice, logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None) -> PolicyLoss:
        """The part of the loss and of its metrics of a piece of the tokens, whose logp these are."""
        a, dtype = self.advantage[piece], self.advantage.dtype
        new = logp.to(dtype)
        log_ratio = new - logp_old.detach().to(dtype)
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(1.0 - self.eps_low, 1.0 + self.eps_high)
        per_token = -torch.minimum(ratio * a, clipped * a)
        metrics = _metrics(ratio.detach(), a, self.eps_low, self.eps_high, self.tokens)
        if logp_ref is not None:
            estimate = _kl(new, logp_ref.detach().to(dtype), self.kl_estimator)
            metrics["kl"] = estimate.detach().sum() / self.tokens
            if self.kl:
                per_token = per_token + self.kl * estimate
        if self.kind == "grpo":
            loss = (per_token / self.length[piece]).sum() / self.sequences
        elif self.kind == "dapo":
            loss = per_token.sum() / self.tokens
        else:
            loss = per_token.sum() / (self.sequences * self.max_length)
        return PolicyLoss(loss, metrics)


def policy_step(
    like: Tensor,
    advantage: Tensor,
    offsets: Tensor,
    kind: str,
    num_tokens: float | Tensor,
    num_sequences: float | Tensor,
    max_length: int | None,
    kl: float,
    kl_estimator: str,
    eps_low: float,
    eps_high: float,
    logp_ref: Tensor | None,
) -> PolicyStep:
    """Check the options of `policy_loss` and spread what belongs to completions over their tokens.

    like [T]: a tensor of as many tokens, on the device of the arithmetic and in its precision.
    """
    _check_options(kind, kl, kl_estimator, eps_low, eps_high, logp_ref, max_length)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    owner = _owner(offsets, len(like))
    inside = (owner >= 0) & (owner < len(advantage))
    owner = torch.where(inside, owner, 0)
    return PolicyStep(
        kind=kind,
        advantage=advantage.detach().to(dtype)[owner].masked_fill(~inside, math.nan),
        length=(offsets[1:] - offsets[:-1]).to(dtype)[owner],
        tokens=_count("num_tokens", num_tokens, like.device, dtype),
        sequences=_count("num_sequences", num_sequences, like.device, dtype),
        max_length=float(max_length or 1),
        kl=kl,
        kl_estimator=kl_estimator,
        eps_low=eps_low,
        eps_high=eps_high,
    )


def pack(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padded `x [B, L, ...]` and `mask [B, L]` (True = a token to score) to `([T, ...], offsets [B+1])`.

    Rows keep their order, a row without True becomes an empty span. `offsets` is int64 on the device of
    `mask`. Gradients flow to `x`; the number of tokens is read by the host. Raises TypeError / ValueError
    naming the argument.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise TypeError(
            f"mask: got {mask.dtype} of shape {list(mask.shape)}, wanted bool [B, L], True for a "
            "token that counts; use mask.bool()"
        )
    if x.shape[:2] != mask.shape:
        raise ValueError(f"x: got shape {list(x.shape)}, wanted {list(mask.shape)} (mask) in front")
    ends = mask.sum(1).cumsum(0)
    return x[mask], torch.cat([ends.new_zeros(1), ends])


def _owner(offsets: Tensor, tokens: int) -> Tensor:
    """Completion of each token, [T]. Empty completions own none."""
    index = torch.arange(tokens, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, index, right=True) - 1


def _kl(logp: Tensor, logp_ref: Tensor, estimator: str) -> Tensor:
    d = logp - logp_ref
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-d) + d


def _metrics(ratio: Tensor, a: Tensor, eps_low: float, eps_high: float, tokens: Tensor) -> dict[str, Tensor]:
    low = (ratio < 1.0 - eps_low) & (a < 0)
    high = (ratio > 1.0 + eps_high) & (a > 0)
    return {
        "clip_low": low.to(ratio.dtype).sum() / tokens,
        "clip_high": high.to(ratio.dtype).sum() / tokens,
        "ratio_mean": ratio.sum() / tokens,
        "ratio_max": ratio.max() if len(ratio) else ratio.sum(),
    }


def _count(name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if value is None or isinstance(value, str):
        raise TypeError(f"{name}: got {value!r}, wanted a count of the whole optimiser step")
    if isinstance(value, Tensor):
        count = value.detach().to(device, dtype)
        return torch.where(count == 0, torch.ones_like(count), count)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: got {value}, wanted a count of the whole optimiser step, 0 or more")
    return torch.full((), value or 1, device=device, dtype=dtype)


def check_policy(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, offsets: Tensor, logp_ref: Tensor | None
) -> None:
    """Refuse shapes, dtypes and devices that a policy loss cannot mean anything by."""
    given = {"logp": logp, "logp_old": logp_old, "advantage": advantage, "offsets": offsets}
    for name, x in (given if logp_ref is None else given | {"logp_ref": logp_ref}).items():
        check_tensor(name, x)
        if x.device != logp.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, wanted {logp.device}, where logp is")
    if logp.ndim != 1 or not logp.dtype.is_floating_point:
        raise ValueError(
            f"logp: got {logp.dtype} of shape {list(logp.shape)}, wanted floating [T]; padded ones go "
            "through pack(x, mask)"
        )
    for name, other in (("logp_old", logp_old), ("logp_ref", logp_ref)):
        if other is not None and other.shape != logp.shape:
            raise ValueError(
                f"{name}: got shape {list(other.shape)}, wanted that of logp, {list(logp.shape)}"
            )
    if offsets.ndim != 1 or len(offsets) == 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets: got {offsets.dtype} of shape {list(offsets.shape)}, wanted int64 or int32 [S+1]"
        )
    if len(offsets) == 1 and len(logp):
        raise ValueError(f"offsets: got no completion for {len(logp)} tokens of logp, wanted [S+1] bounds")
    check_bounds(offsets, len(logp))
    if advantage.shape != (len(offsets) - 1,):
        raise ValueError(
            f"advantage: got shape {list(advantage.shape)}, wanted one per completion, [{len(offsets) - 1}]"
        )


def _check_options(
    kind: str,
    kl: float,
    kl_estimator: str,
    eps_low: float,
    eps_high: float,
    logp_ref: Tensor | None,
    max_length: int | None,
) -> None:
    if kind not in ("grpo", "dapo", "dr_grpo"):
        raise ValueError(f"kind: got {kind!r}, wanted 'grpo', 'dapo' or 'dr_grpo'")
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimator: got {kl_estimator!r}, wanted 'k1', 'k2' or 'k3'")
    if not 0.0 <= kl < float("inf"):
        raise ValueError(f"kl: got {kl}, wanted a finite weight, 0 or more; 0 only reports the KL")
    if kl and logp_ref is None:
        raise ValueError(f"kl: got {kl} without logp_ref; pass the reference's log-probabilities or kl=0.0")
    if not 0.0 <= eps_low <= 1.0 or not eps_high >= 0.0:
        raise ValueError(
            f"eps_low, eps_high: got {eps_low}, {eps_high}, wanted eps_low in [0, 1], eps_high >= 0"
        )
    if kind == "dr_grpo" and (max_length is None or max_length < 1):
        raise ValueError(f"max_length: got {max_length}, wanted the longest allowed completion in tokens")
