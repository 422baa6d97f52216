"""The two gradient steps, supervised and GRPO; the only file with `backward()`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import raise_core as rc

from .errors import UserError
from .prompts import Prompt
from .rollout import Rollout

MAX_GRAD_NORM = 1.0


def sft_step(
    scorer: rc.Scorer,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Prompt],
    targets: Sequence[Sequence[int]],
) -> dict[str, float]:
    """One step on the mean negative log-probability of the target tokens."""
    stats = scorer.token_stats([p.inputs for p in prompts], [[t] for t in targets], want=("logp", "entropy"))
    logp, entropy = (torch.cat([getattr(s, name) for (s,) in stats]) for name in ("logp", "entropy"))
    loss = -logp.mean()
    return {"loss": loss.item(), "entropy": entropy.mean().item()} | _step(scorer.model, optimizer, loss)


def grpo_step(
    scorer: rc.Scorer,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantage: Tensor,
    logp_ref: Tensor,
    *,
    kind: str,
    max_length: int,
) -> dict[str, float]:
    """One on-policy step: the old policy is this one, so its log-probabilities come for free."""
    rows = scorer.completion_rows(rollout.inputs, rollout.groups)
    device, head = rows.hidden.device, scorer.head().options()
    result = rc.linear_policy_loss(
        rows.hidden,
        head.pop("weight"),
        rows.targets,
        None,
        advantage.to(device),
        rows.offsets,
        kind=kind,
        logp_ref=logp_ref.to(device),
        num_tokens=len(rows.targets),
        num_sequences=len(rollout.completions),
        max_length=max_length,
        **head,
    )
    metrics = {name: value.item() for name, value in result.metrics.items()}
    metrics |= {"loss": result.loss.item(), "entropy": torch.cat(rollout.entropy).mean().item()}
    return metrics | _step(scorer.model, optimizer, result.loss)


def _step(model: Any, optimizer: torch.optim.Optimizer, loss: Tensor) -> dict[str, float]:
    if not torch.isfinite(loss):
        raise UserError(
            f"the loss is {loss.item()}; the weights were left as they were; lower the learning rate"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM, error_if_nonfinite=True)
    optimizer.step()
    return {"grad_norm": norm.item()}
