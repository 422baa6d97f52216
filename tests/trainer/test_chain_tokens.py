"""The chain's tokens in models and tokenizers that have never seen them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from raise_core.chain import BAD, CHAIN_TOKENS, DESCRIPTIONS, GOOD, STEP_TAG, StepTokens
from raise_trainer.chain_tokens import add_chain_tokens
from raise_trainer.errors import UserError
from tests.budget import assert_exact
from tests.small_tokenizers import EOS, byte_level, unigram, word_piece
from tests.tiny_models import text_model, vision_model


def wrapped(kind: Any = byte_level) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=type(kind()).from_str(kind().to_str()), eos_token=EOS, unk_token="<unk>"
    )


def a_model(tokenizer: Any, **options: Any) -> Any:
    return text_model("Qwen2", vocab_size=options.pop("rows", len(tokenizer)), **options)


def mean_of(table: torch.Tensor, tokenizer: Any, text: str) -> torch.Tensor:
    return table[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 4, 64])
def test_new_rows_are_means_of_their_descriptions(tied: bool, spare: int) -> None:
    tokenizer = wrapped()
    model = a_model(tokenizer, rows=len(tokenizer) + spare, tie_word_embeddings=tied)
    words = {token: tokenizer(text)["input_ids"] for token, text in DESCRIPTIONS.items()}
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made = add_chain_tokens(model, tokenizer)
    assert made.new == tuple(sorted(made.ids.values())) and len(made.new) == 17
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    assert len(embedding) == len(head) == max(len(tokenizer), len(before["lm_head.weight"]))
    assert model.config.vocab_size == len(embedding)
    for table, name in ((embedding, "model.embed_tokens.weight"), (head, "lm_head.weight")):
        for token, row in made.ids.items():
            want = before[name][words[token]].mean(0)
            assert_exact(table[row].detach(), want, name=f"{name} {token}")
        known = min(made.new)
        assert_exact(table[:known].detach(), before[name][:known], name=f"{name} before")


def test_twice_is_once_and_training_in_between_is_kept() -> None:
    tokenizer = wrapped()
    model = a_model(tokenizer)
    first = add_chain_tokens(model, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[first.ids[GOOD]] = 7.0
    second = add_chain_tokens(model, tokenizer)
    assert second.new == () and second.ids == first.ids
    assert (model.get_input_embeddings().weight[first.ids[GOOD]] == 7.0).all()


@pytest.mark.parametrize("kind", [byte_level, unigram, word_piece])
def test_each_is_one_token_of_any_tokenizer_and_is_shown(kind: Any) -> None:
    tokenizer = wrapped(kind)
    made = add_chain_tokens(a_model(tokenizer), tokenizer)
    for token in CHAIN_TOKENS:
        assert tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"].count(made.ids[token]) == 1
        assert token in tokenizer.decode([made.ids[token]], skip_special_tokens=True)
    assert StepTokens.of(tokenizer) == StepTokens(*(made.ids[t] for t in (STEP_TAG, GOOD, BAD)))


def test_a_cyrillic_word_holds_no_step_tag() -> None:
    tokenizer = wrapped()
    made = add_chain_tokens(a_model(tokenizer), tokenizer)
    assert made.ids[STEP_TAG] not in tokenizer("кино, науки", add_special_tokens=False)["input_ids"]


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    tokenizer = wrapped()
    model = a_model(tokenizer, tie_word_embeddings=True)
    made = add_chain_tokens(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert add_chain_tokens(again, words).new == () and add_chain_tokens(again, words).ids == made.ids
    for name, x in model.state_dict().items():
        assert_exact(again.state_dict()[name], x, name=name)


def test_a_tokenizer_that_brings_the_tokens_to_a_model_without_rows() -> None:
    tokenizer = wrapped()
    plain = a_model(tokenizer)
    add_chain_tokens(a_model(tokenizer), tokenizer)
    made = add_chain_tokens(plain, tokenizer)
    assert len(made.new) == 17 and len(plain.get_input_embeddings().weight) == len(tokenizer)
    row = plain.get_input_embeddings().weight[made.ids[GOOD]]
    assert_exact(
        row, mean_of(plain.get_input_embeddings().weight, tokenizer, DESCRIPTIONS[GOOD]), name="good"
    )


def test_a_model_that_sees() -> None:
    tokenizer = wrapped()
    model = vision_model("Qwen2_5_VL", vocab_size=len(tokenizer))
    made = add_chain_tokens(model, tokenizer)
    assert model.config.get_text_config().vocab_size == len(tokenizer)
    logits = model(input_ids=torch.tensor([[3, made.ids[STEP_TAG]]])).logits
    assert logits.shape[-1] == len(tokenizer) and logits.isfinite().all()


def test_adapters_come_after_the_tokens() -> None:
    tokenizer = wrapped()
    model = peft.get_peft_model(a_model(tokenizer), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="add the chain's tokens first"):
        add_chain_tokens(model, tokenizer)


def test_a_description_without_tokens_is_refused() -> None:
    tokenizer = wrapped()
    with pytest.raises(UserError, match="describe the token in other words"):
        add_chain_tokens(a_model(tokenizer), tokenizer, {"<|x|>": ""})
