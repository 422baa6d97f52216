"""Gold answers and options after the model's own reasoning: which tokens are kept, and what they score."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import raise_core as rc
from raise_core.family.splice import splice_gold
from raise_core.pieces import lay_out
from tests.budget import (
    assert_at_most,
    assert_equal_but_for_roundings,
    assert_within_error_budget,
    close_to,
    sum_slack,
)
from tests.small_tokenizers import EOS, byte_level, unigram, vocabulary
from tests.tiny_models import text_model, text_prompt


def fast(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def spliced(tokenizer: Any, text: str, gold: str) -> rc.Splice:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (found,) = rc.splice_gold([[*ids, tokenizer.eos_token_id]], [gold], tokenizer)
    return found


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


CASES = [
    # completion, gold, kept text (the answer's tokens may reach back into it), reason
    ("<think>x</think><answer>B</answer>", "A", "<think>x</think><answer>", None),
    ("<think>x</think><answer>\nblue ball\n</answer> bye", "B", "<think>x</think><answer>", None),
    ("<answer>A</answer> no <answer>B</answer>", "a", "<answer>A</answer> no <answer>", None),
    ("<think>x</think><answer>blue b", "B", "<think>x</think><answer>", None),  # unclosed
    ("<think>x</think><answer>B</ans", "A", "<think>x</think><answer>", None),
    ("<answer> </answer>", "B", "<answer>", None),
    ("<think>you see", "B", "<think>you see<answer>", "missing"),
    ("<think>you see<ans", "B", "<think>you see<answer>", "truncated"),
    ("", "蓝色", "<answer>", "missing"),
    ("<answer>B</answer>", "👍🏽 3.50", "<answer>", None),
]


@pytest.mark.parametrize("kind", [byte_level, unigram], ids=["byte_level", "unigram"])
@pytest.mark.parametrize("text, gold, kept, reason", CASES)
def test_what_is_kept_and_what_is_scored(kind: Any, text: str, gold: str, kept: str, reason: Any) -> None:
    tokenizer = fast(kind())
    got = spliced(tokenizer, text, gold)
    assert got.reason == reason
    whole = decoded(tokenizer, [*got.before, *got.answer])
    assert whole.lstrip().startswith(kept + gold), whole
    assert kept.startswith(decoded(tokenizer, got.before).lstrip())
    assert gold in decoded(tokenizer, got.answer)
    # The answer's span in the whole, found as for any completion, is what is scored.
    closed = tokenizer("</answer>", add_special_tokens=False)["input_ids"]
    (own,) = rc.find_answer_spans([[*got.before, *got.answer, *closed]], tokenizer)
    ends_inside = decoded(tokenizer, got.answer) != gold and not decoded(tokenizer, got.answer).endswith(gold)
    if not ends_inside:  # else the last token holds a part of the close tag
        assert own.text == gold and own.start == len(got.before) and own.stop <= len(got.before + got.answer)


@pytest.mark.parametrize("kind", [byte_level, unigram], ids=["byte_level", "unigram"])
@pytest.mark.parametrize("text", ["<think>the blue ball</think><answer>B</answer>", "<answer>蓝色</answer>"])
def test_the_models_own_answer_spliced_in_is_its_own_span(kind: Any, text: str) -> None:
    tokenizer = fast(kind())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (own,) = rc.find_answer_spans([ids], tokenizer)
    (got,) = rc.splice_gold([ids], [own.text], tokenizer)
    assert got.answer == ids[own.start : own.stop] and got.before == ids[: own.start]


PIECES = ["<answer>", "</answer>", "<ans", "wer>", "<", "answer>", "B", " blue", "\n", " ", "蓝", "👍🏽", "é"]


@given(
    chunks=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), max_size=5),
    gold=st.sampled_from(["A", "blue ball", "蓝色", "3.50", "👍🏽"]),
    kind=st.sampled_from([byte_level, unigram]),
)
def test_any_text_cut_anyhow_keeps_what_was_sampled(chunks: list[list[str]], gold: str, kind: Any) -> None:
    """Chunks are tokenised apart, so that tags are cut in ways the tokenizer itself would not."""
    tokenizer = fast(kind())
    ids = [i for c in chunks for i in tokenizer("".join(c), add_special_tokens=False)["input_ids"]]
    (got,) = rc.splice_gold([ids], [gold], tokenizer)
    tags = ("<answer>", "</answer>")
    sampled, whole = lay_out(ids, tokenizer, keep=tags).text, lay_out(got.before + got.answer, tokenizer).text
    written = whole[: whole.rindex(gold)]
    assert written.rstrip().endswith("<answer>") and whole[whole.rindex(gold) :].startswith(gold)
    kept = written.rstrip() if got.reason is None else written.rstrip().removesuffix("<answer>")
    assert sampled.startswith(kept) or sampled.startswith(kept.rstrip())
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, got.before, strict=False)))
    retold = lay_out(got.before[same:], tokenizer, keep=tags).text.strip()
    assert len(retold) <= len("<answer>")  # beyond the sampled ids no more than the tag is written
    closing = tokenizer("</answer>", add_special_tokens=False)["input_ids"]
    (own,) = rc.find_answer_spans([[*got.before, *got.answer, *closing]], tokenizer)
    if whole.endswith(gold):  # else the last token holds a part of the close tag
        assert own.text == gold and (own.start, own.stop) == (len(got.before), len(got.before + got.answer))


class Spelled:
    """A tokenizer of whole strings that takes the longest first."""

    def __init__(self, *tokens: str) -> None:
        self.tokens, self.backend_tokenizer = tokens, vocabulary(*tokens)
        self.all_special_ids = [len(tokens)]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = []
        while text:
            token = max((t for t in self.tokens if text.startswith(t)), key=len)
            ids.append(self.tokens.index(token))
            text = text[len(token) :]
        return {"input_ids": ids}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self.tokens[i] for i in ids if i < len(self.tokens))


def test_a_token_that_holds_the_end_of_the_tag_and_the_answer() -> None:
    tokenizer = Spelled("<answer", ">", ">B", ">A", "A", "B", "C", "</answer>")
    joined = [0, 2, 7]  # <answer >B </answer>
    (got,) = splice_gold([joined], ["A"], tokenizer)
    assert (got.before, got.answer) == ([0], [3])  # written as the model would: ">A" is one token
    (other,) = splice_gold([joined], ["C"], tokenizer)
    assert (other.before, other.answer) == ([0, 1], [6])  # the sampled ">B" is cut before, ">" is written
    (apart,) = splice_gold([[0, 1, 5, 7]], ["A"], tokenizer)
    assert (apart.before, apart.answer) == ([0, 1], [4])  # a sampled border is kept as it is


def test_a_closed_answer_goes_on_through_the_tag() -> None:
    tokenizer = Spelled("<answer", ">", ">A", "A", "A<", "</answer>", "/answer>")
    (open_end,) = splice_gold([[0, 1]], ["A"], tokenizer)
    (closed,) = splice_gold([[0, 1]], ["A"], tokenizer, closed=True)
    assert (closed.before, closed.answer) == ([0, 1], [4, 6]) and open_end.answer == [4]


def test_wrong_gold_is_refused_by_its_index() -> None:
    tokenizer = fast(byte_level())
    for gold in ("", "  ", "<answer>B", None):
        with pytest.raises(ValueError, match=r"gold\[1\]: got .* wanted the answer's text without tags"):
            rc.splice_gold([[1], [2]], ["B", gold], tokenizer)
    with pytest.raises(ValueError, match="gold: got 1 texts, wanted one for each of 2 completions"):
        rc.splice_gold([[1], [2]], ["B"], tokenizer)


TEXTS = ["<think>the blue ball</think><answer>B</answer>", "<think>you see", "<answer>A</answer> so"]


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model("Llama", vocab_size=400).double()


def alone(model: Any, prompt: Any, before: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """log p of an answer's tokens from the logits of one pass, in fp64."""
    ids = torch.cat([prompt["input_ids"], torch.tensor([[*before, *answer]], dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
    start = ids.shape[1] - len(answer) - 1
    return logits[torch.arange(start, start + len(answer)), torch.tensor(list(answer))]


def test_spliced_statistics_are_those_of_separate_passes(model: Any) -> None:
    tokenizer, prompts = fast(byte_level()), [text_prompt(11), text_prompt(6, 2)]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    groups = [
        rc.splice_gold([*ids, []], ["blue ball"] * 4, tokenizer),
        rc.splice_gold(ids, ["B"] * 3, tokenizer),
    ]
    stats = rc.spliced_stats(rc.Scorer(model), prompts, groups)
    assert [len(group) for group in stats] == [4, 3]
    for prompt, own, some in zip(prompts, stats, groups, strict=True):
        for got, one in zip(own, some, strict=True):
            assert got.logp is not None and got.logp.shape == (len(one.answer),)
            want = alone(model, prompt, one.before, one.answer)
            assert_equal_but_for_roundings(got.logp.detach(), want, name="spliced")


def test_confidence_over_the_options(model: Any) -> None:
    tokenizer, prompts = fast(byte_level()), [text_prompt(11), text_prompt(6, 2)]
    ids = [[tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]] * 2
    options = [["A", "B", "A, so you see"], ["A", "B"]]
    found = rc.option_confidence(rc.Scorer(model), prompts, ids, options, tokenizer)
    assert [tuple(x.shape) for x in found] == [(3, 3), (3, 2)]
    for x in found:
        assert x.dtype == torch.float32
        assert_at_most((x.sum(1) - 1).abs(), sum_slack(x.shape[1]), name="sum")
    closed = rc.splice_gold([ids[0][0]] * 3, options[0], tokenizer, closed=True)
    assert all(decoded(tokenizer, x.answer).endswith("</answer>") for x in closed)
    each = [alone(model, prompts[0], x.before, x.answer) for x in closed]
    assert len({len(x) for x in each}) == 3
    mean = rc.option_confidence(rc.Scorer(model), prompts[:1], ids[:1], options[:1], tokenizer, reduce="mean")
    for got, values in (
        (found[0][0], [x.sum() for x in each]), (mean[0][0], [x.mean() for x in each])
    ):  # fmt: skip
        want = torch.stack(values).softmax(0)
        assert_within_error_budget(got, want, close_to(want, 8), name="shares")


def test_one_option_and_no_option_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"options\[0\]: got 1, wanted two or more"):
        rc.option_confidence(rc.Scorer(model), [text_prompt(4)], [[[1]]], [["A"]], fast(byte_level()))
    with pytest.raises(ValueError, match="options: got 1, wanted those of each of 2 prompts"):
        rc.option_confidence(rc.Scorer(model), [], [[[1]]] * 2, [["A", "B"]], fast(byte_level()))
    with pytest.raises(ValueError, match="reduce: got 'max'"):
        rc.option_confidence(rc.Scorer(model), [], [], [], fast(byte_level()), reduce="max")


def test_no_warning_from_packing(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = fast(byte_level())
        rc.option_confidence(rc.Scorer(model), [text_prompt(4)], [[[5, 6]]], [["A", "B"]], tokenizer)
