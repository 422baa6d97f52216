"""The special tokens of structured chains, added to any model and tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raise_core.chain import DESCRIPTIONS, SCORE_TOKENS

from .errors import UserError


@dataclass(frozen=True)
class ChainTokens:
    """ids: of every token by its text. new: ids of those that were added by this call, ascending."""

    ids: dict[str, int]
    new: tuple[int, ...]


def add_chain_tokens(
    model: Any, tokenizer: Any, descriptions: Mapping[str, str] = DESCRIPTIONS
) -> ChainTokens:
    """Add what is missing of the tokens to a tokenizer and its model, in place; nothing to do a second time.

    descriptions: token to a few words. The input row of a new token, its output row and its bias in the head
    are the means of those of its words' tokens; a tied head has one row for both. Rows that a padded
    vocabulary has to spare are used before the model grows. `save_pretrained` of both keeps the tokens.
    Tokens are ordinary added ones, so that decoding shows them; of the step tag, good and bad, which are also
    letters of Cyrillic words, only whole words count.
    Before LoRA: the adapters of `lora_rank` leave embedding and head as they are. Under PEFT give
    LoraConfig(trainable_token_indices=list(result.new)), or warm up without LoRA first.
    Raises UserError for a PEFT wrapper, and for a description of which the tokenizer makes nothing.
    """
    from transformers import AddedToken

    if hasattr(model, "get_base_model"):
        raise UserError("the model has LoRA adapters: add the chain's tokens first, then the adapters")
    before = tokenizer.get_vocab()
    missing = [token for token in descriptions if token not in before]
    words = {token: _words(tokenizer, text, before) for token, text in descriptions.items()}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False, single_word=token in SCORE_TOKENS)
            for token in missing
        ]
    )
    now = tokenizer.get_vocab()
    ids = {token: int(now[token]) for token in descriptions}
    rows = len(model.get_input_embeddings().weight)
    if max(ids.values()) >= rows:
        model.resize_token_embeddings(max(now.values()) + 1, mean_resizing=False)
    # A tokenizer may have brought the tokens along to a model that has no rows for them.
    new = {token: i for token, i in ids.items() if token in missing or i >= rows}
    _fill(model, {i: words[token] for token, i in new.items()})
    return ChainTokens(ids, tuple(sorted(new.values())))


def _words(tokenizer: Any, text: str, known: Mapping[str, int]) -> list[int]:
    """Ids of a description's tokens, without any that is itself one of the chain's."""
    own = {known[token] for token in DESCRIPTIONS if token in known}
    ids = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i not in own]
    if not ids:
        raise UserError(f"the tokenizer makes no token of {text!r}; describe the token in other words")
    return ids


@torch.no_grad()
def _fill(model: Any, words: Mapping[int, list[int]]) -> None:
    """Rows of embedding and head from the means of other rows of theirs."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables: list[Tensor] = [embedding.weight]
    if head is not None and head.weight.data_ptr() != embedding.weight.data_ptr():
        tables.append(head.weight)
    if getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    for table in tables:
        for row, sources in words.items():
            table[row] = table[torch.tensor(sources, device=table.device)].float().mean(0).to(table.dtype)
