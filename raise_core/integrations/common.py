"""What the adapters share: grading rows, and the way from per-token log-probabilities to rewards.

Bad rows are refused by their number; a row without a solution has no reward (None), as in TRL.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from raise_core.ops import Rewards, confidence_rewards
from raise_core.pieces import TokenizerLike
from raise_core.spans import Found, build_spans, find_answer_spans
from raise_core.verify import canonical_kind, verify

STRICT_KINDS = ("multiple_choice", "numerical")
"""Kinds whose answers SCRE rewards; those of the other kinds IGSR does."""


@dataclass(frozen=True)
class Graded:
    """Text scores of B rows: score [B] in [0, 1], strict [B] bool; usable: False where there is no solution.

    A row without a solution has score 0 and must not be rewarded.
    """

    score: Tensor
    strict: Tensor
    usable: list[bool]


def column(columns: Mapping[str, Any], name: str, rows: int, purpose: str) -> list[Any]:
    """The column `name` of a reward function's keyword arguments, one value for each of `rows` rows."""
    if name not in columns:
        raise ValueError(
            f"column {name!r} ({purpose}) is missing, got {sorted(columns) or 'none'}; rename the data set's "
            "column, or tell the reward which one it is"
        )
    values = list(columns[name])
    if len(values) != rows:
        raise ValueError(f"column {name!r}: got {len(values)} values, wanted one for each of {rows} rows")
    return values


def grade(
    texts: Sequence[str],
    solutions: Sequence[str | Sequence[str] | None],
    kinds: str | Sequence[str | None],
    *,
    strict_kinds: Collection[str] = STRICT_KINDS,
) -> Graded:
    """`verify` of B decoded completions; kinds: one for all, or one for each row (see `rc.verify`).

    A row whose solution is None is not usable. Raises ValueError / TypeError naming the row for an unknown or
    missing kind and for a solution that is no text.
    """
    every = [kinds] * len(texts) if isinstance(kinds, str) else list(kinds)
    for name, values in (("solutions", solutions), ("kinds", every)):
        if len(values) != len(texts):
            raise ValueError(f"{name}: got {len(values)}, wanted one for each of {len(texts)} completions")
    wanted = {canonical_kind(kind) for kind in strict_kinds}
    score, strict = list[float](), list[bool]()
    for b, (text, solution, kind) in enumerate(zip(texts, solutions, every, strict=True)):
        try:
            strict.append(solution is not None and canonical_kind(kind or "None") in wanted)
            score.append(0.0 if solution is None else verify(kind or "None", text, solution))
        except (TypeError, ValueError) as error:
            raise type(error)(f"row {b}: {error}") from None
    usable = [solution is not None for solution in solutions]
    return Graded(torch.tensor(score), torch.tensor(strict, dtype=torch.bool), usable)


def check_temperature(temperature: float, any_temperature: bool = False) -> None:
    """Refuse log-probabilities of scaled logits: those at temperature 1 cannot be had from them."""
    if temperature != 1 and not any_temperature:
        raise ValueError(
            f"temperature: got log-probabilities of logits / {temperature:g}, wanted those at temperature 1, "
            "which cannot be computed from them; sample at temperature 1, score with a reference model "
            "(rc.Scorer), or take the distorted confidence with any_temperature=True"
        )


def number_groups(keys: Sequence[Hashable] | Tensor) -> Tensor:
    """Integers [B] by first appearance for any keys, such as verl's uid."""
    values = keys.tolist() if isinstance(keys, Tensor) else list(keys)
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(key, len(known)) for key in values], dtype=torch.long)


def check_groups(group: Tensor, group_size: int) -> None:
    """ValueError unless every id in group [B] occurs `group_size` times."""
    counts = torch.bincount(group.cpu())
    wrong = ((counts != group_size) & (counts > 0)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"group {wrong[0]}: got {int(counts[wrong[0]])} completions, wanted group_size {group_size}; a "
            "group is split over processes or calls, and its rewards need all of it: gather the rows first, "
            "or let every process hold whole groups"
        )


def answer_logps(
    logps: Tensor | Sequence[Tensor | Sequence[float]],
    completion_ids: Sequence[Sequence[int]],
    found: Sequence[Found],
) -> list[Tensor]:
    """The log-probabilities [n] (fp32, CPU) of each answer's tokens.

    logps: [B, C], the token j of completion b in column j, padded behind; or B rows of the completions'
    lengths. Raises ValueError, naming the row, for rows that are too short and for an answer whose
    log-probabilities are not finite.
    """
    if len(logps) != len(completion_ids):
        raise ValueError(
            f"logps: got {len(logps)} rows, wanted one for each of {len(completion_ids)} completions"
        )
    if isinstance(logps, Tensor):
        logps = logps.detach().cpu()  # once, not for each row
    picked = list[Tensor]()
    for b, (ids, span) in enumerate(zip(completion_ids, found, strict=True)):
        given = logps[b]
        if len(given) < len(ids) or (len(given) > len(ids) and not isinstance(logps, Tensor)):
            raise ValueError(
                f"logps[{b}]: got {len(given)} log-probabilities, wanted {len(ids)}, one for each token of "
                "the completion; cut off those of the prompt"
            )
        row = torch.as_tensor(given[span.start : span.stop], dtype=torch.float32).detach().cpu()
        if not bool(row.isfinite().all()):
            raise ValueError(f"logps[{b}]: got {row.tolist()} inside the answer, wanted finite numbers")
        picked.append(row)
    return picked


def rewards_of_answers(
    logps: Sequence[Tensor], score: Tensor, strict: Tensor, group: Tensor, **options: Any
) -> Rewards:
    """`confidence_rewards` of S answers whose log-probabilities are known, one tensor each."""
    lengths = [len(row) for row in logps]
    ids = [[0] * n for n in lengths]
    found = [Found(0, n, "") for n in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    spans = build_spans(found, ids, starts, group.cpu())
    flat = torch.cat([*logps, torch.zeros(0)])
    return confidence_rewards(spans, score.float().cpu(), strict.cpu(), logp=flat, **options)


def rewards_from_logps(
    logps: Tensor | Sequence[Tensor | Sequence[float]],
    completion_ids: Sequence[Sequence[int]],
    tokenizer: TokenizerLike,
    score: Tensor,
    strict: Tensor,
    group: Sequence[Hashable] | Tensor,
    *,
    temperature: float = 1.0,
    any_temperature: bool = False,
    group_size: int | None = None,
    found: Sequence[Found] | None = None,
    **options: Any,
) -> Rewards:
    """SCRE and IGSR rewards [B], on the CPU, from a trainer's own per-token log-probabilities [nats].

    logps: as in `answer_logps`. completion_ids: B lists of sampled ids, unpadded. score [B] in [0, 1] and
    strict [B]: as in `rc.confidence_rewards`, whose options these are. group: B prompt ids of any kind, in
    any order. temperature: what the logits were divided by. group_size: refuse groups that are not whole.
    found: the answers, where they are known. Raises ValueError, naming the row or group.
    """
    check_temperature(temperature, any_temperature)
    numbered = number_groups(group)
    if group_size is not None:
        check_groups(numbered, group_size)
    spans = list(find_answer_spans(completion_ids, tokenizer) if found is None else found)
    return rewards_of_answers(answer_logps(logps, completion_ids, spans), score, strict, numbered, **options)


def rewards_over_processes(
    logps: Sequence[Tensor],
    score: Tensor,
    strict: Tensor,
    group: Sequence[Hashable],
    *,
    group_size: int | None = None,
    process_group: Any = None,
    **options: Any,
) -> Rewards:
    """Rewards [S] of this process's answers, whose groups may lie on several processes.

    Every process of `process_group` must call it; group keys must be the same on all of them. parts are
    left empty. Without torch.distributed it is `rewards_of_answers`. ValueError where a group is not whole
    even so.
    """
    own = list(zip([row.tolist() for row in logps], score.tolist(), strict.tolist(), group, strict=True))
    rows, first = own, 0
    if distributed.is_available() and distributed.is_initialized():
        every: list[Any] = [None] * distributed.get_world_size(process_group)
        distributed.all_gather_object(every, own, group=process_group)
        first = sum(len(part) for part in every[: distributed.get_rank(process_group)])
        rows = [row for part in every for row in part]
    numbered = number_groups([row[3] for row in rows])
    if group_size is not None:
        check_groups(numbered, group_size)
    made = rewards_of_answers(
        [torch.tensor(row[0], dtype=torch.float32) for row in rows],
        torch.tensor([row[1] for row in rows]),
        torch.tensor([row[2] for row in rows], dtype=torch.bool),
        numbered,
        **options,
    )
    mine = slice(first, first + len(own))
    return Rewards(made.reward[mine], made.confidence[mine], {})


def mixed(score: Tensor, reward: Tensor, share: float) -> Tensor:
    """score * (1 - share) + reward * share, [B]; exactly the one or the other at 0 and 1."""
    if not 0 <= share <= 1:
        raise ValueError(f"confidence_share: got {share}, wanted a number from 0 to 1")
    if share in (0, 1):
        return reward if share else score
    return score.to(reward) * (1 - share) + reward * share
