"""The two gradient steps, supervised and GRPO, and the end of every step: clip, guard, optimiser."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import raise_core as rc

from . import ranks
from .checkpoints import StepGuard
from .checkpoints.ranks import whole
from .errors import UserError
from .method import Method
from .passes import Group, passes

MAX_GRAD_NORM = 1.0


def sft_step(
    scorer: rc.Scorer,
    optimizer: torch.optim.Optimizer,
    inputs: Sequence[dict[str, Any]],
    targets: Sequence[Sequence[int]],
    *,
    micro_tokens: int = 1 << 20,
    guard: StepGuard | None = None,
    step: int = 0,
) -> dict[str, float]:
    """One step on the mean negative log-probability of the target tokens of all processes."""
    none = torch.zeros(0)
    groups = [Group(i, [list(t)], none, none) for i, t in zip(inputs, targets, strict=True)]
    (tokens,) = ranks.totals(sum(g.tokens for g in groups))
    optimizer.zero_grad(set_to_none=True)
    loss = entropy = 0.0
    for run, some in passes(scorer, groups, micro_tokens):
        found = run.token_stats(
            [g.inputs for g in some], [g.completions for g in some], want=("logp", "entropy")
        )
        logp, h = (torch.cat([getattr(s, name) for (s,) in found]) for name in ("logp", "entropy"))
        part = -logp.sum() / max(tokens, 1)
        part.backward()
        loss += part.item()
        entropy += h.sum().item() / max(tokens, 1)
    loss, entropy = ranks.totals(loss, entropy)
    figures = {"loss": loss, "entropy": entropy}
    return figures | finish(scorer.model, optimizer, loss, guard, step, _to_look_at(groups))


def policy_step(
    scorer: rc.Scorer,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    method: Method,
    *,
    guard: StepGuard | None = None,
    step: int = 0,
) -> dict[str, float]:
    """One optimiser step on these groups and those of the other processes.

    Normalisers count the completions of all of them, and gradients are summed: neither micro-batches nor the
    number of processes changes the step. Groups without an advantage count there too; where no KL wants their
    tokens their gradient is exactly 0, and they are not run. The first update of a rollout is on-policy, and
    leaves each group its `logp_old` for the next ones.
    """
    run = [g for g in groups if g.logp_ref is not None or g.moves]
    tokens, sequences, tokens_run, idle = ranks.totals(
        sum(g.tokens for g in groups),
        sum(len(g.completions) for g in groups),
        sum(g.tokens for g in run),
        len(groups) - len(run),
    )
    optimizer.zero_grad(set_to_none=True)
    parts = list[dict[str, float]]()
    for one, some in passes(scorer, run, method.micro_tokens):
        frozen = [g.features for g in some] if any(g.features is not None for g in some) else None
        rows = one.completion_rows([g.inputs for g in some], [g.completions for g in some], features=frozen)
        device, head = rows.hidden.device, scorer.head().options()
        olds = [g.logp_old for g in some if g.logp_old is not None]
        refs = [g.logp_ref for g in some if g.logp_ref is not None]
        steps = None
        if any(g.token_advantage is not None for g in some):
            own = [g.token_advantage for g in some]
            steps = torch.cat(
                [torch.zeros(g.tokens) if a is None else a for g, a in zip(some, own, strict=True)]
            )
        made = rc.linear_policy_loss(
            rows.hidden,
            head.pop("weight"),
            rows.targets,
            torch.cat(olds).to(device) if olds else None,
            torch.cat([g.advantage for g in some]).to(device),
            rows.offsets,
            temperature=method.temperature,
            kind=method.loss,
            num_tokens=tokens,
            num_sequences=sequences,
            max_length=method.max_new_tokens,
            logp_ref=torch.cat(refs).to(device) if refs else None,
            kl=method.kl,
            kl_estimator=method.kl_estimator,
            eps_low=method.clip[0],
            eps_high=method.clip[1],
            dual_clip=method.clip[2] if len(method.clip) == 3 else None,
            max_ratio=1.0 + method.clip[1],
            token_advantage=None if steps is None else steps.to(device),
            **head,
        )
        made.loss.backward()
        assert made.logp is not None
        for group, logp in zip(some, made.logp.split([g.tokens for g in some]), strict=True):
            if group.logp_old is None:
                group.logp_old = logp.detach().cpu()
        parts.append({"loss": made.loss.item()} | {k: v.item() for k, v in made.metrics.items()})
    figures = ranks.joined(parts)
    if idle and tokens_run:
        figures["ratio_mean"] *= tokens / tokens_run
    figures["idle_groups"] = idle
    return figures | finish(
        scorer.model, optimizer, figures.get("loss", 0.0), guard, step, _to_look_at(groups)
    )


def _to_look_at(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What is kept of a step that is not finite; media are found by the row's number in rows.jsonl."""
    return [
        {"prompt": g.inputs["input_ids"], "completions": g.completions, "advantage": g.advantage}
        for g in groups
    ]


def finish(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: float,
    guard: StepGuard | None,
    step: int,
    batch: Any,
) -> dict[str, float]:
    """Sum gradients over the processes, clip, and step if everything is finite.

    Without a guard UserError says that it is not; the weights are as they were either way.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    ranks.sum_gradients(trained)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)))
    if guard is not None:
        if not guard.good(step, batch=batch, loss=loss, grad_norm=norm):
            return {"grad_norm": norm, "skipped": 1.0}
    elif not (abs(loss) < float("inf") and norm < float("inf")):
        raise UserError(
            f"the loss is {loss}, the gradient's norm {norm}; the weights were left as they were; lower the "
            "learning rate"
        )
    optimizer.step()
    return {"grad_norm": norm}
