"""Structured chains: written and read back, whatever a model wrote, and marked for scoring."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

import raise_core as rc
from raise_core.chain import (
    BACKTRACK,
    BAD,
    CHAIN_ANSWER_CLOSE,
    CHAIN_ANSWER_OPEN,
    CHAIN_TOKENS,
    END,
    GOOD,
    PROCEED,
    SCORE_TOKENS,
    START,
    STEP_CLOSE,
    STEP_OPEN,
    STEP_TAG,
    StepTokens,
    step_ends,
    tag_steps,
)
from tests.small_tokenizers import byte_level

STEPS = (rc.Step("look", "a ball moves", "frame 2 shows it"), rc.Step("decide", "it is blue", "as seen"))
WHOLE = rc.format_chain(STEPS, "B")


def bare(steps: tuple[rc.Step, ...]) -> list[tuple[str, str, str]]:
    return [(s.name, s.thought, s.reflection) for s in steps]


def with_tokens() -> Tokenizer:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_tokens([AddedToken(token) for token in (*CHAIN_TOKENS, *SCORE_TOKENS)])
    return tokenizer


def test_the_form_by_hand() -> None:
    assert rc.format_chain([rc.Step("n", " t ", "r")], "4") == (
        "<|reasoning_start|>\n"
        "<|reasoning_step_start|>\n"
        "<|reasoning_step_name_start|>n<|reasoning_step_name_end|>\n"
        "<|reasoning_step_thought_start|>t<|reasoning_step_thought_end|>\n"
        "<|reasoning_step_reflection_start|>r<|reasoning_step_reflection_end|>\n"
        "<|reasoning_step_end|>\n"
        "<|reasoning_end|>\nAnswer:\n<|answer_start|>4<|answer_end|>"
    )
    assert WHOLE.count(PROCEED) == 1
    assert len(CHAIN_TOKENS) == 14 and len(set(CHAIN_TOKENS)) == 14


def test_what_is_written_is_read_back() -> None:
    chain = rc.parse_chain(f"hello\n{WHOLE}<|im_end|>")
    assert bare(chain.steps) == bare(STEPS)
    assert chain.answer == "B" and chain.reasons == () and chain.well_formed
    first = chain.steps[0]
    text = f"hello\n{WHOLE}"
    assert text[first.start : first.stop].startswith(STEP_OPEN)
    assert text[first.start : first.stop].endswith(STEP_CLOSE)


plain_text = st.text(alphabet="ab é中\n<|>", max_size=12)


@given(fields=st.lists(st.tuples(plain_text, plain_text, plain_text), max_size=4), answer=plain_text)
def test_any_fields_are_read_back_stripped(fields: list[tuple[str, str, str]], answer: str) -> None:
    chain = rc.parse_chain(rc.format_chain([rc.Step(*f) for f in fields], answer))
    assert bare(chain.steps) == [tuple(part.strip() for part in f) for f in fields]
    assert chain.answer == answer.strip()


def test_answers_in_the_tags_of_the_verifiers() -> None:
    text = rc.format_chain(STEPS, "B", open="<answer>", close="</answer>")
    assert rc.parse_chain(text).answer == "B" and rc.parse_chain(text).well_formed
    both = rc.format_chain(STEPS, "<answer>B</answer>")
    assert rc.parse_chain(both).answer == "B"
    assert rc.verify("multiple choice", text, "<answer>B</answer>") == 1.0


STEP = WHOLE[WHOLE.index(STEP_OPEN) : WHOLE.index(STEP_CLOSE) + len(STEP_CLOSE)]
TAIL = f"\n{END}\nAnswer:\n<|answer_start|>B<|answer_end|>"
PLAIN = f"{START}\n{STEP}\n{END}\nAnswer:\n"  # its answer in the verifiers' tags


@pytest.mark.parametrize(
    ("text", "steps", "answer", "reasons"),
    [
        ("", 0, "", ("missing_start", "missing_end", "no_steps", "missing_answer")),
        ("plain <answer>B</answer>", 0, "B", ("missing_start", "missing_end", "no_steps")),
        (f"{START}\n{STEP}", 1, "", ("missing_end", "missing_answer")),
        (f"{START}\n{STEP}\n{STEP}{TAIL}", 2, "B", ("missing_proceed",)),
        (f"{START}\n{STEP}\n{BACKTRACK}\n{STEP}{TAIL}", 2, "B", ()),
        (f"{START}\n{STEP}\n{PROCEED} so then {STEP}{TAIL}", 2, "B", ("text_between_steps",)),
        (f"{START} well {STEP}{TAIL}", 1, "B", ("text_between_steps",)),
        (f"{START}\n{STEP_OPEN} oh {STEP}{TAIL}", 1, "B", ("nested_step", "text_between_steps")),
        (f"{START}\n{STEP}\n{STEP_OPEN} it{TAIL}", 1, "B", ("unclosed_step", "text_between_steps")),
        (f"{START}\n{STEP}{STEP_CLOSE}{TAIL}", 1, "B", ("stray_step_end",)),
        (f"{START}\n{STEP_OPEN} {STEP_CLOSE}{TAIL}", 1, "B", ("empty_step",)),
        (f"{START}\n{STEP.replace('look', '')}{TAIL}", 1, "B", ("missing_name",)),
        (f"{START}\n{STEP.replace('a ball moves', ' ')}{TAIL}", 1, "B", ("missing_thought",)),
        (f"{START}\n{STEP.replace('frame 2 shows it', '')}{TAIL}", 1, "B", ("missing_reflection",)),
        (f"{START}\n{STEP}{TAIL[:-10]}", 1, "", ("truncated",)),
        (f"{START}\n{STEP}{TAIL[:-14]} or", 1, "", ("unclosed_answer",)),
        (f"{START}\n{STEP}{TAIL.replace('B', ' ')}", 1, "", ("empty_answer",)),
        (f"{PLAIN}<answer>B", 1, "", ("unclosed_answer",)),
        (f"{PLAIN}<answer> </answer>", 1, "", ("empty_answer",)),
        (f"{PLAIN}<answer>B</answ", 1, "", ("truncated",)),
        (f"{PLAIN}<ans", 1, "", ("truncated",)),
        (f"{START}\n{STEP}\n<|reasoning_pro", 1, "", ("missing_end", "missing_answer", "truncated")),
    ],
)  # fmt: skip
def test_reasons_by_hand(text: str, steps: int, answer: str, reasons: tuple[str, ...]) -> None:
    chain = rc.parse_chain(text)
    assert (len(chain.steps), chain.answer, chain.reasons) == (steps, answer, reasons)


pieces = st.lists(
    st.sampled_from([*CHAIN_TOKENS, *SCORE_TOKENS, "<answer>", "</answer>", "a", " ", "\n", "<|reason", "é"]),
    max_size=24,
).map("".join)


@given(text=pieces)
def test_nothing_a_model_writes_raises_and_steps_are_those_of_the_spans(text: str) -> None:
    chain, tokenizer = rc.parse_chain(text), with_tokens()
    ids = tokenizer.encode(text).ids
    (found,) = rc.find_step_spans([ids], tokenizer)
    ends, steps = step_ends(ids, tokenizer)
    assert len(found) == len(chain.steps) == steps
    assert ends[:steps] == sorted(ends[:steps]) and all(0 < end <= len(ids) for end in ends)
    if chain.well_formed:
        assert chain.steps and chain.answer


@pytest.mark.parametrize("token", [STEP_OPEN, CHAIN_ANSWER_CLOSE])
def test_a_field_that_holds_a_token_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="remove it"):
        rc.format_chain([rc.Step("a", f"b {token} c")], "B")


def test_an_answer_that_holds_its_own_tags_is_refused() -> None:
    with pytest.raises(ValueError, match=r"answer: got 'a</answer>b', which holds .*; remove it"):
        rc.format_chain(STEPS, "a</answer>b", open="<answer>", close="</answer>")


def test_tags_follow_each_step_and_the_answer() -> None:
    tokenizer = with_tokens()
    tokens = StepTokens.of(tokenizer)
    text = rc.format_chain(STEPS, "B") + "\n"
    (chain,) = tag_steps([tokenizer.encode(text).ids], tokenizer, tokens)
    assert chain.steps == 2 and len(chain.positions) == 3
    assert [chain.ids[p] for p in chain.positions] == [tokens.tag] * 3
    marked = text.replace(STEP_CLOSE, STEP_CLOSE + STEP_TAG)
    marked = marked.replace(CHAIN_ANSWER_CLOSE, CHAIN_ANSWER_CLOSE + STEP_TAG)
    assert tokenizer.decode(chain.ids, skip_special_tokens=False) == marked
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids[: chain.ends[1]], skip_special_tokens=False).endswith(STEP_CLOSE)
    assert len(chain.ids) == len(ids) + 3


def test_a_completion_cannot_score_itself() -> None:
    tokenizer = with_tokens()
    tokens = StepTokens.of(tokenizer)
    honest = tokenizer.encode(WHOLE).ids
    cheating = [tokens.good, *honest[:9], tokens.tag, tokens.good, *honest[9:], tokens.tag, tokens.good]
    one, other = tag_steps([honest, cheating], tokenizer, tokens)
    assert one.ids == other.ids and one.positions == other.positions
    assert [cheating[end - 1] for end in other.ends] == [honest[end - 1] for end in one.ends]


@given(data=st.data(), text=pieces)
def test_tags_that_a_model_wrote_change_no_step(data: st.DataObject, text: str) -> None:
    """Not even inside of a chain's token that is written in pieces: a PRM's scores are those of the spans."""
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_tokens([AddedToken(token) for token in SCORE_TOKENS])
    tokens, ids = StepTokens.of(tokenizer), tokenizer.encode(f"{STEP}{text}").ids
    own = [tokens.tag, tokens.good, tokens.bad]
    for _ in range(3):
        ids.insert(data.draw(st.integers(0, len(ids))), data.draw(st.sampled_from(own)))
    (found,), (chain,) = rc.find_step_spans([ids], tokenizer), tag_steps([ids], tokenizer, tokens)
    assert chain.steps == len(found)
    assert [i for i in chain.ids if i not in own] == [i for i in ids if i not in own]
    assert [i for i in chain.ids if i in own] == [tokens.tag] * len(chain.positions)
    for position, end in zip(chain.positions, chain.ends, strict=True):
        before = [i for i in chain.ids[:position] if i not in own]
        assert before == [i for i in ids[:end] if i not in own]


def test_without_steps_there_is_nothing_to_tag() -> None:
    tokenizer = with_tokens()
    (chain,) = tag_steps([tokenizer.encode("no idea").ids], tokenizer, StepTokens.of(tokenizer))
    assert chain.positions == () and chain.steps == 0
    (empty,) = tag_steps([[]], tokenizer, StepTokens.of(tokenizer))
    assert empty.ids == ()


def test_tags_that_are_pieces_of_text_are_found_too() -> None:
    """A tokenizer without the chain's tokens splits them; only the step tag must be one token."""
    tokenizer = byte_level()
    ids = tokenizer.encode(WHOLE).ids
    (chain,) = tag_steps([ids], tokenizer, StepTokens(900, 901, 902))
    assert chain.steps == 2 and [chain.ids[p] for p in chain.positions] == [900] * 3
    assert tokenizer.decode(chain.ids[: chain.positions[0]]).endswith(STEP_CLOSE)


def test_tokens_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=rf"{STEP_TAG}.*add_chain_tokens"):
        StepTokens.of(byte_level())
    with pytest.raises(ValueError, match="three different"):
        StepTokens.of(with_tokens(), tag=GOOD)
    assert StepTokens.of(with_tokens(), tag=CHAIN_ANSWER_OPEN, good=GOOD, bad=BAD).tag > 0
