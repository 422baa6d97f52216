"""`raise-core prm label`: labels for steps, from rollouts (Math-Shepherd) or from a judge."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from raise_core.chain import step_ends

from ..chat_client import ChatClient
from ..errors import BadMedia, BadRow, UserError
from ..media.loader import MediaLoader
from ..models import Policy, load_policy
from ..prompts import Prompt, PromptBuilder
from ..rollout import draws, sample
from ..row_files import RowSource
from ..rows import Row
from .chains import chain_text
from .judge import Unreadable, messages_for, read_labels
from .label_config import LabelConfig

Labels = dict[str, Any]  # what a row gains
Labeller = Callable[[int, Row], Labels]


def label_rows(config: LabelConfig, *, console: Console | None = None) -> Counter[str]:
    """Write the rows of `config.data` with labels, a JSON line each, in their order; returns the counts.

    A row gains `labels`, and by rollouts `shares`, one for each step and one for its answer if it has one.
    Rows that `out` has are not done again, so that a command that was stopped goes on. A row that cannot be
    used, and one whose judge's reply cannot be read, is named, counted and left out: no label is guessed.
    """
    console = console or Console(highlight=False)
    source = RowSource.open(config.data, config.training().sampling)
    done = _done(config.out, source.fingerprint)
    label = _by_judge(config) if config.by == "judge" else _by_rollouts(config)
    counts: Counter[str] = Counter(labelled=0, had=0, unreadable=0, left_out=0)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with config.out.open("a", encoding="utf-8") as file:
        for number in range(len(source)):
            if number in done:
                counts["had"] += 1
                continue
            try:
                found = label(number, _with_steps(source[number]))
            except (BadRow, BadMedia, Unreadable) as error:
                unreadable = isinstance(error, Unreadable)
                if config.on_bad_media == "fail" and not unreadable:
                    raise UserError(str(error)) from None
                counts["unreadable" if unreadable else "left_out"] += 1
                console.print(f"left out: row {number}: {error}", markup=False, soft_wrap=True)
                continue
            held, within = source.where(number)
            line = {**held.raw(within), **found, "row": number, "of": source.fingerprint}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            counts["labelled"] += 1
    said = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    console.print(f"{config.out}: {said}", markup=False, soft_wrap=True)
    return counts


def _with_steps(row: Row) -> Row:
    if not row.steps:
        raise BadRow(f"row {row.problem_id}: no `steps`; add the chain's steps, or drop the row")
    return row


def _done(out: Path, fingerprint: str) -> set[int]:
    """Numbers of the rows that an earlier command has labelled; a half written last line is cut off."""
    if not out.exists():
        return set()
    lines = out.read_bytes().split(b"\n")
    if lines[-1]:
        out.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    found = set[int]()
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            same = record["of"] == fingerprint
            found.add(int(record["row"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"out {out}: line {number} is no labelled row; name another file") from None
        if not same:
            raise UserError(f"out {out}: holds labels of other data; name another file")
    return found


def _by_judge(config: LabelConfig) -> Labeller:
    assert config.url is not None  # load_label_config
    judge = ChatClient(
        config.url,
        config.model,
        config.cache or config.out.with_suffix(".replies.jsonl"),
        key=ChatClient.key_of(config.key_variable),
        timeout=config.timeout,
        retries=config.retries,
    )

    def label(number: int, row: Row) -> Labels:
        reply = judge.reply(messages_for(row))
        return {"labels": read_labels(reply, len(row.steps) + bool(row.answer))}

    return label


def _by_rollouts(config: LabelConfig) -> Labeller:
    training = config.training()
    policy = load_policy(training, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    policy.model.eval()
    room = policy.context - config.max_new_tokens
    builder = PromptBuilder.configured(policy.processor, training, max_length=room)

    def label(number: int, row: Row) -> Labels:
        with MediaLoader(workers=0) as loader:
            (prompt,) = builder.build([row], loader)
        if not isinstance(prompt, Prompt):
            raise prompt
        shares = rollout_shares(policy, prompt, config, number, room)
        labels = [float(share > 0) for share in shares] if config.labels == "hard" else list(shares)
        if row.answer:
            shares.append(row.text_score(f"<answer>{row.answer}</answer>"))
            labels.append(shares[-1])
        return {"labels": labels, "shares": shares}

    return label


@torch.no_grad()
def rollout_shares(
    policy: Policy, prompt: Prompt, config: LabelConfig, number: int, room: int
) -> list[float]:
    """For each step the mean text score of `rollouts` continuations from it, [0, 1] (arXiv 2312.08935).

    For questions that are right or wrong that is the share that come out right. room: tokens that prompt and
    steps may have. Draws depend on the seed, the row's number and the step alone.
    """
    row = prompt.row
    ids = policy.tokenizer(chain_text(row.steps, ""), add_special_tokens=False)["input_ids"]
    ends, count = step_ends(ids, policy.tokenizer)
    if count != len(row.steps):
        raise BadRow(f"row {row.problem_id}: its {len(row.steps)} steps are read back as {count}; mend them")
    prefixes = [ids[:end] for end in ends[:count]]
    if len(prompt.ids) + len(prefixes[-1]) > room:
        raise BadRow(
            f"row {row.problem_id}: {count} steps and the prompt have {len(prompt.ids) + len(prefixes[-1])} "
            f"tokens, the context leaves {room}; shorten the chain or lower max_new_tokens"
        )
    shares = list[float]()
    for first in range(0, count, config.prompts):
        some = range(first, min(first + config.prompts, count))
        extended = [prompt.extended(prefixes[k]) for k in some]
        places = [(number, k) for k in some]
        made = sample(
            policy.model, extended, group_size=config.rollouts, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, eos=policy.eos, suppress=policy.suppress,
            draws=draws(config.seed, places, config.rollouts, config.max_new_tokens),
        )  # fmt: skip
        for group in made.groups:
            scores = [row.text_score(_text(policy, ids)) for ids in group]
            shares.append(sum(scores) / len(scores))
    return shares


def _text(policy: Policy, ids: Sequence[int]) -> str:
    text: str = policy.tokenizer.decode(ids, skip_special_tokens=True)
    return text
