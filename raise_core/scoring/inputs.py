"""Arguments of the scorer, checked and regrouped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from raise_core.ops import TokenStats
from raise_core.scoring.packing import Branch, Tree
from raise_core.scoring.prompts import Prompt
from raise_core.spans import Found, Spans

Completions = Sequence[Sequence[Sequence[int]]]


def check_completions(
    prompts: Sequence[Any], completions: Any, name: str = "completions"
) -> list[list[list[int]]]:
    """By prompt, by completion, its ids as a list. Raises TypeError / ValueError for another nesting."""
    if isinstance(prompts, Mapping):
        raise TypeError("prompts: got one prompt, wanted a list of them; wrap a single one as [inputs]")
    if len(completions) != len(prompts):
        raise ValueError(
            f"{name}: got {len(completions)} groups, wanted one for each of {len(prompts)} prompts: a list "
            "of lists of token ids for each prompt"
        )
    groups = []
    for p, group in enumerate(completions):
        rows = []
        for g, ids in enumerate(group):
            if isinstance(ids, (int, str)) or (isinstance(ids, Tensor) and ids.ndim != 1):
                raise TypeError(f"{name}[{p}][{g}]: got {ids!r}, wanted a list of token ids")
            rows.append(ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids])
        groups.append(rows)
    return groups


def trees(prompts: Sequence[Prompt], branches: Sequence[Sequence[Branch]]) -> list[Tree]:
    """A tree for each prompt."""
    pairs = zip(prompts, branches, strict=True)
    return [Tree(i, len(prompt), own) for i, (prompt, own) in enumerate(pairs)]


def whole(groups: Sequence[Sequence[Sequence[int]]]) -> list[list[Branch]]:
    """Every token of every completion."""
    return [[Branch(ids, 0, len(ids)) for ids in group] for group in groups]


def split_stats(stats: TokenStats, lengths: Sequence[int]) -> list[TokenStats]:
    """Packed statistics [T] by completion."""
    split: dict[str, Sequence[Tensor | None]] = {}
    for field in fields(stats):
        values = getattr(stats, field.name)
        split[field.name] = [None] * len(lengths) if values is None else values.split(list(lengths))
    return [TokenStats(**{k: v[i] for k, v in split.items()}) for i in range(len(lengths))]


def skipped(
    found: Sequence[Found], score: Tensor, score_wrong: bool | str, needed_by: Sequence[str]
) -> list[bool]:
    """Which answers need not be scored."""
    if score_wrong not in (True, False, "auto"):
        raise ValueError(f'score_wrong: got {score_wrong!r}, wanted True, False or "auto"')
    if isinstance(needed_by, str):
        raise TypeError(f"needed_by: got the text {needed_by!r}, wanted a list of names")
    keep = bool(needed_by) if score_wrong == "auto" else bool(score_wrong)
    return [not keep and value == 0 and len(f) > 0 for f, value in zip(found, score.tolist(), strict=True)]


def packed_spans(
    ids: Sequence[Sequence[int]], bounds: Sequence[tuple[int, int]], group: Sequence[int]
) -> Spans:
    """Spans whose rows are exactly their own tokens, in order."""
    targets = [i for row, (start, stop) in zip(ids, bounds, strict=True) for i in row[start:stop]]
    lengths = torch.tensor([0, *(stop - start for start, stop in bounds)])
    return Spans(
        torch.arange(len(targets)),
        torch.tensor(targets, dtype=torch.long),
        lengths.cumsum(0),
        torch.tensor(list(group), dtype=torch.long),
        torch.arange(len(ids)),
    )
