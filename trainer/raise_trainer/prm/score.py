"""`raise-core prm score`: the step scores of a file of chains, and how often they agree with its labels."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import raise_core as rc
from raise_core.chain import TaggedChain

from ..errors import BadMedia, BadRow, UserError
from ..media.loader import MediaLoader
from ..models import load_policy
from ..prompts import Prompt, PromptBuilder
from ..row_files import RowSource
from ..rows import Row
from ..train_config import TrainConfig
from .chains import NEUTRAL, step_tokens, tagged_row


@dataclass
class Agreement:
    """Tags not labelled neutral: how many, and how many scores were on their label's side of 0.5."""

    tags: int = 0
    right: int = 0
    left_out: list[str] = field(default_factory=list)

    def saw(self, scores: Sequence[float], labels: Sequence[float]) -> None:
        """Count a row's scores against its labels."""
        for score, label in zip(scores, labels, strict=False):
            if label != NEUTRAL:
                self.tags += 1
                self.right += (score > NEUTRAL) == (label > NEUTRAL) and score != NEUTRAL


def score_rows(
    config: TrainConfig, *, out: Path, step_share: float = 0.2, console: Console | None = None
) -> Agreement:
    """Score the chains of `config.data` by the PRM `config.model`; one JSON line a row in `out`.

    A line has row (its number over all files), problem_id, step_scores, answer_score (null without an
    answer) and reward (`rc.trajectory_reward`, an answer that is not there counting 0). A row that cannot be
    used is named and left out, or stops with on_bad_media=fail. Chains are scored `prompts` at a time.
    """
    console = console or Console(highlight=False)
    if out.resolve() in {one.path.resolve() for one in config.data}:
        raise UserError(f"--out {out}: is a file of rows; name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    policy = load_policy(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    policy.model.eval()
    step_tokens(policy.tokenizer)
    scorer = rc.StepScorer(rc.Scorer(policy.model, max_tokens=config.micro_tokens), policy.tokenizer)
    room = policy.context
    builder = PromptBuilder.configured(policy.processor, config, max_length=room)
    source, found = RowSource.open(config.data, config.sampling), Agreement()
    with MediaLoader(workers=config.workers) as loader, out.open("w", encoding="utf-8") as file:
        for first in range(0, len(source), config.prompts):
            numbers = range(first, min(first + config.prompts, len(source)))
            members = list(_members(source, numbers, builder, loader, scorer, config, found))
            for line, labels in _lines(scorer, members, step_share, config, found):
                found.saw([*line["step_scores"], line["answer_score"] or 0.0], labels)
                file.write(json.dumps(line) + "\n")
    for text in found.left_out:
        console.print(f"left out: {text}", markup=False, soft_wrap=True)
    rate = f", {found.right / found.tags:.1%} of {found.tags} labels agreed with" if found.tags else ""
    console.print(
        f"{out}: {len(source) - len(found.left_out)} of {len(source)} chains{rate}",
        markup=False,
        soft_wrap=True,
    )
    return found


Member = tuple[int, Prompt, TaggedChain]


def _members(
    source: RowSource,
    numbers: Sequence[int],
    builder: PromptBuilder,
    loader: MediaLoader,
    scorer: rc.StepScorer,
    config: TrainConfig,
    found: Agreement,
) -> Iterator[Member]:
    """The rows of a batch that can be scored, with their prompts and tagged chains."""
    read = list[tuple[int, Row, TaggedChain]]()
    for number in numbers:
        try:
            row = source[number]
            chain, _ = tagged_row(row, scorer.tokenizer, scorer.tokens, labelled=False)
            read.append((number, row, chain))
        except BadRow as error:
            _leave_out(config, found, error)
    made = builder.build([row for _, row, _ in read], loader)
    for (number, row, chain), prompt in zip(read, made, strict=True):
        length = len(chain.ids) + (len(prompt.ids) if isinstance(prompt, Prompt) else 0)
        if not isinstance(prompt, Prompt):
            _leave_out(config, found, prompt)
        elif scorer.max_length is not None and length > scorer.max_length:
            text = (
                f"row {row.problem_id}: its {chain.steps} steps have {length} tokens with the prompt and the "
                f"tags; the PRM's context has {scorer.max_length}; shorten the chain, or drop the row"
            )
            _leave_out(config, found, BadRow(text))
        else:
            yield number, prompt, chain


@torch.no_grad()
def _lines(
    scorer: rc.StepScorer, members: Sequence[Member], step_share: float, config: TrainConfig, found: Agreement
) -> Iterator[tuple[dict[str, Any], tuple[float, ...]]]:
    """What is written of each row, and its labels."""
    margins = scorer.margins([p.inputs for _, p, _ in members], [[chain] for _, _, chain in members])
    values = iter(torch.sigmoid(margins).tolist())
    for number, prompt, chain in members:
        scores = [next(values) for _ in chain.positions]
        if not all(map(math.isfinite, scores)):
            text = (
                f"row {prompt.row.problem_id}: a score is not finite; the PRM's logits are not, mend the PRM"
            )
            _leave_out(config, found, BadRow(text))
            continue
        steps, answer = scores[: chain.steps], (scores[chain.steps :] or [None])[0]
        reward = rc.trajectory_reward(
            torch.tensor(steps), torch.tensor([0, len(steps)]), torch.tensor([answer or 0.0]), step_share
        )
        line = {
            "row": number,
            "problem_id": prompt.row.problem_id,
            "step_scores": steps,
            "answer_score": answer,
            "reward": float(reward[0]),
        }
        yield line, prompt.row.labels


def _leave_out(config: TrainConfig, found: Agreement, error: UserError | BadRow | BadMedia) -> None:
    if config.on_bad_media == "fail":
        raise UserError(str(error))
    found.left_out.append(str(error))
