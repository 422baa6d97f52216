"""Small real tokenizers of three kinds, trained where they are first used, and one known only by `decode`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

EOS = "<|end|>"
CORPUS = [
    "<think>the blue ball moves left</think><answer>B</answer>",
    "<think>you see 3.50 balls</think>\n<answer>\nblue ball\n</answer>",
    "你好 世界 <answer>蓝色</answer> é ü 👍🏽 </think><answer>a</answer>",
] * 10


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def unigram() -> Tokenizer:
    """SentencePiece-like: metaspace, and bytes for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<unk>", EOS, *byte_tokens],
        unk_token="<unk>",
        max_piece_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"] |= {"byte_fallback": True, "unk_id": 0}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 2]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@cache
def word_piece(tags: str = "split") -> Tokenizer:
    """BERT-like: `##` continues a word; tags are split at their punctuation, or added whole."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", EOS], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if tags == "added":
        tokenizer.add_tokens([AddedToken("<answer>"), AddedToken("</answer>")])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "unigram": unigram,
    "word_piece": word_piece,
    "word_piece_added": lambda: word_piece("added"),
}


class DecodeOnly:
    """Any other tokenizer: only its ids, their text and, if told to, their strings are known."""

    def __init__(self, tokenizer: Tokenizer, with_strings: bool) -> None:
        self.tokenizer = tokenizer
        self.all_special_ids = [tokenizer.token_to_id(EOS)]
        if with_strings:
            self.convert_ids_to_tokens = lambda ids: [tokenizer.id_to_token(i) for i in ids]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def vocabulary(*tokens: str) -> Tokenizer:
    """A byte-level tokenizer whose ids are the places of the given strings; the last id is end of text."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(piece for piece, _ in pre.pre_tokenize_str(token)) for token in tokens]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(spelled)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer
