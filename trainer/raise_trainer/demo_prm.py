"""The demo's process reward model: taught to see what a step is about, and to judge what the step says."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import raise_core as rc
from raise_core.chain import StepTokens, TaggedChain, tag_steps

from .errors import UserError
from .logbook import Logbook
from .loop import _adamw, _batches, set_lr
from .prm.chains import step_tokens, tagged_row
from .prm.train import Labelled, tag_figures
from .prompts import Prompt
from .rollout import draws, sample
from .search.beam import Generation
from .step_world import TASK, judged_steps, truth_of
from .steps_config import StepsConfig
from .update import finish
from .world import answer_claim

TOGETHER = 32  # questions sampled at a time


@dataclass(frozen=True)
class Lesson:
    """A chain with the label of each of its tags.

    true: for the tag of each step the token that is true there; None where the step is about nothing known.
    """

    prompt: Prompt
    labelled: Labelled
    true: tuple[int | None, ...]

    @property
    def chain(self) -> TaggedChain:
        """The chain as the PRM reads it."""
        return self.labelled[0]


def lessons(prompts: Sequence[Prompt], tokenizer: Any) -> list[Lesson]:
    """Of rows with steps and labels, one for each word of their right solution."""
    tokens = step_tokens(tokenizer)
    return [
        Lesson(p, tagged_row(p.row, tokenizer, tokens), _word_ids(truth_of(p.row), tokenizer))
        for p in prompts
    ]


@torch.no_grad()
def own_lessons(
    how: Generation, prompts: Sequence[Prompt], config: StepsConfig, log: Logbook
) -> list[Lesson]:
    """The policy's own chains, `config.own_chains` a prompt, labelled by the world.

    What it writes and a made-up chain never has (steps that say nothing, or the same again) is judged too.
    Chains without a step or an answer are left out.
    """
    how.model.eval()
    tokens, made = step_tokens(how.tokenizer), list[Lesson]()
    with log.stage("own chains", len(prompts)) as stage:
        for first in range(0, len(prompts), TOGETHER):
            some = prompts[first : first + TOGETHER]
            places = [(-2, first + i) for i in range(len(some))]
            rollout = sample(
                how.model, some, group_size=config.own_chains, max_new_tokens=how.max_new_tokens,
                temperature=how.temperature, eos=how.eos, suppress=how.suppress,
                draws=draws(how.seed, places, config.own_chains, how.max_new_tokens),
            )  # fmt: skip
            for prompt, group in zip(some, rollout.groups, strict=True):
                found = (own_lesson(prompt, ids, how.tokenizer, tokens) for ids in group)
                made += [one for one in found if one is not None]
            stage.advance(len(some))
    return made


def own_lesson(prompt: Prompt, ids: Sequence[int], tokenizer: Any, tokens: StepTokens) -> Lesson | None:
    """A sampled chain with the world's labels; None without a complete step or answer."""
    chain, truth = rc.parse_chain(tokenizer.decode(ids)), truth_of(prompt.row)
    (tagged,) = tag_steps([ids], tokenizer, tokens)
    if not tagged.positions:
        return None
    steps = judged_steps(chain.steps, truth)
    labels = [float(good) for good, _ in steps]
    if len(tagged.positions) > tagged.steps:
        labels.append(float(answer_claim(TASK, chain.answer, ()) == truth))
    words = tuple(None if word is None else _word_ids([word], tokenizer)[0] for _, word in steps)
    return Lesson(prompt, (tagged, tuple(labels)), words)


def _word_ids(words: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    found = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    if any(len(ids) != 1 for ids in found):
        raise UserError(f"{', '.join(words)}: wanted words of one token each")
    return tuple(ids[0] for ids in found)


def train_prm(
    prm: Any, tokenizer: Any, examples: Sequence[Lesson], config: StepsConfig, log: Logbook
) -> None:
    """`config.prm_steps` steps on chains whose labels the world knows exactly."""
    prm.train()
    scorer = rc.StepScorer(rc.Scorer(prm), tokenizer)
    batches = _batches(examples, config.batch, random.Random(f"{config.seed} prm"))
    optimizer = _adamw(prm, config.lr / 2)
    with log.stage("prm", config.prm_steps) as stage:
        for step in range(config.prm_steps):
            set_lr(optimizer, config.lr / 2, step, config.prm_steps)
            figures = lesson_step(scorer, optimizer, next(batches))
            log.write("prm", step, **figures)
            stage.advance(loss=figures["loss"], acc=figures["step_accuracy"])


def lesson_step(
    scorer: rc.StepScorer, optimizer: torch.optim.Optimizer, batch: Sequence[Lesson]
) -> dict[str, float]:
    """One step on `rc.step_loss`, and on naming at the tag of each step the word that would be true there.

    Whether a word is the true one is a comparison, about which neither the word nor the video says anything
    alone: a model that looks for neither at a tag has no gradient that leads it there. Naming the true word
    brings what the video shows to the tag. Figures: those of `prm_step`, and naming [nats per step].
    """
    optimizer.zero_grad(set_to_none=True)
    rows = scorer.tag_rows([x.prompt.inputs for x in batch], [[x.chain] for x in batch])
    margins = scorer.row_margins(rows)
    targets = torch.tensor([y for x in batch for y in x.labelled[1]])
    starts = torch.tensor([0, *(len(x.chain.positions) for x in batch)]).cumsum(0).tolist()
    named = [
        (start + i, token)
        for start, x in zip(starts, batch, strict=False)
        for i, token in enumerate(x.true)
        if token is not None
    ]
    at, true = torch.tensor(named, dtype=torch.long, device=rows.device).reshape(-1, 2).T
    logp = rc.linear_token_stats(rows[at], targets=true, **scorer.scorer.head().options()).logp
    assert logp is not None
    loss, naming = rc.step_loss(margins, targets, len(targets)), -logp.sum() / max(len(named), 1)
    torch.autograd.backward(loss + naming)
    figures = {"loss": loss.item(), "naming": naming.item()}
    figures |= tag_figures(margins.detach().float().cpu(), targets)
    return figures | finish(scorer.scorer.model, optimizer, loss.item() + naming.item(), None, 0, None)
