"""The demo's two training loops; `grpo.Grpo.step` reads like the method's algorithm box.

Departures from the paper: one update per rollout (so no clipping happens), no KL term (as in its best
setting), a reference that starts from the warm-started model instead of a pretrained one.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

import raise_core as rc

from .chain_judge import ChainJudge
from .completions import completions_of, show_completions
from .config import DemoConfig
from .evaluate import judge
from .grpo import Grpo, Phases
from .logbook import Logbook
from .method import Method
from .prompts import Prompt
from .rollout import Rollout, draws
from .scoring import Scored
from .update import sft_step

T = TypeVar("T")
TABLE_EVERY = 50  # GRPO steps between completion tables


@dataclass(frozen=True)
class Supervised:
    """A prompt and the completion to imitate."""

    prompt: Prompt
    target: list[int]


def _batches(items: Sequence[T], size: int, rng: random.Random) -> Iterator[list[T]]:
    """Endless shuffled epochs in batches of `size`; an epoch's short last batch goes on into the next one."""
    pool: list[T] = []
    while True:
        while len(pool) < size:
            pool += rng.sample(items, len(items))
        yield pool[:size]
        pool = pool[size:]


def set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Ten steps of warm-up, then linear decay to a tenth."""
    lr = peak * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / steps)
    for group in optimizer.param_groups:
        group["lr"] = lr


def _adamw(model: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def run_sft(
    model: Any, examples: Sequence[Supervised], config: DemoConfig, log: Logbook, *, name: str, steps: int
) -> None:
    """`steps` supervised steps on `warm_batch` examples each."""
    model.train()
    scorer = rc.Scorer(model)
    batches = _batches(examples, config.warm_batch, random.Random(f"{config.seed} {name}"))
    optimizer = _adamw(model, config.warm_lr)
    with log.stage(name, steps) as stage:
        for step in range(steps):
            set_lr(optimizer, config.warm_lr, step, steps)
            batch = next(batches)
            figures = sft_step(scorer, optimizer, [e.prompt.inputs for e in batch], [e.target for e in batch])
            log.write(name, step, **figures)
            stage.advance(loss=figures["loss"])


def run_grpo(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    config: DemoConfig,
    log: Logbook,
    *,
    name: str,
    sampling: dict[str, Any],
    method: Method | None = None,
    reference: rc.Reference | None = None,
    phases: Phases | None = None,
    chains: ChainJudge | None = None,
) -> None:
    """GRPO with the configured reward. method: instead of the configured one; reference: instead of the EMA;
    phases: their clock; chains: the PRM of a method that has one.
    """
    method = method or replace(Method.of(config), watch_kl=True)
    reference = reference or rc.EmaReference(model, decay=config.ema_decay)
    optimizer = _adamw(model, config.grpo_lr)
    batches = _batches(prompts, config.prompts, random.Random(f"{config.seed} grpo"))
    grpo = Grpo(
        model, reference, optimizer, tokenizer, method,
        eos=sampling["eos"], suppress=sampling["suppress"], phases=phases, judge=chains,
    )  # fmt: skip
    with log.stage(name, config.grpo_steps) as stage:
        for step in range(config.grpo_steps):
            set_lr(optimizer, config.grpo_lr, step, config.grpo_steps)
            places = [(step, index) for index in range(config.prompts)]
            made = grpo.step(
                next(batches), draws(config.seed, places, config.group_size, config.max_new_tokens), step
            )
            assert made.scored is not None
            figures = made.figures | _judged(made.rollout, made.scored)
            log.write(name, step, **figures)
            stage.advance(reward=figures["reward_mean"], acc=figures["accuracy"], match=figures["match"])
            if step % TABLE_EVERY == TABLE_EVERY - 1:
                show_completions(log, completions_of(step, made, tokenizer, most=config.group_size))


def _judged(rollout: Rollout, scored: Scored) -> dict[str, float]:
    verdicts = [judge(rollout.prompts[p].row, t) for p, t in zip(rollout.owner, scored.text, strict=True)]
    return {
        "accuracy": sum(right for right, _ in verdicts) / len(verdicts),
        "match": sum(match for _, match in verdicts) / len(verdicts),
    }
