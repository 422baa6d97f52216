"""Direct preference optimisation (arXiv 2305.18290) on pairs of completions, with a likelihood term."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DpoLoss:
    """What `dpo_loss` returns: `loss`, a scalar with a gradient, and `metrics`, detached scalars by name.

    Each metric is a sum over this call's pairs divided by `num_pairs`, so that a step's figure is the sum
    over its micro-batches. margin [nats]: beta times how much more the policy's log-odds favour the chosen
    one than the reference's; accuracy: share of the pairs with a margin above 0; chosen_reward and
    rejected_reward [nats]: beta * log ratio of either; nll [nats per token]: of the chosen ones, there if
    `chosen_tokens` was given.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def dpo_loss(
    logp_chosen: Tensor,  # [N]
    logp_rejected: Tensor,  # [N]
    ref_chosen: Tensor,  # [N]
    ref_rejected: Tensor,  # [N]
    *,
    beta: float = 0.1,
    nll_weight: float = 0.0,
    chosen_tokens: Tensor | None = None,  # [N]
    num_pairs: float | None = None,
) -> DpoLoss:
    """Preference loss of N pairs of whole completions of one prompt each; differentiable in the first two.

        d_n  = beta * ((logp_chosen_n - ref_chosen_n) - (logp_rejected_n - ref_rejected_n))
        loss = sum_n [ -log sigmoid(d_n) - nll_weight * logp_chosen_n / chosen_tokens_n ] / num_pairs

    The four are sums over a completion's tokens in nats (`span_logp(logp, offsets, reduce="sum")` of packed
    ones), the ref_ ones under the reference. nll_weight: of the mean negative log-probability of the chosen
    completion's tokens, which keeps its likelihood from falling with the rejected one's; it needs
    chosen_tokens, how many tokens each has. The published code of Chain-of-Step (arXiv 2509.19003) has beta
    0.1 and weight 1.
    num_pairs: pairs of the WHOLE optimiser step, N when None, so that micro-batches add up to it; 0 counts as
    1. fp32 arithmetic (fp64 if logp_chosen is); without pairs the loss is 0. A log-probability that is not
    finite makes the loss NaN or infinite. Raises ValueError / TypeError naming the argument.
    """
    given = {
        "logp_chosen": logp_chosen, "logp_rejected": logp_rejected,
        "ref_chosen": ref_chosen, "ref_rejected": ref_rejected,
    }  # fmt: skip
    for name, x in given.items():
        _check(name, x, logp_chosen)
    for name, number in (("beta", beta), ("nll_weight", nll_weight)):
        if not 0 <= number < math.inf or (name == "beta" and number == 0):
            wanted = "a finite number above 0" if name == "beta" else "a finite number, 0 or more"
            raise ValueError(f"{name}: got {number}, wanted {wanted}")
    if num_pairs is not None and not 0 <= num_pairs < math.inf:
        raise ValueError(f"num_pairs: got {num_pairs}, wanted the pairs of the whole optimiser step")
    if nll_weight and chosen_tokens is None:
        raise ValueError("chosen_tokens: got None with an nll_weight, wanted the tokens of each chosen one")
    wide = torch.float64 if logp_chosen.dtype == torch.float64 else torch.float32
    chosen, rejected = logp_chosen.to(wide), logp_rejected.to(wide)
    gain_chosen = beta * (chosen - ref_chosen.detach().to(wide))
    gain_rejected = beta * (rejected - ref_rejected.detach().to(wide))
    margin = gain_chosen - gain_rejected
    pairs = max(len(margin) if num_pairs is None else num_pairs, 1)
    loss = -torch.nn.functional.logsigmoid(margin).sum() / pairs
    metrics = {
        "margin": margin.detach().sum() / pairs,
        "accuracy": (margin.detach() > 0).to(wide).sum() / pairs,
        "chosen_reward": gain_chosen.detach().sum() / pairs,
        "rejected_reward": gain_rejected.detach().sum() / pairs,
    }
    if chosen_tokens is not None:
        nll = -(chosen / _counts(chosen_tokens, chosen)).sum() / pairs
        metrics["nll"] = nll.detach()
        if nll_weight:
            loss = loss + nll_weight * nll
    return DpoLoss(loss, metrics)


def _check(name: str, x: Tensor, like: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        got = str(x.dtype) if isinstance(x, Tensor) else repr(x)
        raise TypeError(f"{name}: got {got}, wanted a floating tensor [N], a sum of log-probabilities each")
    if x.ndim != 1 or x.shape != like.shape:
        raise ValueError(
            f"{name}: got shape {list(x.shape)}, wanted one number for each pair, {list(like.shape[:1])}"
        )
    if x.device != like.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, wanted {like.device}, where logp_chosen is")


def _counts(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens of each chosen completion, at least one each."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"chosen_tokens: got {tokens!r}, wanted a tensor [N] of counts")
    if tokens.shape != like.shape:
        raise ValueError(f"chosen_tokens: got shape {list(tokens.shape)}, wanted {list(like.shape)}")
    return tokens.detach().to(like.device, like.dtype).clamp(min=1)
