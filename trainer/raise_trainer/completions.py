"""`completions.jsonl` of a run: some sampled completions with their tokens, rewards and log-probabilities."""

import codecs
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, ValidationError, model_validator
from torch import Tensor

from raise_core.pieces import lay_out

from .errors import UserError
from .json_lines import append_json_lines, read_json_lines
from .logbook import Logbook

if TYPE_CHECKING:  # a report reads completions without the trainer
    from .grpo import Outcome

TAIL = 240  # characters of a completion on the console
DIGITS = 5  # of what is kept of a log-probability or an entropy, in nats


class Completion(BaseModel):
    """One completion; `raise-core score` needs `id` and `text` or `token_ids`, whoever wrote the file."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    id: StrictInt | StrictStr
    """`problem_id` of its row"""
    step: int = 0
    """finished optimiser steps when it was sampled"""
    problem_type: str = ""
    """of its row"""
    question: str = ""
    """of its row, with the options"""
    prompt: str = ""
    """the prompt's text; a run of one placeholder is written once, with its length"""
    text: str = ""
    """the decoded completion, with the end-of-sequence token"""
    token_ids: list[int] = []
    """the sampled tokens"""
    tokens: list[str] = []
    """what each of them writes; "" for one that ends inside a character"""
    logp: list[float] = []
    """log-probability of each under the policy that sampled, at temperature 1 [nats]"""
    entropy: list[float] = []
    """entropy of the distribution each was drawn from, at temperature 1 [nats]"""
    answer: tuple[int, int] | None = None
    """first token of the answer and the one after its last; null when there is no answer"""
    answer_missing: str | None = None
    """why there is no answer: missing, unclosed, truncated or empty"""
    text_score: float | None = None
    """of the rule for its kind, in [0, 1]"""
    confidence: float | None = None
    """of the reference in the answer, in [0, 1]"""
    reward: float | None = None
    """what was learned from"""
    advantage: float | None = None
    """reward less the group's mean, scaled as the settings say"""
    truncated: bool = False
    """reached max_new_tokens without an end"""

    @model_validator(mode="before")
    @classmethod
    def _has_content(cls, given: Any) -> Any:
        if isinstance(given, dict) and "text" not in given and "token_ids" not in given:
            raise ValueError("neither `text` nor `token_ids`")
        return given


def completions_of(step: int, outcome: "Outcome", tokenizer: Any, *, most: int = 8) -> list[Completion]:
    """The first `most` completions of a step, of the calling process; none for a step without prompts.

    The completions of a prompt are adjacent, so that with `most` a multiple of G they are whole groups.
    ValueError for `most` below 0.
    """
    if most < 0:
        raise ValueError(f"most: got {most}, wanted 0 or more completions")
    return [_completion(step, outcome, b, tokenizer) for b in range(len(outcome.rollout.completions))[:most]]


def write_completions(
    folder: Path, step: int, outcome: "Outcome", tokenizer: Any, *, most: int = 8
) -> list[Completion]:
    """Append `completions_of` a step to `completions.jsonl` in `folder`, and return them."""
    found = completions_of(step, outcome, tokenizer, most=most)
    append_json_lines(folder / "completions.jsonl", [c.model_dump(mode="json") for c in found])
    return found


def show_completions(log: Logbook, completions: Sequence[Completion]) -> None:
    """A table on the console of the first prompt's completions (adjacent ones): question, answers, figures.

    Of a long completion its end is shown. Nothing is shown where there are none.
    """
    shown = [c for c in completions if (c.id, c.question) == (completions[0].id, completions[0].question)]
    if shown:
        title = f"step {shown[0].step + 1}, row {shown[0].id}: {' '.join(shown[0].question.split()) or '–'}"
        header = ["completion", "answer", "score", "conf.", "reward", "adv."]
        log.table(title, header, [_table_row(c) for c in shown], texts=2)


def _table_row(c: Completion) -> list[str]:
    end = c.text if len(c.text) <= TAIL else "…" + c.text[-TAIL:]
    answer = f"({c.answer_missing})" if c.answer_missing else "".join(c.tokens[slice(*c.answer or (0, 0))])
    figures = (c.text_score, c.confidence, c.reward, c.advantage)
    return [end, answer.strip("<> \n"), *("–" if x is None else f"{x:.2f}" for x in figures)]


def read_completions(file: Path) -> Iterator[tuple[int, Completion]]:
    """Line number (from 1) and completion, in the file's order; a torn last line is left out.

    UserError naming the line for one that is no completion.
    """
    for number, record in read_json_lines(file):
        try:
            yield number, Completion.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "completion"
            raise UserError(
                f"{file}, line {number}: {name}: {first['msg']}; wanted `id`, and `text` or `token_ids`"
            ) from None


def _completion(step: int, outcome: "Outcome", b: int, tokenizer: Any) -> Completion:
    rollout, scored = outcome.rollout, outcome.scored
    assert scored is not None  # it has completions
    prompt, ids, found = rollout.prompts[rollout.owner[b]], rollout.completions[b], scored.found[b]
    return Completion(
        id=prompt.row.problem_id,
        step=step,
        problem_type=prompt.row.problem_type,
        question=prompt.row.question,
        prompt=prompt_text(prompt.ids.tolist(), tokenizer),
        text=scored.text[b],
        token_ids=ids,
        tokens=token_texts(ids, tokenizer),
        logp=_rounded(rollout.logp[b]),
        entropy=_rounded(rollout.entropy[b]),
        answer=None if found.reason else (found.start, found.stop),
        answer_missing=found.reason,
        text_score=float(scored.score[b]),
        confidence=float(scored.confidence[b]),
        reward=float(scored.reward[b]),
        advantage=float(outcome.advantage[b]),
        truncated=bool(scored.truncated[b]),
    )


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token writes: one that ends inside a character writes "", the one that ends it all of it.

    Special tokens are shown by their names. Bytes that are no UTF-8 are shown as U+FFFD.
    """
    layout = lay_out(ids, tokenizer)
    data = layout.text.encode("utf-8", "surrogateescape")
    reader, gaps = codecs.getincrementaldecoder("utf-8")("replace"), set(layout.gaps)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    special = set(tokenizer.all_special_ids)
    texts = list[str]()
    for token_id, name, start, end in zip(ids, names, layout.starts, layout.ends, strict=True):
        if start == end:
            texts.append(str(name) if token_id in special else "")
        else:
            texts.append(" " * (start in gaps and start > 0) + reader.decode(data[start:end]))
    rest = reader.decode(b"", final=True)
    return [*texts[:-1], texts[-1] + rest] if texts else []


def prompt_text(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of a prompt; n equal added tokens in a row (a video's placeholders) are one, with `×n`."""
    parts, plain = list[str](), list[int]()
    added = tokenizer.added_tokens_decoder
    for token_id, run in groupby(ids):
        count = len(list(run))
        if count == 1 or token_id not in added:
            plain += [token_id] * count
            continue
        parts += [tokenizer.decode(plain), f"{tokenizer.decode([token_id])}×{count}"]
        plain = []
    return "".join([*parts, tokenizer.decode(plain)])
