"""Policy losses on packed tokens, with every normaliser named. Logs in nats.

`raise_core.policy_kinds` has what each kind makes of a token, L_t + kl * KL_t. They are put together as

    grpo, gspo, sapo   sum_i mean_{t in i} (L_t + kl KL_t) / num_sequences
    dapo, cispo        sum_t (L_t + kl KL_t) / num_tokens
    dr_grpo            sum_t (L_t + kl KL_t) / (num_sequences * max_length)

num_tokens and num_sequences count the whole optimiser step, so the gradients of its micro-batches, of whole
completions, add up to the step's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raise_core.ops.loss import check_bounds, check_tensor
from raise_core.policy_kinds import MAX_LOG_RATIO, Kind, KlEstimator, Objective, carried_by


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """What `policy_loss` returns: `loss`, a scalar with a gradient, and `metrics`, detached scalars by name.

    Each metric but `ratio_max` is a sum over this call's tokens divided by `num_tokens`, so the step's figure
    is the sum over its micro-batches; `ratio_max` combines by maximum (0 without tokens).
    clip_low, clip_high: share of tokens whose gradient the lower or upper clip removed. "cispo": clip_high is
        the share whose weight was lowered to max_ratio, clip_low 0. "sapo" clips nothing: both 0.
    clip_dual: share of tokens whose gradient the dual clip removed, there if `dual_clip` was given.
    ratio_mean, ratio_max: of the ratio; with "gspo" a token's is its completion's.
    kl: mean KL estimate in nats per token, there if `logp_ref` was given.
    `logp` [T], detached, in nats: from `linear_policy_loss` alone, which computes it.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logp: Tensor | None = None


def policy_loss(
    logp: Tensor,  # [T]
    logp_old: Tensor | None,  # [T]
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
    dual_clip: float | None = None,
    max_ratio: float = 5.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    token_advantage: Tensor | None = None,  # [T]
) -> PolicyLoss:
    """Policy loss of S completions packed into T tokens; differentiable in `logp` only, and once.

    logp_old: of the policy that sampled. None: this one is it, every ratio is 1, and every kind's gradient is
        -A up to its normaliser.
    offsets: completion s is tokens `offsets[s]:offsets[s+1]`; starts at 0, ends at T, never falls. Where only
        the device knows its values, a token of no completion makes the loss NaN. An empty completion
        contributes 0.
    num_tokens, num_sequences: completion tokens and completions of the WHOLE optimiser step. Where a
        data-parallel wrapper averages gradients over ranks, pass the global count divided by the number of
        ranks. 0 counts as 1.
    max_length: longest allowed completion in tokens, needed by "dr_grpo".
    kl: weight of the KL penalty; needs `logp_ref`. With `logp_ref` and `kl=0` the KL is only reported. The
        estimators' gradients are in `raise_core.policy_kinds`: k1's is 0 on average.
    eps_low, eps_high: how far a ratio counts below and above 1; unused by "cispo" and "sapo".
    dual_clip: bound c > 1 of the ratio where the advantage is negative; refused with "cispo" and "sapo".
    max_ratio: bound of a token's weight, "cispo" alone (ScaleRL's form and its 5.0).
    tau_pos, tau_neg: steepness of the gate where A > 0 and elsewhere, "sapo" alone (the paper's values).
    token_advantage: added to the advantage of each token's completion, such as `step_advantages` gives.
    Log ratios under an exp (the ratio, and k3) are clamped at ±20 nats, where the gradient is then 0 (with
    "cispo" it has the weight of the clamped ratio): exp stays finite and 0 * inf cannot arise. The loss of
    "cispo" is proportional to logp, and infinite where that is. fp32 arithmetic (fp64 if `logp` is). Raises
    ValueError / TypeError naming the argument.
    """
    check_policy(logp, logp if logp_old is None else logp_old, advantage, offsets, logp_ref, token_advantage)
    objective = Objective(
        kind=kind, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip, max_ratio=max_ratio,
        tau_pos=tau_pos, tau_neg=tau_neg, kl=kl, kl_estimator=kl_estimator, max_length=max_length,
    )  # fmt: skip
    step = policy_step(
        objective, logp, advantage, offsets, num_tokens, num_sequences, logp_ref, token_advantage
    )
    new = logp.to(step.advantage.dtype)
    old = new if logp_old is None else logp_old
    log_ratio = new - old.detach().to(new.dtype)
    if objective.by_sequence:
        log_ratio = carried_by(step.completion_mean(log_ratio), new)
    return step.loss(slice(0, len(logp)), new, log_ratio, logp_ref)


@dataclass(frozen=True, eq=False)
class PolicyStep:
    """What a policy loss knows before any log-probability: a sum over tokens can then be taken in pieces."""

    objective: Objective
    advantage: Tensor  # [T]
    owner: Tensor  # [T] completion that a token belongs to
    length: Tensor  # [T] tokens of that completion
    bounds: Tensor  # [S+1] offsets, held to [0, T] where only the device knows them
    tokens: Tensor
    sequences: Tensor

    def completion_mean(self, x: Tensor) -> Tensor:
        """Mean of x [T] over the completion of each token, [T], detached."""
        total = torch.segment_reduce(x.detach(), "sum", offsets=self.bounds, initial=0.0, unsafe=True)
        return total[self.owner] / self.length

    def loss(self, piece: slice, logp: Tensor, log_ratio: Tensor, logp_ref: Tensor | None) -> PolicyLoss:
        """A piece's part of the loss and of its metrics: logp, log ratio and logp_ref of these tokens."""
        how, a = self.objective, self.advantage[piece]
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        per_token = how.per_token(logp, ratio, a)
        metrics = self._metrics(ratio.detach(), a)
        if logp_ref is not None:
            estimate = how.divergence(logp, logp_ref.detach().to(logp.dtype))
            metrics["kl"] = estimate.detach().sum() / self.tokens
            if how.kl:
                per_token = per_token + how.kl * estimate
        if how.kind in ("grpo", "gspo", "sapo"):
            loss = (per_token / self.length[piece]).sum() / self.sequences
        elif how.kind in ("dapo", "cispo"):
            loss = per_token.sum() / self.tokens
        else:
            loss = per_token.sum() / (self.sequences * float(how.max_length or 1))
        return PolicyLoss(loss, metrics)

    def _metrics(self, ratio: Tensor, a: Tensor) -> dict[str, Tensor]:
        cut = self.objective.cut(ratio, a)
        return {name: where.to(ratio.dtype).sum() / self.tokens for name, where in cut.items()} | {
            "ratio_mean": ratio.sum() / self.tokens,
            "ratio_max": ratio.max() if len(ratio) else ratio.sum(),
        }


def policy_step(
    objective: Objective,
    like: Tensor,
    advantage: Tensor,
    offsets: Tensor,
    num_tokens: float | Tensor,
    num_sequences: float | Tensor,
    logp_ref: Tensor | None,
    token_advantage: Tensor | None = None,
) -> PolicyStep:
    """Spread what belongs to completions over their tokens.

    like [T]: a tensor of as many tokens, on the device of the arithmetic and in its precision.
    """
    if objective.kl and logp_ref is None:
        raise ValueError(
            f"kl: got {objective.kl} without logp_ref; pass the reference's log-probabilities or kl=0.0"
        )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    owner = _owner(offsets, len(like))
    inside = (owner >= 0) & (owner < len(advantage))
    owner = torch.where(inside, owner, 0)
    each = advantage.detach().to(dtype)[owner].masked_fill(~inside, math.nan)
    if token_advantage is not None:
        each = each + token_advantage.detach().to(dtype)
    return PolicyStep(
        objective=objective,
        advantage=each,
        owner=owner,
        length=(offsets[1:] - offsets[:-1]).to(dtype)[owner],
        bounds=offsets.clamp(0, len(like)).cummax(0).values,
        tokens=_count("num_tokens", num_tokens, like.device, dtype),
        sequences=_count("num_sequences", num_sequences, like.device, dtype),
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
    logp: Tensor,
    logp_old: Tensor,
    advantage: Tensor,
    offsets: Tensor,
    logp_ref: Tensor | None,
    token_advantage: Tensor | None = None,
) -> None:
    """Refuse shapes, dtypes and devices that a policy loss cannot mean anything by."""
    given = {"logp": logp, "logp_old": logp_old, "advantage": advantage, "offsets": offsets}
    per_token = {"logp_ref": logp_ref, "token_advantage": token_advantage}
    for name, x in (given | {n: x for n, x in per_token.items() if x is not None}).items():
        check_tensor(name, x)
        if x.device != logp.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, wanted {logp.device}, where logp is")
    if logp.ndim != 1 or not logp.dtype.is_floating_point:
        raise ValueError(
            f"logp: got {logp.dtype} of shape {list(logp.shape)}, wanted floating [T]; padded ones go "
            "through pack(x, mask)"
        )
    for name, other in {"logp_old": logp_old, **per_token}.items():
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
