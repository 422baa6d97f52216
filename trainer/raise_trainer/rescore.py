"""`raise-core score`: rewards of completions that were sampled before, under other settings; no training."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import isnan, sqrt
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import raise_core as rc

from .chain_reward import judge_of, with_chain_reward
from .completions import Completion, read_completions
from .errors import BadRow, UserError
from .media.loader import MediaLoader
from .method import Method
from .models import Policy, load_policy
from .prompts import Prompt, PromptBuilder
from .rollout import Rollout
from .row_files import RowSource
from .rows import Row
from .scoring import Scored, score
from .train_config import TrainConfig


@dataclass(frozen=True)
class Member:
    """A completion of the file: its line (from 1) and its tokens."""

    line: int
    completion: Completion
    ids: list[int]


@dataclass(frozen=True)
class Group:
    """All completions of one row and step, which are rewarded together. row: None when it cannot be used."""

    row: Row | None
    members: list[Member]
    problem: str = ""


def score_file(
    file: Path, config: TrainConfig, *, out: Path | None = None, console: Console | None = None
) -> Path:
    """Score the completions of a file with the rows, the model and the rewards of `config`.

    file: JSON lines as `completions.Completion`; the completions of one row and step are a group, however
    many they are. Confidence is that of `config.model` itself. Text without token ids is tokenised, which may
    cut it otherwise than it was sampled.
    Returns the file written (`out`, or `FILE.scored.jsonl`): a line for each completion, by groups in their
    first order, with line, id, step, problem_type, reward_kind, text_score, confidence, reward and
    old_reward. A group whose row or medium cannot be used is named and left out, or stops with
    on_bad_media=fail. UserError for a row that is not in `data`, or is there twice, and a token the model
    does not have.
    """
    console = console or Console(highlight=False)
    out = out or file.with_suffix(".scored.jsonl")
    if out.resolve() == file.resolve():
        raise UserError(f"--out {out}: is the file of completions; name another")
    if config.bonus.get("t-grpo"):
        raise UserError(
            "bonus t-grpo: needs completions on shuffled frames, and a file has none; drop it from `bonus`"
        )
    read = list(read_completions(file))
    if not read:
        raise UserError(f"{file}: no completion in it")
    rows = find_rows(config, {c.id for _, c in read})
    policy = load_policy(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    policy.model.eval()
    groups = list(_groups(read, rows, policy))
    scorer = _Rescorer(config, policy, groups)
    lines = list[dict[str, Any]]()
    with _opened(out) as stream, Progress(console=console, transient=True) as bar:
        task = bar.add_task("score", total=len(groups))
        with MediaLoader(workers=config.workers) as loader:
            for some in batches(groups, config.prompts):
                found = scorer(some, loader)
                stream.writelines(json.dumps(line) + "\n" for line in found)
                lines += found
                bar.advance(task, len(some))
    _show(console, lines, scorer.left_out)
    console.print(f"Scores: {out}", markup=False, soft_wrap=True)
    return out


def _opened(out: Path) -> TextIO:
    try:
        return out.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None


def find_rows(config: TrainConfig, wanted: set[int | str]) -> dict[int | str, Row | BadRow]:
    """The rows of `config.data` with these problem ids, or why one cannot be used.

    UserError when one is missing, or stands there twice.
    """
    source = RowSource.open(config.data, config.sampling)
    found: dict[int | str, Row | BadRow] = {}
    for number in range(len(source)):
        file, within = source.where(number)
        try:
            raw = file.raw(within)
        except BadRow:
            continue
        row_id = raw.get("problem_id", within) if isinstance(raw, dict) else None
        if isinstance(row_id, bool) or not isinstance(row_id, (int, str)) or row_id not in wanted:
            continue
        if row_id in found:
            raise UserError(f"data: two rows have the id {row_id!r}; name the one file that was trained on")
        try:
            found[row_id] = source[number]
        except BadRow as error:
            found[row_id] = error
    missing = [row_id for row_id in wanted if row_id not in found]
    if missing:
        few = ", ".join(map(repr, sorted(missing, key=str)[:5]))
        raise UserError(
            f"data: {len(missing)} of {len(wanted)} rows of the completions are not in it, such as {few}; "
            "name the files that were trained on"
        )
    return found


def _groups(
    read: Sequence[tuple[int, Completion]], rows: dict[int | str, Row | BadRow], policy: Policy
) -> Iterator[Group]:
    """The file's completions by row and step, in the order of their first lines."""
    vocabulary = policy.model.get_input_embeddings().weight.shape[0]
    members: dict[tuple[int | str, int], list[Member]] = {}
    for line, c in read:
        ids = c.token_ids or policy.tokenizer(c.text, add_special_tokens=False)["input_ids"]
        wrong = [i for i in ids if not 0 <= i < vocabulary]
        if wrong:
            raise UserError(
                f"line {line}: token {wrong[0]} is none of the model's {vocabulary}; "
                "name the model that sampled, or give `text` alone"
            )
        members.setdefault((c.id, c.step), []).append(Member(line, c, list(ids)))
    for (row_id, _), some in members.items():
        row = rows[row_id]
        yield Group(row, some) if isinstance(row, Row) else Group(None, some, str(row))


def batches(groups: Sequence[Group], most: int) -> Iterator[list[Group]]:
    """At most `most` adjacent groups of one size: a rollout has as many completions of every prompt."""
    for _, run in groupby(groups, lambda group: len(group.members)):
        same = list(run)
        for start in range(0, len(same), most):
            yield same[start : start + most]


class _Rescorer:
    """Scores batches of groups of one size. left_out: completions that could not be scored, by reason."""

    def __init__(self, config: TrainConfig, policy: Policy, groups: Sequence[Group]) -> None:
        self.config, self.policy = config, policy
        longest = max(len(m.ids) for group in groups for m in group.members)
        context = policy.context
        self.builder = PromptBuilder.configured(policy.processor, config, max_length=context - longest)
        self.scorer = rc.Scorer(policy.model, max_tokens=config.micro_tokens)
        self.method = Method.of(config)
        self.judge = judge_of(self.method, policy.tokenizer, policy.model, dtype=config.dtype)
        self.left_out: Counter[str] = Counter()

    def __call__(self, groups: Sequence[Group], loader: MediaLoader) -> list[dict[str, Any]]:
        """Their lines."""
        made = iter(self.builder.build([g.row for g in groups if g.row is not None], loader))
        kept, prompts = list[Group](), list[Prompt]()
        for group in groups:
            found = BadRow(group.problem) if group.row is None else next(made)
            if isinstance(found, Prompt):
                kept.append(group)
                prompts.append(found)
            elif self.config.on_bad_media == "fail":
                raise found
            else:
                self.left_out[str(found)] += len(group.members)
        return self._scored(kept, prompts) if kept else []

    def _scored(self, groups: Sequence[Group], prompts: list[Prompt]) -> list[dict[str, Any]]:
        size = len(groups[0].members)
        members = [m for group in groups for m in group.members]
        unknown = [torch.zeros(len(m.ids)) for m in members]  # of the policy that sampled; rewards need none
        owner = [i // size for i in range(len(members))]
        rollout = Rollout(prompts, [m.ids for m in members], unknown, unknown, owner)
        scored = score(
            rollout, self.scorer, self.policy.tokenizer, replace(self.method, group_size=size),
            eos=self.policy.eos,
        )  # fmt: skip
        if self.judge is not None:
            scored = with_chain_reward(scored, rollout, self.judge, self.method, self.policy.tokenizer)
        return [_line(m, prompts[owner[b]].row, scored, b) for b, m in enumerate(members)]


def _line(member: Member, row: Row, scored: Scored, b: int) -> dict[str, Any]:
    c = member.completion
    return {
        "line": member.line,
        "id": c.id,
        "step": c.step,
        "problem_type": row.problem_type,
        "reward_kind": row.route,
        "text_score": float(scored.score[b]),
        "confidence": float(scored.confidence[b]),
        "reward": float(scored.reward[b]),
        "old_reward": c.reward,
    }


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's correlation, equal values sharing their mean rank.

    None for fewer than two pairs, NaN among them, or where one side is the same throughout.
    """
    if len(a) != len(b):
        raise ValueError(f"b: got {len(b)} values, wanted {len(a)}, as many as a")
    if any(map(isnan, [*a, *b])):
        return None
    x, y = _ranks(a), _ranks(b)
    middle = (len(a) - 1) / 2
    xx = sum((r - middle) ** 2 for r in x)
    yy = sum((r - middle) ** 2 for r in y)
    if not xx or not yy:
        return None
    return sum((r - middle) * (s - middle) for r, s in zip(x, y, strict=True)) / sqrt(xx * yy)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    for _, run in groupby(order, values.__getitem__):
        equal = list(run)
        for i in equal:
            ranks[i] = start + (len(equal) - 1) / 2
        start += len(equal)
    return ranks


def _show(console: Console, lines: Sequence[dict[str, Any]], left_out: "Counter[str]") -> None:
    """Means by problem type and over all, and what was left out."""
    table = Table(show_edge=False)
    for i, head in enumerate(
        (
            "problem type",
            "completions",
            "text score",
            "confidence",
            "reward",
            "old reward",
            "rank correlation",
        )
    ):
        table.add_column(head, justify="left" if i == 0 else "right")
    kinds = sorted({line["problem_type"] for line in lines})
    for name, some in [
        *((kind, [line for line in lines if line["problem_type"] == kind]) for kind in kinds),
        ("all", list(lines)),
    ]:
        table.add_row(*map(Text, [name, *_figures(some)]))
    console.print(table)
    if left_out:
        console.print(f"{sum(left_out.values())} completions are left out:", markup=False)
        for reason, count in left_out.most_common(5):
            console.print(f"  {count}: {reason}", markup=False, soft_wrap=True)
        if len(left_out) > 5:
            console.print(f"  and for {len(left_out) - 5} more reasons", markup=False)


def _figures(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Count, four means and the rank correlation of new and old rewards, over those that have an old one."""
    having = [line for line in lines if line["old_reward"] is not None]
    new, old = [line["reward"] for line in having], [line["old_reward"] for line in having]
    means = [_mean([line[key] for line in lines]) for key in ("text_score", "confidence", "reward")]
    agree = rank_correlation(new, old)
    return [str(len(lines)), *means, _mean(old), "–" if agree is None else f"{agree:+.3f}"]


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}" if values else "–"
