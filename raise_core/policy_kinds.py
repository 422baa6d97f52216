"""What each kind of policy loss makes of a token, and its gradient. Logs in nats.

rho_t = exp(logp_t - logp_old_t), A the advantage of the completion, sg(x) a constant of value x:

    grpo, dapo, dr_grpo   L_t = -min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A)
                          (arXiv 2402.03300, 2503.14476, 2503.20783)
    gspo                  the same of s = exp(mean_t(logp_t - logp_old_t)), one ratio for all tokens of a
                          completion (arXiv 2507.18071, which clips at 3e-4 and 4e-4)
    cispo                 L_t = -sg(min(rho_t, max_ratio)) A logp_t
    sapo                  L_t = -(4 / tau) sigmoid(tau (rho_t - 1)) A, tau = tau_pos if A > 0 else tau_neg
                          (arXiv 2511.20347)
    dual_clip = c         L_t <- min(L_t, -c A) where A < 0 (arXiv 1912.09729)

cispo is the form of ScaleRL (arXiv 2510.13786) and TRL: the bound is the largest ratio itself, and there is
no lower one. MiniMax-M1 (arXiv 2506.13585) writes clip(rho, 1 - eps_low, 1 + eps_high) with an eps_low so
high that it never acts: max_ratio = 1 + eps_high. verl clips on both sides; that form is not here.

At rho = 1 the gradient of every L_t is -A: the 4 / tau of sapo is there for that.

    KL_t, d = logp_t - logp_ref_t    gradient    its mean over tokens drawn from the policy
    k1    d                          1           0: it pulls nowhere; watch it, give it no weight
    k2    d^2 / 2                    d           gradient of KL(policy || reference)
    k3    exp(-d) - 1 + d            1 - exp(-d) gradient of KL(reference || policy)

k1 and k3 have the mean value KL(policy || reference), k2 only nearly (J. Schulman, Approximating KL
divergence; the gradients: arXiv 2506.09477). Off-policy neither holds: no ratio is put before KL_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo"]
KlEstimator = Literal["k1", "k2", "k3"]

KINDS = ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo")
CLIPPED = ("grpo", "dapo", "dr_grpo", "gspo")

# exp overflows fp32 beyond 88 nats. At a token this far off, its surrogate is clipped (A > 0) or meaningless.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The kind of a policy loss and its numbers, as `policy_loss` names them; ValueError if out of range."""

    kind: str
    eps_low: float
    eps_high: float
    dual_clip: float | None
    max_ratio: float
    tau_pos: float
    tau_neg: float
    kl: float
    kl_estimator: str
    max_length: int | None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, wanted {_listed(KINDS)}")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator: got {self.kl_estimator!r}, wanted 'k1', 'k2' or 'k3'")
        if not 0.0 <= self.kl < math.inf:
            raise ValueError(f"kl: got {self.kl}, wanted a finite weight, 0 or more; 0 only reports the KL")
        if not 0.0 <= self.eps_low <= 1.0 or not self.eps_high >= 0.0:
            raise ValueError(
                f"eps_low, eps_high: got {self.eps_low}, {self.eps_high}, wanted eps_low in [0, 1], "
                "eps_high >= 0"
            )
        if self.kind == "dr_grpo" and (self.max_length is None or self.max_length < 1):
            raise ValueError(
                f"max_length: got {self.max_length}, wanted the longest allowed completion in tokens"
            )
        self._check_bounds()

    def _check_bounds(self) -> None:
        if self.dual_clip is not None and self.kind not in CLIPPED:
            raise ValueError(
                f"dual_clip: got {self.dual_clip} with kind {self.kind!r}, which bounds a token's weight "
                f"by itself; wanted None, or kind {_listed(CLIPPED)}"
            )
        if self.dual_clip is not None and not 1.0 < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip: got {self.dual_clip}, wanted a ratio above 1, such as 3.0, or None")
        for name in ("max_ratio", "tau_pos", "tau_neg"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted a finite number above 0")

    @property
    def by_sequence(self) -> bool:
        """All tokens of a completion have one ratio."""
        return self.kind == "gspo"

    def per_token(self, logp: Tensor, ratio: Tensor, a: Tensor) -> Tensor:
        """L_t [T] of logp in nats, ratio and advantage [T], without the KL."""
        if self.kind == "cispo":
            return -ratio.detach().clamp(max=self.max_ratio) * a * logp
        if self.kind == "sapo":
            tau = torch.where(a > 0, self.tau_pos, torch.full_like(a, self.tau_neg))
            return -(4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0)) * a
        loss = -torch.minimum(ratio * a, ratio.clamp(1.0 - self.eps_low, 1.0 + self.eps_high) * a)
        if self.dual_clip is None:
            return loss
        return torch.where(a < 0, torch.minimum(loss, -self.dual_clip * a), loss)

    def cut(self, ratio: Tensor, a: Tensor) -> dict[str, Tensor]:
        """Which tokens [T] bool each clip acts on, by the name of its metric."""
        none = torch.zeros_like(ratio, dtype=torch.bool)
        if self.kind == "cispo":
            return {"clip_low": none, "clip_high": ratio > self.max_ratio}
        if self.kind == "sapo":
            return {"clip_low": none, "clip_high": none}
        cut = {
            "clip_low": (ratio < 1.0 - self.eps_low) & (a < 0),
            "clip_high": (ratio > 1.0 + self.eps_high) & (a > 0),
        }
        return cut if self.dual_clip is None else cut | {"clip_dual": (ratio > self.dual_clip) & (a < 0)}

    def divergence(self, logp: Tensor, logp_ref: Tensor) -> Tensor:
        """KL_t [T] in nats."""
        d = logp - logp_ref
        if self.kl_estimator == "k1":
            return d
        if self.kl_estimator == "k2":
            return d * d / 2
        d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-d) + d


def carried_by(value: Tensor, logp: Tensor) -> Tensor:
    """`value` [T] as it is, differentiable in `logp` [T] with slope 1.

    The ratio s of a completion of n tokens takes part in its loss as (1 / n) sum_t L(s), and ds / dlogp_t =
    s / n: that is also the gradient when s of each token is thought to follow that token's logp alone.
    """
    # An infinite logp minus itself is NaN, and has no slope.
    return value.detach() + torch.where(logp.isfinite(), logp - logp.detach(), 0.0)


def _listed(names: tuple[str, ...]) -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"
