"""The demo's process reward model: taught to see what a step is about, and to judge what the step says."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import raise_core as rc
from raise_core.chain import TaggedChain, tag_steps

from .errors import UserError
from .logbook import Logbook
from .loop import _adamw, _batches, set_lr
from .prm.chains import NEUTRAL, step_tokens, tagged_row
from .prm.train import tag_figures
from .prompts import Prompt
from .rollout import draws, sample
from .search.beam import Generation
from .step_world import PARTS, TASK, judged_steps, truth_of
from .steps_config import StepsConfig
from .update import finish
from .world import answer_claim

TOGETHER = 32  # questions sampled at a time


@dataclass(frozen=True)
class Lesson:
    """A chain with the label of each of its tags, and what is true at some of its tokens.

    true: positions of `chain.ids`, each with the token of the word that is true there: tags of steps that
    state a word, and each word of the answer.
    """

    prompt: Prompt
    chain: TaggedChain
    labels: tuple[float, ...]
    true: tuple[tuple[int, int], ...]


class Words:
    """Token ids of the world's words; UserError unless each is one token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tags = step_tokens(tokenizer)
        self.kinds = [{word: self._one(word, tokenizer) for word in words} for _, _, words in PARTS]
        self.id = {word: token for kind in self.kinds for word, token in kind.items()}

    @staticmethod
    def _one(word: str, tokenizer: Any) -> int:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(f"{word!r}: wanted a word of one token, got {len(ids)}")
        found: int = ids[0]
        return found

    def lesson(
        self, prompt: Prompt, chain: TaggedChain, labels: Sequence[float], named: Sequence[str | None]
    ) -> Lesson:
        """labels: of the chain's tags; named: for the tag of each step the true word, None for none."""
        steps = zip(chain.positions, named, strict=False)
        true = [(at, self.id[word]) for at, word in steps if word is not None]
        if len(labels) > chain.steps:
            first, end = max(chain.positions[: chain.steps], default=0), chain.positions[chain.steps]
            for kind, word in zip(self.kinds, truth_of(prompt.row), strict=True):
                stated = [i for i in range(first, end) if chain.ids[i] in kind.values()]
                true += [(stated[-1], self.id[word])] if stated else []
        return Lesson(prompt, chain, tuple(labels), tuple(true))


def lessons(prompts: Sequence[Prompt], tokenizer: Any) -> list[Lesson]:
    """Of rows with steps and labels, a step for each word of their right solution."""
    words, made = Words(tokenizer), list[Lesson]()
    for prompt in prompts:
        chain, labels = tagged_row(prompt.row, tokenizer, words.tags)
        made.append(words.lesson(prompt, chain, labels, truth_of(prompt.row)))
    return made


@torch.no_grad()
def own_lessons(
    how: Generation, prompts: Sequence[Prompt], config: StepsConfig, log: Logbook
) -> list[Lesson]:
    """The policy's own chains, `config.own_chains` a prompt, labelled by the world.

    What it writes and a made-up chain never has (steps that say nothing, or the same again) is judged too.
    Chains without a step or an answer are left out.
    """
    how.model.eval()
    words, made = Words(how.tokenizer), list[Lesson]()
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
                found = (own_lesson(prompt, ids, how.tokenizer, words) for ids in group)
                made += [one for one in found if one is not None]
            stage.advance(len(some))
    return made


def own_lesson(prompt: Prompt, ids: Sequence[int], tokenizer: Any, words: Words) -> Lesson | None:
    """A sampled chain with the world's labels; None without a complete step or answer."""
    chain, truth = rc.parse_chain(tokenizer.decode(ids)), truth_of(prompt.row)
    (tagged,) = tag_steps([ids], tokenizer, words.tags)
    if not tagged.positions:
        return None
    steps = judged_steps(chain.steps, truth)
    labels = [float(good) for good, _ in steps]
    if len(tagged.positions) > tagged.steps:
        labels.append(float(answer_claim(TASK, chain.answer, ()) == truth))
    return words.lesson(prompt, tagged, labels, [word for _, word in steps])


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
    """One step on `rc.step_loss`, and on naming what is true where a chain states a word.

    Whether a word is the true one is a comparison, about which neither the word nor the video says anything
    alone: a model that looks at neither has no gradient that leads it there. Naming the true word, at the tag
    of a step and at the words of an answer, brings what the video shows beside what the chain says. Figures:
    those of `prm_step`, and naming [nats per word].
    """
    optimizer.zero_grad(set_to_none=True)
    read = [replace(x.chain, positions=(*x.chain.positions, *(at for at, _ in x.true))) for x in batch]
    rows = scorer.tag_rows([x.prompt.inputs for x in batch], [[chain] for chain in read])
    sizes = [size for x in batch for size in (len(x.chain.positions), len(x.true))]
    parts = torch.split(rows, sizes)
    margins, named = scorer.row_margins(torch.cat(parts[::2])), torch.cat(parts[1::2])
    targets = torch.tensor([y for x in batch for y in x.labels])
    true = torch.tensor([t for x in batch for _, t in x.true], dtype=torch.long, device=rows.device)
    logp = rc.linear_token_stats(named, targets=true, **scorer.scorer.head().options()).logp
    assert logp is not None
    loss, naming = rc.step_loss(margins, targets, len(targets)), -logp.sum() / max(len(true), 1)
    torch.autograd.backward(loss + naming)
    figures = {"loss": loss.item(), "naming": naming.item()}
    figures |= tag_figures(margins.detach().float().cpu(), targets)
    return figures | finish(scorer.scorer.model, optimizer, loss.item() + naming.item(), None, 0, None)


@torch.no_grad()
def own_rates(scorer: rc.StepScorer, made: Sequence[Lesson]) -> dict[str, float]:
    """Shares of the tags of chains that the PRM has on the right side of 0.5; 0 without such a tag.

    own_step_accuracy: of steps; own_good_found, own_bad_found: of good and of bad ones; own_bad_share: how
    many are bad. own_answer_accuracy, own_right_found, own_wrong_found: the same of answers.
    """
    counts = {(part, good): [0, 0] for part in ("step", "answer") for good in (True, False)}
    for first in range(0, len(made), TOGETHER):
        some = made[first : first + TOGETHER]
        margins = iter(scorer.margins([x.prompt.inputs for x in some], [[x.chain] for x in some]).tolist())
        for x in some:
            for i, label in enumerate(x.labels):
                count = counts["step" if i < x.chain.steps else "answer", label > NEUTRAL]
                count[0] += (next(margins) > 0) == (label > NEUTRAL)
                count[1] += 1

    def share(*cells: list[int]) -> float:
        return sum(found for found, _ in cells) / max(sum(n for _, n in cells), 1)

    good, bad = counts["step", True], counts["step", False]
    right, wrong = counts["answer", True], counts["answer", False]
    return {
        "own_step_accuracy": share(good, bad), "own_good_found": share(good), "own_bad_found": share(bad),
        "own_bad_share": bad[1] / max(good[1] + bad[1], 1),
        "own_answer_accuracy": share(right, wrong), "own_right_found": share(right),
        "own_wrong_found": share(wrong),
    }  # fmt: skip
