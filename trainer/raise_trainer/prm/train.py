"""`raise-core prm train`: binary cross-entropy on labelled steps, with the runs and checkpoints of `sft`."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import raise_core as rc
from raise_core.chain import TaggedChain

from .. import ranks
from ..checkpoints import StepGuard
from ..errors import BadRow, UserError
from ..grpo import Phases
from ..passes import Group, passes
from ..rows import Row
from ..train import opened, report_step
from ..train_config import TrainConfig
from ..update import finish
from .chains import NEUTRAL, step_tokens, tagged_row

Labelled = tuple[TaggedChain, tuple[float, ...]]


def prm_step(
    scorer: rc.StepScorer,
    optimizer: torch.optim.Optimizer,
    inputs: Sequence[dict[str, Any]],
    labelled: Sequence[Labelled],
    *,
    micro_tokens: int = 1 << 20,
    guard: StepGuard | None = None,
    step: int = 0,
) -> dict[str, float]:
    """One step on the mean loss of all tags of all processes (`rc.step_loss`).

    Figures: loss [nats per tag]; step_accuracy: share of the tags not labelled neutral whose score is on
    their label's side of 0.5; good_score, bad_score: mean scores of either side; left out without such tags.
    """
    none = torch.zeros(0)
    groups = [Group(i, [list(chain.ids)], none, none) for i, (chain, _) in zip(inputs, labelled, strict=True)]
    found = {id(group): pair for group, pair in zip(groups, labelled, strict=True)}
    (tags,) = ranks.totals(sum(len(targets) for _, targets in labelled))
    optimizer.zero_grad(set_to_none=True)
    loss, margins, wanted = 0.0, [none], [none]
    for run, some in passes(scorer.scorer, groups, micro_tokens):
        one = copy.copy(scorer)
        one.scorer = run
        mine = [found[id(group)] for group in some]
        d = one.margins([g.inputs for g in some], [[chain] for chain, _ in mine])
        y = torch.tensor([t for _, targets in mine for t in targets])
        part = rc.step_loss(d, y, tags)
        torch.autograd.backward(part)
        loss += part.item()
        margins.append(d.detach().float().cpu())
        wanted.append(y)
    (loss,) = ranks.totals(loss)
    figures = {"loss": loss} | tag_figures(torch.cat(margins), torch.cat(wanted))
    batch = [chain.ids for chain, _ in labelled]
    return figures | finish(scorer.scorer.model, optimizer, loss, guard, step, batch)


def tag_figures(margins: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """step_accuracy, good_score and bad_score of `prm_step`. margins [K] nats, targets [K], on the CPU."""
    good, bad = targets > NEUTRAL, targets < NEUTRAL
    score = torch.sigmoid(margins)
    sums = ranks.totals(
        int((margins[good] > 0).sum() + (margins[bad] < 0).sum()), int((good | bad).sum()),
        float(score[good].sum()), int(good.sum()), float(score[bad].sum()), int(bad.sum()),
    )  # fmt: skip
    names = ("step_accuracy", "good_score", "bad_score")
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}


def run_prm(config: TrainConfig) -> Path:
    """Train the model of `config` on the labelled rows of its data; returns the run's folder.

    Settings are those of `sft`; a frozen vision tower is `freeze_vision`. Rows without steps or labels, and
    chains beyond the context, are left out by name like any other.
    """
    if config.eval_data:
        raise UserError("eval_data: not used by prm train; score held-out rows by: raise-core prm score FILE")
    # Whose confidence a reward would be is nobody's business here: this reference costs nothing.
    config = config.model_copy(update={"reference": "policy"})
    with opened(config, "prm", with_reference=True) as (run, _):
        policy, phases = run.policy, Phases()
        tokens = step_tokens(policy.tokenizer)
        scorer = rc.StepScorer(rc.Scorer(policy.model, max_tokens=config.micro_tokens), policy.tokenizer)
        read = partial(tagged_row, tokenizer=policy.tokenizer, tokens=tokens)
        run.feed.check = partial(_check, read, config.max_new_tokens)
        policy.model.train()
        with run.log.stage("prm", config.steps, done=run.state.step) as stage:
            for step in run.steps(stage, 1):
                with phases("decode"):
                    _, prompts = run.feed.take(step)
                labelled = [read(p.row) for p in prompts]
                with phases("update"):
                    figures = prm_step(
                        scorer, run.optimizer, [p.inputs for p in prompts], labelled,
                        micro_tokens=config.micro_tokens, guard=run.guard, step=step,
                    )  # fmt: skip
                report_step(run, stage, phases, step, figures, 1, sum(len(c.ids) for c, _ in labelled))
        return run.log.out


def _check(read: Any, most: int, row: Row) -> None:
    """What is read of a row fits: `max_new_tokens` is what the context leaves beside its prompt."""
    chain, _ = read(row)
    if len(chain.ids) > most:
        raise BadRow(
            f"row {row.problem_id}: its chain of {len(row.steps)} steps has {len(chain.ids)} tokens with its "
            f"tags, max_new_tokens is {most}; raise that, or drop the row"
        )
