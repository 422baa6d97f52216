"""A policy loss from hidden states, its gradient made in the forward pass.

A policy loss is a sum over tokens whose constants (advantage, old log-probability, normalisers)
are known beforehand. So each tile of logits is made once and turned into its gradient where it lies: three
matrix products in all, and never more logits than the tile's.

"gspo" is no such sum: the slope at a token follows from the mean log ratio of its completion, which may lie
in any number of tiles. With old log-probabilities a pass without a gradient comes first, one product more:
four, as many as by way of `linear_token_stats`, and still no more logits than a tile's. Tiles of whole
completions would save it, where a completion fits into one: at V = 152k not many tokens do.

It is no operator: torch.compile ends a graph before it and starts another after it. An operator's gradient
may neither change in place what its forward handed out nor hand it on as it is, so that it would copy the
gradients, [V, D] among them, which this one scales where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from raise_core.ops.impl import chosen_impl
from raise_core.ops.loss import Gradients, LogitMap, check_linear, check_memory, loss_and_gradient
from raise_core.ops.stats import run_linear_stats
from raise_core.policy_kinds import Kind, KlEstimator, Objective, carried_by
from raise_core.policy_loss import PolicyLoss, PolicyStep, check_policy, policy_step

Function = TypeVar("Function", bound=Callable[..., Any])
NEVER = -(1 << 62)  # the ignore_index of a loss in which every token counts


class _Made(torch.autograd.Function):
    """Hands a loss on with gradients that were made with it, scaled in place by whatever comes from above."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, made: Gradients, *inputs: Tensor | None) -> Tensor:
        ctx.made = made
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.made is None:
            raise RuntimeError(
                "linear_policy_loss was differentiated twice, and its gradient is made once, in the forward "
                "pass: call it again, or use policy_loss of linear_token_stats"
            )
        made, ctx.made = ctx.made, None
        # Where the host knows the factor, the usual 1 costs no pass over the gradients.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for g in made:
                if g is not None:
                    g.mul_(upstream)
        return None, None, *made


def _outside_graphs(function: Function) -> Function:
    disable: Callable[[Function], Function] = torch.compiler.disable
    return disable(function)


@_outside_graphs
def linear_policy_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...], T in all
    logp_old: Tensor | None,  # [T]
    advantage: Tensor,  # [S]
    offsets: Tensor,  # [S+1]
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    kind: Kind = "grpo",
    num_tokens: float | Tensor,
    num_sequences: float | Tensor,
    max_length: int | None = None,
    logp_ref: Tensor | None = None,
    kl: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    max_ratio: float = 5.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    token_advantage: Tensor | None = None,
    accumulate_fp32: bool = False,
    memory: int | None = None,
    impl: str = "auto",
) -> PolicyLoss:
    """`policy_loss` of `linear_token_stats(hidden, weight, targets).logp`, at three matrix products in all.

    kind "gspo" with logp_old: four, since every log-probability is computed once before the gradient is.

    hidden [..., D] with one target a row, or rows [T] naming the row of each of the T targets; weight [V, D],
    bias [V]. logp_old None: the policy is the one that sampled, and its own log-probabilities are the old
    ones (ratio 1). `PolicyLoss.logp` holds the T log-probabilities in nats, [T] whatever the shape of
    targets, without a gradient; on a GPU its bits depend on the tiles, and on allow_tf32 in fp32.

    The gradient of hidden, weight and bias is computed here, while the tiles of logits exist, and is handed
    on by backward(): once. Without a tensor that needs a gradient, or under no_grad, none is made. With
    several tiles the gradient of a 16-bit weight is added up in its dtype, one rounding a tile;
    accumulate_fp32=True adds it up in an fp32 buffer [V, D]. memory: bytes of scratch beside inputs, results
    and gradients: 80 MiB on the CPU and 256 MiB elsewhere when None, at least one row of logits. A token
    without a result (see `token_stats`; -100 is no exception here: every token counts) makes the loss NaN and
    has no part in the gradient, with "gspo" and logp_old its whole completion has none; fp16 gradients can
    underflow, since no later loss scale reaches them: prefer bf16. The other arguments, and what is raised,
    are those of `policy_loss` and `linear_token_stats`.
    """
    how = LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=NEVER,
    )
    check_linear(hidden, weight, bias, targets, rows)
    check_memory(memory)
    chosen = chosen_impl(hidden, impl)
    like = hidden.new_empty(targets.numel(), dtype=torch.float64 if hidden.dtype == torch.float64 else None)
    check_policy(like, like if logp_old is None else logp_old, advantage, offsets, logp_ref, token_advantage)
    objective = Objective(
        kind=kind, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip, max_ratio=max_ratio,
        tau_pos=tau_pos, tau_neg=tau_neg, kl=kl, kl_estimator=kl_estimator, max_length=max_length,
    )  # fmt: skip
    step = policy_step(
        objective, like, advantage, offsets, num_tokens, num_sequences, logp_ref, token_advantage
    )
    tiles = _Tiles(step, logp_old, logp_ref)
    inputs = (hidden, weight, bias)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]
    h, w, b = (None if x is None else x.detach() for x in inputs)
    assert h is not None and w is not None
    if any(needs):
        if tiles.needs_means:
            tiles.take_means(
                run_linear_stats(h, w, targets, b, rows, how, ("logp",), 1, memory, chosen)["logp"]
            )
        logp, made = loss_and_gradient(
            h, w, targets, tiles.slope, bias=b, rows=rows, how=how, needs=(needs[0], needs[1], needs[2]),
            accumulate_fp32=accumulate_fp32, memory=memory, impl=chosen,
        )  # fmt: skip
        total = tiles.total(logp)
        return PolicyLoss(_Made.apply(total.loss, made, *inputs), total.metrics, logp)
    logp = run_linear_stats(h, w, targets, b, rows, how, ("logp",), 1, memory, chosen)["logp"].reshape(-1)
    if tiles.needs_means:
        tiles.take_means(logp)
    tiles.slope(slice(0, len(logp)), logp)
    total = tiles.total(logp)
    return PolicyLoss(total.loss, total.metrics, logp)


class _Tiles:
    """The loss and its metrics as tiles of tokens come in."""

    def __init__(self, step: PolicyStep, logp_old: Tensor | None, logp_ref: Tensor | None) -> None:
        self.step, self.logp_old, self.logp_ref = step, logp_old, logp_ref
        self.parts: list[PolicyLoss] = []
        self.means: Tensor | None = None  # [T] mean log ratio of a token's completion

    @property
    def needs_means(self) -> bool:
        """A tile cannot be judged alone; on-policy it can, since every ratio is 1."""
        return self.step.objective.by_sequence and self.logp_old is not None

    def take_means(self, logp: Tensor) -> None:
        """Every token's log-probability, before the first tile."""
        assert self.logp_old is not None
        self.means = self.step.completion_mean(logp.reshape(-1) - self.logp_old.to(logp.dtype))

    def slope(self, tile: slice, logp: Tensor) -> Tensor:
        """d loss / d logp [tokens of the tile]; the tile's part of the loss is kept."""
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            ratio = self._log_ratio(tile, leaf)
            part = self.step.loss(tile, leaf, ratio, None if self.logp_ref is None else self.logp_ref[tile])
            (slope,) = torch.autograd.grad(part.loss, leaf)
        self.parts.append(PolicyLoss(part.loss.detach(), part.metrics))
        # A token without a result takes its completion with it, and no other.
        return slope if self.means is None else torch.where(self.means[tile].isnan(), 0.0, slope)

    def _log_ratio(self, tile: slice, leaf: Tensor) -> Tensor:
        if self.means is not None:
            return carried_by(self.means[tile], leaf)
        old = leaf if self.logp_old is None else self.logp_old[tile]
        return leaf - old.detach().to(leaf.dtype)

    def total(self, logp: Tensor) -> PolicyLoss:
        """Sum of the parts; `ratio_max` is their largest."""
        if not self.parts:
            self.slope(slice(0, 0), logp[:0])
        losses = torch.stack([part.loss for part in self.parts])
        metrics = {
            name: torch.stack([part.metrics[name] for part in self.parts]) for name in self.parts[0].metrics
        }
        combined = {name: v.max() if name == "ratio_max" else v.sum() for name, v in metrics.items()}
        return PolicyLoss(losses.sum(), combined)
