"""From sampled token ids to the spans that rewards are taken over, exact to the token.

The answer span is the sampled tokens whose characters overlap the stripped text inside the last complete
`<answer>…</answer>`. It is found from the ids that were really sampled, through the characters each of them
wrote: nothing is tokenised again and no tag tokens are counted, so merges across a tag border (">B", "</")
and characters split over tokens do no harm. Shapes: B completions, S spans, T scored tokens (all spans,
packed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from raise_core.pieces import Layout, TokenizerLike, lay_out
from raise_core.tags import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    Reason,
    all_pairs,
    check_tags,
    last_pair,
    strip_bounds,
    why_no_pair,
)

STEP_OPEN = "<|reasoning_step_start|>"
STEP_CLOSE = "<|reasoning_step_end|>"


@dataclass(frozen=True, slots=True)
class Found:
    """A piece of one completion, or why there is none.

    start, stop: token indices into the completion, half open; both 0 when there is a reason.
    text: the stripped text inside the tags, `""` when there is a reason. A token at a border may have written
        more than this (">B" holds the end of the open tag).
    reason: None when found; "missing" (never opened), "unclosed" (opened, never closed), "truncated" (the
        text stops inside a tag), "empty" (white space only). Every reward of such a span is 0.
    """

    start: int
    stop: int
    text: str = ""
    reason: Reason | None = None

    def __len__(self) -> int:
        return self.stop - self.start


def find_answer_spans(
    completion_ids: Sequence[Sequence[int]],
    tokenizer: TokenizerLike,
    *,
    open: str = ANSWER_OPEN,
    close: str = ANSWER_CLOSE,
) -> list[Found]:
    """The answer span of each completion: the last complete `open…close` pair (table in raise_core/tags.py).

    completion_ids: B lists of sampled token ids, without the prompt; end-of-text and padding may be in them.
    tokenizer: a Hugging Face tokenizer, fast or slow, or a `tokenizers.Tokenizer`. Special tokens write no
        text, except one that is itself a tag. Decoders that put spaces between tokens (WordPiece) do not
        break a tag.
    Returns B `Found`, in time linear in the tokens. Raises TypeError / ValueError for ids or tags of a wrong
    form, or a processor where its tokenizer is wanted.
    """
    check_tags(open, close)
    found: list[Found] = []
    for ids in _rows(completion_ids):
        layout = lay_out(ids, tokenizer, keep=(open, close))
        pair = last_pair(layout.text, open, close)
        if pair is None:
            found.append(Found(0, 0, reason=why_no_pair(layout.text, open, close)))
        else:
            found.append(_inside(layout, *pair))
    return found


def find_step_spans(
    completion_ids: Sequence[Sequence[int]],
    tokenizer: TokenizerLike,
    *,
    open: str = STEP_OPEN,
    close: str = STEP_CLOSE,
) -> list[list[Found]]:
    """Every complete `open…close` pair of each completion, in order; arguments as `find_answer_spans`.

    Returns B lists; a completion without a complete pair has an empty list, a pair around white space a
    `Found` with reason "empty". The default tags are those of Chain-of-Step (arXiv 2509.19003).
    """
    check_tags(open, close)
    found: list[list[Found]] = []
    for ids in _rows(completion_ids):
        layout = lay_out(ids, tokenizer, keep=(open, close))
        found.append([_inside(layout, *pair) for pair in all_pairs(layout.text, open, close)])
    return found


def _inside(layout: Layout, start: int, stop: int) -> Found:
    start, stop = strip_bounds(layout.text, start, stop)
    if start == stop:
        return Found(0, 0, reason="empty")
    return Found(*layout.tokens(start, stop), text=layout.shown(start, stop))


def _rows(completion_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    rows: list[list[int]] = []
    for b, row in enumerate(completion_ids):
        ids = row.tolist() if isinstance(row, Tensor) else row
        if isinstance(ids, (int, str)):
            raise TypeError(
                f"completion_ids[{b}]: got {type(ids).__name__}, wanted a list of token ids per completion; "
                "wrap a single completion as [ids]"
            )
        rows.append([int(i) for i in ids])
    return rows


@dataclass(frozen=True, eq=False)
class Spans:
    """S spans over T scored tokens, packed; int64 tensors, validated when built on the host.

    rows [T]: row of the flattened logits (or hidden states) that predicts the token.
    targets [T]: the sampled token id.
    offsets [S+1]: span s is `rows[offsets[s]:offsets[s+1]]`; it may be empty.
    group [S]: prompt of the span. owner [S]: completion of the span.
    Raises TypeError / ValueError naming the field, what came and what was wanted.
    """

    rows: Tensor
    targets: Tensor
    offsets: Tensor
    group: Tensor
    owner: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_index(field.name, getattr(self, field.name))
        offsets = self.offsets
        if len(offsets) == 0 or int(offsets[0]) != 0 or bool((offsets[1:] < offsets[:-1]).any()):
            raise ValueError(
                f"offsets: got {_head(offsets)}, wanted [S+1] bounds that start at 0 and never fall; "
                "for lengths n use cat([0, cumsum(n)])"
            )
        tokens, spans = int(offsets[-1]), len(offsets) - 1
        wanted = {"rows": tokens, "targets": tokens, "group": spans, "owner": spans}
        for name, length in wanted.items():
            got = len(getattr(self, name))
            if got != length:
                raise ValueError(
                    f"{name}: got {got} entries, wanted {length} because offsets has {spans} spans over "
                    f"{tokens} tokens"
                )
        for name in wanted:
            values = getattr(self, name)
            if bool((values < 0).any()):
                at = int((values < 0).nonzero()[0])
                raise ValueError(
                    f"{name}[{at}]: got {int(values[at])}, wanted 0 or more; leave an ignored token (-100) "
                    "out of the span"
                )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens per span, [S] int64."""
        return self.offsets[1:] - self.offsets[:-1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Spans:
        """The same spans on `device`; they are not validated again, so nothing waits for the device."""
        moved = object.__new__(Spans)
        for field in fields(self):
            value = getattr(self, field.name).to(device, non_blocking=non_blocking)
            object.__setattr__(moved, field.name, value)
        return moved


def _check_index(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an int64 tensor; use torch.tensor(...)")
    if value.dtype != torch.int64 or value.ndim != 1:
        raise TypeError(
            f"{name}: got {value.dtype} of shape {list(value.shape)}, wanted int64 of one dimension"
        )
    if value.device.type != "cpu":
        raise ValueError(
            f"{name}: got a tensor on {value.device}, wanted the CPU; build there, then use .to(device)"
        )


def _head(values: Tensor) -> str:
    shown = values[:8].tolist()
    return f"{shown}" if len(values) <= 8 else f"{shown[:-1]}… ({len(values)} entries)"


def build_spans(
    found: Sequence[Found] | Sequence[Sequence[Found]],
    completion_ids: Sequence[Sequence[int]],
    first_rows: Sequence[int] | Tensor,
    group: Sequence[int] | Tensor,
) -> Spans:
    """Pack what was found in B completions into `Spans`.

    found: B `Found` (answers: S = B, so spans and completions line up, empty ones included) or B lists
        (steps).
    completion_ids: the B lists of ids that were searched.
    first_rows [B]: row of the flattened logits that predicts completion b's first token, so token j of
        completion b is predicted by row `first_rows[b] + j`.
    group [B]: prompt index of each completion.
    Raises ValueError if the lengths disagree or a span leaves its completion.
    """
    ids = _rows(completion_ids)
    first, prompts = _numbers("first_rows", first_rows), _numbers("group", group)
    for name, length in (("found", len(found)), ("first_rows", len(first)), ("group", len(prompts))):
        if length != len(ids):
            raise ValueError(
                f"{name}: got {length} entries, wanted one for each of {len(ids)} completion_ids"
            )
    rows, targets, offsets, owner = list[int](), list[int](), [0], list[int]()
    for b, item in enumerate(found):
        spans = [item] if isinstance(item, Found) else cast("Sequence[Found]", item)
        for span in spans:
            if not 0 <= span.start <= span.stop <= len(ids[b]):
                raise ValueError(
                    f"found[{b}]: got tokens {span.start}..{span.stop}, wanted them inside the completion's "
                    f"{len(ids[b])} tokens; pass the ids that were searched"
                )
            rows.extend(range(first[b] + span.start, first[b] + span.stop))
            targets.extend(ids[b][span.start : span.stop])
            offsets.append(len(rows))
            owner.append(b)
    packed = (rows, targets, offsets, [prompts[b] for b in owner], owner)
    return Spans(*(torch.tensor(values, dtype=torch.int64) for values in packed))


def _numbers(name: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        if values.ndim != 1 or values.dtype.is_floating_point:
            raise TypeError(f"{name}: got {values.dtype} of shape {list(values.shape)}, wanted [B] integers")
        return [int(value) for value in values.tolist()]
    return [int(value) for value in values]
