"""From a row with steps to the tagged chain that a process reward model reads."""

from collections.abc import Sequence
from typing import Any

import raise_core as rc
from raise_core.chain import END, StepTokens, TaggedChain, tag_steps
from raise_core.tags import ANSWER_CLOSE, ANSWER_OPEN

from ..errors import BadRow, UserError
from ..rows import Row

NEUTRAL = 0.5


def chain_text(steps: Sequence[rc.Step], answer: str) -> str:
    """A chain with its answer in `<answer>` tags, as the trainer's policies write it; "" leaves that out."""
    try:
        text = rc.format_chain(steps, answer, open=ANSWER_OPEN, close=ANSWER_CLOSE)
    except ValueError as error:
        raise BadRow(str(error)) from None
    return text if answer else text.partition(END)[0]


def step_tokens(tokenizer: Any) -> StepTokens:
    """The ids of step tag, good and bad. UserError where the model has none."""
    try:
        return StepTokens.of(tokenizer)
    except ValueError:
        raise UserError(
            "the model has no step tag; make one that has by: raise-core prm tokens MODEL FOLDER"
        ) from None


def tagged_row(
    row: Row, tokenizer: Any, tokens: StepTokens, *, labelled: bool = True
) -> tuple[TaggedChain, tuple[float, ...]]:
    """A row's chain, marked for scoring, and the target of each of its tags (() when not labelled).

    Where the answer has no label of its own, the last tag is left out in training. BadRow without steps,
    without labels, and for steps whose text holds one of the chain's tokens.
    """
    name = f"row {row.problem_id}"
    if not row.steps:
        raise BadRow(f"{name}: no `steps`; add the chain's steps, or drop the row")
    if labelled and not row.labels:
        raise BadRow(f"{name}: no `labels`; make them by raise-core prm label, or drop the row")
    try:
        text = chain_text(row.steps, row.answer)
    except BadRow as error:
        raise BadRow(f"{name}: {error}") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (chain,) = tag_steps([ids], tokenizer, tokens)
    if chain.steps != len(row.steps):
        raise BadRow(f"{name}: its {len(row.steps)} steps are read back as {chain.steps}; mend their text")
    if not labelled:
        return chain, ()
    kept = len(row.labels)
    shown = TaggedChain(chain.ids, chain.positions[:kept], chain.steps, chain.ends[:kept])
    return shown, row.labels
