"""The reference answer, or all options, in place of the model's own answer, after its own reasoning.

What is kept are the tokens that were sampled, up to and including the open tag; the other answer is
tokenised with the text on both its sides, as the model would write it, and nothing that was sampled is
tokenised again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raise_core.pieces import Layout, TokenizerLike, lay_out
from raise_core.tags import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    Reason,
    check_tags,
    last_pair,
    strip_bounds,
    why_no_pair,
)

if TYPE_CHECKING:
    from raise_core.ops import TokenStats
    from raise_core.scoring.backbone import VisionFeatures
    from raise_core.scoring.scorer import Scorer


@dataclass(frozen=True)
class Splice:
    """An answer after a completion's reasoning: the tokens `answer` follow the prompt and `before`.

    reason: None where the completion's own open tag is kept; "missing" or "truncated" where it has none, so
    that the tag was written behind all of it (behind a part of one that was cut off).
    """

    before: list[int]
    answer: list[int]
    reason: Reason | None = None


def splice_gold(
    completion_ids: Sequence[Sequence[int]],
    gold: Sequence[str],
    tokenizer: Any,
    *,
    open: str = ANSWER_OPEN,
    close: str = ANSWER_CLOSE,
    closed: bool = False,
) -> list[Splice]:
    """The answer gold[b] in place of completion b's own, B of them.

    completion_ids: B lists of sampled ids without the prompt; one of no ids gives the answer right after the
    prompt (RLPR's baseline). gold: B texts, stripped here. tokenizer: a Hugging Face tokenizer. closed: the
    answer's tokens go on through the close tag, without which "4" is a part of "42". The place is inside the
    last complete pair of tags, else behind the last open tag. A token at the border that also wrote a part of
    a tag (">B") belongs to the answer, as in `find_answer_spans`; where the sampled one did, the kept tokens
    end before it. Tokens without text (end of sequence) at the end are dropped. Raises ValueError for a gold
    answer that is empty or holds a tag, naming its index.
    """
    check_tags(open, close)
    if len(gold) != len(completion_ids):
        raise ValueError(
            f"gold: got {len(gold)} texts, wanted one for each of {len(completion_ids)} completions"
        )
    spliced = list[Splice]()
    for b, (ids, text) in enumerate(zip(completion_ids, gold, strict=True)):
        answer = text.strip() if isinstance(text, str) else ""
        if not answer or open in answer or close in answer:
            raise ValueError(f"gold[{b}]: got {text!r}, wanted the answer's text without tags; drop the row")
        spliced.append(_splice([int(i) for i in ids], answer, tokenizer, open, close, closed))
    return spliced


def _splice(ids: list[int], answer: str, tokenizer: Any, open: str, close: str, closed: bool) -> Splice:
    layout = lay_out(ids, tokenizer, keep=(open, close))
    place, reason = _place(layout.text, open, close)
    at = len(layout.text[:place].encode("utf-8", "surrogateescape"))
    kept = bisect_right(layout.ends, at)
    while kept and layout.starts[kept - 1] == layout.ends[kept - 1]:
        kept -= 1
    covered = layout.ends[kept - 1] if kept else 0
    rest = layout.text.encode("utf-8", "surrogateescape")[covered:at].decode("utf-8", "replace")
    written = rest + open if reason else rest
    glue, own = _answer_ids(written or open, answer, tokenizer, open, close, closed)
    if written:
        return Splice(ids[:kept] + glue, own, reason)
    if lay_out(glue, tokenizer, keep=(open, close)).text.endswith(open):
        return Splice(ids[:kept], own)
    # A token would hold the end of the tag and the answer's beginning, but the tag was sampled by itself.
    return Splice(ids[:kept], _answer_ids("", answer, tokenizer, open, close, closed)[1])


def _place(text: str, open: str, close: str) -> tuple[int, Reason | None]:
    """Character at which the other answer begins; a reason where the open tag is to be written there."""
    pair = last_pair(text, open, close)
    if pair is not None:
        return pair[0], None
    if open in text:
        return text.rfind(open) + len(open), None
    cut = max((n for n in range(len(open)) if text.endswith(open[:n])), default=0)
    return len(text) - cut, why_no_pair(text, open, close)


def _answer_ids(
    before: str, answer: str, tokenizer: Any, open: str, close: str, closed: bool
) -> tuple[list[int], list[int]]:
    """Tokens of `before + answer + close` before the answer, and those that overlap it (or it and close)."""
    ids, layout, first = _tokens(before + answer + close, tokenizer, (open, close))
    # Some tokenizers normalise the text, so that the answer is found again by what surrounds it.
    start = max(layout.text.find(before), 0) + len(before)
    start, stop = strip_bounds(layout.text, start, layout.text.rfind(close))
    answer_first, answer_stop = layout.tokens(start, stop)
    return ids[first:answer_first], ids[answer_first : None if closed else answer_stop]


def _tokens(text: str, tokenizer: Any, tags: tuple[str, str]) -> tuple[list[int], Layout, int]:
    """Tokens of a text in the middle of a line, their layout, and the first of them that belongs to it."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    layout = lay_out(ids, tokenizer, keep=tags)
    if not layout.text.startswith(" ") or text.startswith(" "):
        return ids, layout, 0
    # The tokenizer begins every text with a space, but not its second line.
    lower = list(tokenizer("\n" + text, add_special_tokens=False)["input_ids"])
    below = lay_out(lower, tokenizer, keep=tags)
    at = len(below.text[: below.text.find("\n") + 1].encode("utf-8", "surrogateescape"))
    first = bisect_right(below.ends, at)
    if at == 0 or first == len(lower) or below.starts[first] != at:
        return ids, layout, 0
    return lower, below, first


def spliced_stats(
    scorer: Scorer,
    prompts: Sequence[Mapping[str, Any]],
    spliced: Sequence[Sequence[Splice]],
    *,
    want: Sequence[str] = ("logp",),
    temperature: float = 1.0,
    features: Sequence[VisionFeatures | None] | None = None,
) -> list[list[TokenStats]]:
    """Statistics of the answers' tokens, for each prompt and each of its splices.

    Texts that come before several answers, and the prompt, are run once: packed branches,
    `Scorer.candidates`.
    """
    texts = [_unique(s.before for s in group) for group in spliced]
    answers = [_unique(s.answer for s in group) for group in spliced]
    stats = scorer.candidates(
        prompts,
        [[list(ids) for ids in group] for group in answers],
        after=[[list(ids) for ids in group] for group in texts],
        want=want,
        temperature=temperature,
        features=features,
    )
    return [
        [stats[p][texts[p][tuple(s.before)]][answers[p][tuple(s.answer)]] for s in group]
        for p, group in enumerate(spliced)
    ]


def _unique(rows: Any) -> dict[tuple[int, ...], int]:
    """Number of each different row, in order."""
    return {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, rows)))}


@torch.no_grad()
def option_confidence(
    scorer: Scorer,
    prompts: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[Sequence[int]]],
    options: Sequence[Sequence[str]],
    tokenizer: TokenizerLike,
    *,
    reduce: str = "sum",
    open: str = ANSWER_OPEN,
    close: str = ANSWER_CLOSE,
    features: Sequence[VisionFeatures | None] | None = None,
) -> list[Tensor]:
    """Probability of each option after each completion's reasoning, normalised over the options.

        p_k = exp(s_k) / sum_j exp(s_j)          s_k: sum (or mean) of the log-probabilities of the
                                                 option and the close tag [nats]

    options: for each prompt the texts of its K options, two or more, as the model writes them inside the
    tags. Without the close tag an option that another one begins with would always be the likelier.
    completions: for each prompt G lists of ids. Returns [G, K] fp32 for each prompt, on the CPU; a row in
    which all options are impossible is 0, one with a NaN is NaN. reduce: "sum", or "mean" for options of
    unlike lengths. Raises ValueError for fewer than two options, naming the prompt.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce: got {reduce!r}, wanted 'sum' or 'mean'")
    if len(options) != len(completions):
        raise ValueError(f"options: got {len(options)}, wanted those of each of {len(completions)} prompts")
    groups = list[list[Splice]]()
    for p, (texts, group) in enumerate(zip(options, completions, strict=True)):
        if len(texts) < 2:
            raise ValueError(
                f"options[{p}]: got {len(texts)}, wanted two or more; one alone is always certain"
            )
        groups.append(
            [
                s
                for ids in group
                for s in splice_gold(
                    [ids] * len(texts), texts, tokenizer, open=open, close=close, closed=True
                )
            ]
        )
    stats = spliced_stats(scorer, prompts, groups, features=features)
    found = list[Tensor]()
    for own, texts in zip(stats, options, strict=True):
        logp = [s.logp.double().cpu() for s in own if s.logp is not None]
        values = torch.tensor([float(x.sum() if reduce == "sum" else x.mean()) for x in logp]).view(
            -1, len(texts)
        )
        share = torch.softmax(values, 1)
        found.append(torch.where((values == -torch.inf).all(1, keepdim=True), 0.0, share))
    return found
