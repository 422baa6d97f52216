"""Answer and step spans on real tokenizers of three kinds, against an oracle that decodes every prefix."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from raise_core.pieces import decoded_layout, lay_out
from raise_core.spans import Found, find_answer_spans, find_step_spans
from raise_core.tags import all_pairs, last_pair
from tests.small_tokenizers import EOS, TOKENIZERS, DecodeOnly, byte_level, vocabulary, word_piece

PAIR = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def oracle(ids: Sequence[int], tokenizer: Tokenizer, spaced: bool) -> tuple[int, int, str] | None:
    """(start, stop, text) of the last pair, None without one; spaced: the decoder adds spaces."""

    def decode(part: Sequence[int]) -> str:
        text = tokenizer.decode(list(part), skip_special_tokens=True)
        return text.replace(" ", "") if spaced else text

    text = decode(ids)
    pairs = list(PAIR.finditer(text))
    if not pairs or not pairs[-1][1].strip():
        return None
    inside = pairs[-1][1]
    a = pairs[-1].start(1) + len(inside) - len(inside.lstrip())
    b = a + len(inside.strip())
    prefixes = [decode(ids[:n]) for n in range(len(ids) + 1)]
    # A run of bytes that ends inside a character is shown broken as a whole; what was complete stays so.
    complete = list(accumulate((len(prefix.rstrip("\ufffd")) for prefix in prefixes), max))
    touched = [done + prefix.endswith("\ufffd") for done, prefix in zip(complete, prefixes, strict=True)]
    wrote = [prefixes[n] != prefixes[n + 1] or touched[n] != complete[n] for n in range(len(ids))]
    inside_tokens = [n for n in range(len(ids)) if complete[n] < b and touched[n + 1] > a and wrote[n]]
    return inside_tokens[0], inside_tokens[-1] + 1, text[a:b]


FRAGMENTS = st.sampled_from(
    [
        *"<>/BaA1. \n",
        "<answer>",
        "</answer>",
        "answer",
        "</",
        "blue ball",
        "<think>",
        "</think>",
        "\u3000",
        "\u00a0",
    ]
    + ["你好", "蓝", "é", "👍🏽", "👩‍👩‍👧", "e\u0301", "\u2028", "▁", "<0x41>", "##", "<|end|>"]
)
LOOSE = st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=6).map("".join)
TAGGED = st.tuples(LOOSE, st.just("<answer>"), LOOSE, st.just("</answer>"), LOOSE).map("".join)
TEXTS = st.one_of(TAGGED, TAGGED, LOOSE).map(lambda text: text.replace("\ufffd", ""))


@st.composite
def sampled_ids(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text cut at random places: merges across tag borders, and pieces no encoder would choose."""
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [i for part in parts for i in tokenizer.encode(part).ids]
    eos = tokenizer.token_to_id(EOS)
    return ids + [eos] * draw(st.integers(0, 2))


def assert_agrees(found: Found, ids: list[int], tokenizer: Tokenizer, spaced: bool) -> None:
    wanted = oracle(ids, tokenizer, spaced)
    if wanted is None:
        assert (found.start, found.stop, found.text) == (0, 0, "") and found.reason is not None
        return
    text = found.text.replace(" ", "") if spaced else found.text
    assert (found.start, found.stop, text, found.reason) == (*wanted, None)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_answer_span_is_the_oracles(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = data.draw(sampled_ids(tokenizer))
    (found,) = find_answer_spans([ids], tokenizer)
    assert_agrees(found, ids, tokenizer, kind.startswith("word_piece"))


@given(data=st.data())
def test_answer_span_over_any_segmentation_of_the_bytes(data: st.DataObject) -> None:
    """Tokens cut anywhere in the UTF-8, also inside characters and across tag borders."""
    tokenizer = byte_level()
    vocab = {token: i for token, i in tokenizer.get_vocab().items() if token != EOS}
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(data.draw(TEXTS))
    left, ids = "".join(piece for piece, _ in pieces), []  # one character stands for each byte
    while left:
        size = data.draw(st.sampled_from([size for size in range(1, 9) if left[:size] in vocab]))
        ids.append(vocab[left[:size]])
        left = left[size:]
    (found,) = find_answer_spans([ids], tokenizer)
    assert_agrees(found, ids, tokenizer, spaced=False)


@pytest.mark.parametrize("with_strings", [True, False], ids=["strings", "decode only"])
@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
@given(data=st.data())
def test_fallback_by_decoding(kind: str, with_strings: bool, data: st.DataObject) -> None:
    """Exact where the token strings are to be had; otherwise never short of a token."""
    tokenizer = TOKENIZERS[kind]()
    ids = data.draw(sampled_ids(tokenizer))
    (exact,) = find_answer_spans([ids], tokenizer)
    (found,) = find_answer_spans([ids], DecodeOnly(tokenizer, with_strings))
    assert found.reason == exact.reason
    if found.reason is None:
        assert found.start <= exact.start < exact.stop <= found.stop
        assert found.text == exact.text
        if with_strings and kind == "byte_level":
            assert found == exact


RULES = {
    "one": ("x <answer> B </answer> y", "B", None),
    "two words": ("<answer>blue\nball</answer>", "blue\nball", None),
    "repeated": ("<answer>A</answer> no: <answer>B</answer>", "B", None),
    "nested": ("<answer>A<answer>B</answer>C</answer>", "B", None),
    "mentioned before": ("I put it in <answer> tags. <answer>B</answer>", "B", None),
    "then unclosed": ("<answer>A</answer> or <answer>B", "A", None),
    "then truncated": ("<answer>A</answer> or <answer>B</ans", "A", None),
    "stray close behind": ("<answer>A</answer></answer>", "A", None),
    "multi-byte": ("<answer>\u3000你好\u3000</answer>", "你好", None),
    "nothing": ("", "", "missing"),
    "no tags": ("the answer is B", "", "missing"),
    "close only": ("B</answer>", "", "missing"),
    "close before open": ("</answer>B<answer>", "", "unclosed"),
    "unclosed": ("<answer>B", "", "unclosed"),
    "truncated close": ("<answer>B</answer", "", "truncated"),
    "truncated open": ("so <ans", "", "truncated"),
    "empty": ("<answer></answer>", "", "empty"),
    "white space": ("<answer> \n\u3000\u2028</answer>", "", "empty"),
    "empty after a full one": ("<answer>A</answer><answer></answer>", "", "empty"),
}


@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
@pytest.mark.parametrize("case", RULES)
def test_rules(kind: str, case: str) -> None:
    text, answer, reason = RULES[case]
    tokenizer = TOKENIZERS[kind]()
    (found,) = find_answer_spans([tokenizer.encode(text).ids], tokenizer)
    assert (found.text, found.reason) == (answer, reason)
    assert (len(found) > 0) == (reason is None)


def test_merges_across_the_tag_borders() -> None:
    tokenizer = vocabulary("<", "answer", ">B", "lu", "e </", ">", " <", ">\n")
    (found,) = find_answer_spans([[6, 1, 2, 3, 4, 1, 7, 8]], tokenizer)
    assert found == Found(2, 5, "Blue", None)
    (blank,) = find_answer_spans([[6, 1, 7, 0, 4, 1, 5]], tokenizer)
    assert blank.text == "<e" and (blank.start, blank.stop) == (3, 5)


def test_end_of_text_and_padding_write_nothing() -> None:
    tokenizer = vocabulary("<answer>", "B", "</answer>", " ")
    eos = 4
    found = find_answer_spans(
        [[0, eos, 1, eos, eos, 1, eos, 2, eos, eos], [0, eos, 2, eos], [eos] * 3], tokenizer
    )
    assert found[0] == Found(2, 6, "BB", None)
    assert [one.reason for one in found[1:]] == ["empty", "missing"]


def test_ids_outside_the_vocabulary_write_nothing() -> None:
    tokenizer = vocabulary("<answer>", "B", "</answer>")
    (found,) = find_answer_spans([[10**6, 0, 2**40, 1, -1, 2]], tokenizer)
    assert found == Found(3, 4, "B", None)


def test_tags_that_are_special_tokens() -> None:
    tokenizer = byte_level()
    tagged = Tokenizer.from_str(tokenizer.to_str())
    tagged.add_special_tokens(["<answer>", "</answer>"])
    ids = tagged.encode("<answer>blue ball</answer>" + EOS).ids
    (found,) = find_answer_spans([ids], tagged)
    assert found == Found(1, len(ids) - 2, "blue ball", None)


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = vocabulary("<answer>", "B", "</answer>")
    tokenizer.add_tokens(["blue ball 你"])  # characters outside the byte alphabet
    added = tokenizer.token_to_id("blue ball 你")
    (found,) = find_answer_spans([[0, added, 1, 2]], tokenizer)
    assert found == Found(1, 3, "blue ball 你B", None)


def test_other_tags() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("[[B]] <answer>A</answer>").ids
    (found,) = find_answer_spans([ids], tokenizer, open="[[", close="]]")
    assert found.text == "B"
    for wrong in ({"open": ""}, {"open": "</answer>"}, {"open": "answer>"}):
        with pytest.raises(ValueError, match="open="):
            find_answer_spans([ids], tokenizer, **wrong)
    with pytest.raises(TypeError, match="close: got int"):
        find_answer_spans([ids], tokenizer, close=3)


def test_spaces_the_decoder_inserts_do_not_break_a_tag() -> None:
    tokenizer = word_piece()
    ids = tokenizer.encode("<think>you see</think><answer>blue ball</answer>").ids
    assert "<answer>" not in tokenizer.decode(ids)
    (found,) = find_answer_spans([ids], tokenizer)
    assert found.text == "blue ball"
    assert tokenizer.decode(ids[found.start : found.stop]).strip() == "blue ball"


def test_suffix_and_plain_decoders() -> None:
    tokenizer = Tokenizer(
        models.WordLevel({"<answer>": 0, "blue": 1, "ball</w>": 2, "</answer>": 3}, unk_token=EOS)
    )
    (plain,) = find_answer_spans([[0, 1, 1, 3]], tokenizer)
    assert plain == Found(1, 3, "blue blue", None)
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    (suffix,) = find_answer_spans([[0, 1, 2, 1, 3]], tokenizer)
    assert suffix == Found(1, 4, "blueball blue", None)


def test_hugging_face_tokenizers_fast_and_slow() -> None:
    transformers = pytest.importorskip("transformers")
    text = "好<think>a</think><answer>你 B</answer>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=EOS, pad_token=EOS)
    ids = fast(text)["input_ids"]
    assert find_answer_spans([ids], fast) == find_answer_spans([ids], byte_level())
    slow = transformers.ByT5Tokenizer()  # one token per byte; what is broken is left out when decoding
    ids = [byte + 3 for byte in text.encode()] + [slow.eos_token_id, slow.pad_token_id]
    (found,) = find_answer_spans([ids], slow)
    start = len("好<think>a</think><answer>".encode())
    assert found == Found(start, start + len("你 B".encode()), "你 B", None)


def test_a_decoder_we_do_not_know_is_asked() -> None:
    tokenizer = byte_level()
    odd = Tokenizer.from_str(tokenizer.to_str())
    odd.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("~", 1, 0)])
    fast = pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_object=odd, eos_token=EOS)
    completions = [tokenizer.encode(text).ids for text, _, _ in RULES.values()]
    assert find_answer_spans(completions, fast) == find_answer_spans(completions, tokenizer)


def test_a_processor_is_not_a_tokenizer() -> None:
    class Processor:
        tokenizer = byte_level()

        def decode(self, ids: Sequence[int]) -> str:
            return ""

    with pytest.raises(TypeError, match=r"tokenizer: got Processor.*processor\.tokenizer"):
        find_answer_spans([[1]], Processor())


def test_ten_thousand_tokens_take_well_under_a_second() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("<answer>你好 blue ball</answer> moves left " * 800).ids[:10_000]
    for subject in (tokenizer, DecodeOnly(tokenizer, with_strings=True)):
        begin = time.perf_counter()
        (found,) = find_answer_spans([ids], subject)
        assert time.perf_counter() - begin < 1.0
        assert found.text == "你好 blue ball"


@given(text=TEXTS)
def test_layout_covers_the_text_in_order(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text).ids
    for layout in (lay_out(ids, tokenizer), decoded_layout(ids, DecodeOnly(tokenizer, True), {0})):
        size = len(layout.text.encode("utf-8", "surrogateescape"))
        assert layout.starts == [0, *layout.ends[:-1]][: len(ids)]
        assert not ids or layout.ends[-1] == size
        assert layout.text == tokenizer.decode(ids)


@given(text=TEXTS)
def test_last_pair_is_the_last_of_all_pairs(text: str) -> None:
    pairs = all_pairs(text, "<answer>", "</answer>")
    assert pairs == [(match.start(1), match.end(1)) for match in PAIR.finditer(text)]
    assert last_pair(text) == (pairs[-1] if pairs else None)


def test_steps_are_every_complete_pair() -> None:
    tokenizer = byte_level()
    text = "<s>blue</s> ball <s><s> left </s></s><s> </s><s>open"
    ids = tokenizer.encode(text).ids
    (steps, none) = find_step_spans([ids, []], tokenizer, open="<s>", close="</s>")
    assert [step.text for step in steps] == ["blue", "left", ""]
    assert [step.reason for step in steps] == [None, None, "empty"]
    assert none == []
    for step in steps[:2]:
        assert step.text in tokenizer.decode(ids[step.start : step.stop])


def test_default_steps_are_those_of_chain_of_step() -> None:
    tokenizer = byte_level()
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["<|reasoning_step_start|>", "<|reasoning_step_end|>"])
    ids = tokenizer.encode("<|reasoning_step_start|>blue ball<|reasoning_step_end|>" + EOS).ids
    assert find_step_spans([ids], tokenizer) == [[Found(1, len(ids) - 2, "blue ball", None)]]
