"""The two gradient steps, supervised and GRPO; the only file with `backward()`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import raise_core as rc

from .errors import UserError
from .forward import forward
from .prompts import Prompt
from .rollout import Rollout

MAX_GRAD_NORM = 1.0


def completion_stats(
    model: Any, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], owner: Sequence[int]
) -> rc.TokenStats:
    """Log-probability and entropy of every completion token, packed `[T]`, with gradient."""
    hidden = forward(model, prompts, completions, owner)
    logits = model.get_output_embeddings()(hidden.states[hidden.completion_rows(completions)])
    targets = torch.tensor([t for c in completions for t in c], device=logits.device)
    return rc.token_stats(logits, targets, want=("logp", "entropy"))


def sft_step(
    model: Any, optimizer: torch.optim.Optimizer, prompts: Sequence[Prompt], targets: Sequence[Sequence[int]]
) -> dict[str, float]:
    """One step on the mean negative log-probability of the target tokens."""
    stats = completion_stats(model, prompts, targets, range(len(prompts)))
    loss = -stats.logp.mean()
    return {"loss": loss.item(), "entropy": stats.entropy.mean().item()} | _step(model, optimizer, loss)


def grpo_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantage: Tensor,
    logp_ref: Tensor,
    *,
    kind: str,
    max_length: int,
) -> dict[str, float]:
    """One on-policy step: the old policy is this one, so its log-probabilities come for free."""
    stats = completion_stats(model, rollout.prompts, rollout.completions, rollout.owner)
    lengths = torch.tensor([0, *map(len, rollout.completions)], device=stats.logp.device)
    result = rc.policy_loss(
        stats.logp,
        stats.logp.detach(),
        advantage.to(stats.logp.device),
        lengths.cumsum(0),
        kind=kind,
        logp_ref=logp_ref.to(stats.logp.device),
        num_tokens=int(lengths.sum()),
        num_sequences=len(rollout.completions),
        max_length=max_length,
    )
    metrics = {name: value.item() for name, value in result.metrics.items()}
    metrics |= {"loss": result.loss.item(), "entropy": stats.entropy.mean().item()}
    return metrics | _step(model, optimizer, result.loss)


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
