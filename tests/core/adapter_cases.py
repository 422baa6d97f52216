"""A small tokenizer and processor, and rows, for the tests of the adapters."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence

from raise_core.integrations import common
from tests.tiny_models import END, IMAGE_PAD, START, VIDEO_PAD, VOCAB

EOS, OPEN, CLOSE = "<|end|>", "<answer>", "</answer>"
WORDS = [OPEN, CLOSE, "A", "B", " blue", " ball"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vs|><|image|><|ve|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
KINDS = {"B": "multiple choice", "blue ball": "free-form"}


@cache
def tokenizer() -> Any:
    """Bytes up to 126 and some words; ids below VOCAB, the media tokens where tests.tiny_models has them."""
    from transformers import PreTrainedTokenizerFast

    letters = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if ord(c) < 127 or c == "Ġ"]
    vocab = {EOS: 1, "<|pad|>": 0, **{c: i for i, c in enumerate(letters, 2)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(w, normalized=False) for w in WORDS if w not in vocab])
    filler = IMAGE_PAD - backend.get_vocab_size()
    backend.add_special_tokens([AddedToken(f"<|{i}|>", special=True) for i in range(filler)])
    backend.add_special_tokens(
        [AddedToken(w, special=True) for w in ("<|image|>", "<|video|>", "<|vs|>", "<|ve|>")]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token="<|pad|>", padding_side="left"
    )
    made.chat_template = TEMPLATE
    ids = made.convert_tokens_to_ids(["<|image|>", "<|video|>", "<|vs|>", "<|ve|>"])
    assert ids == [IMAGE_PAD, VIDEO_PAD, START, END] and len(made) <= VOCAB
    return made


@cache
def processor() -> Any:
    """Qwen2.5-VL's, for the tiny model of tests.tiny_models."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 16 * 16, "longest_edge": 16 * 16}
    small = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    own = tokenizer()
    own.image_token, own.video_token = "<|image|>", "<|video|>"
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**small),
        tokenizer=own,
        video_processor=Qwen2VLVideoProcessor(**small),
        chat_template=TEMPLATE,
    )


def word_ids() -> list[int]:
    """The ids that completions are drawn from."""
    return [int(i) for i in tokenizer().convert_tokens_to_ids([*WORDS, EOS])]


def encode(text: str) -> list[int]:
    """Token ids of a completion."""
    return [int(i) for i in tokenizer()(text, add_special_tokens=False)["input_ids"]]


# Two groups: a strict one (solution B) and an open one (solution "blue ball").
TEXTS = [
    "so <answer>B</answer>", "<answer>B</answer>", "<answer>A</answer>", "none", "<answer> blue</answer>",
    "<answer> blue ball</answer>", "<answer>A ball</answer>", "<answer> ball</answer>",
]  # fmt: skip
SOLUTIONS = ["B"] * 4 + ["blue ball"] * 4
ROW_KINDS = ["multiple choice"] * 4 + ["free-form"] * 4
G = 4  # completions of a prompt


class Batch:
    """Eight responses, padded to one length: what any of the trainers has."""

    def __init__(self) -> None:
        self.ids = [encode(text) for text in TEXTS]
        self.responses = pad_sequence([torch.tensor(i) for i in self.ids], batch_first=True)
        self.mask = pad_sequence([torch.ones(len(i), dtype=torch.long) for i in self.ids], batch_first=True)
        source = torch.Generator().manual_seed(0)
        self.logps = -torch.rand(self.responses.shape, generator=source)
        self.graded = common.grade(TEXTS, SOLUTIONS, ROW_KINDS)
        self.score = self.graded.score
        self.uid = [f"u{b // G}" for b in range(len(TEXTS))]
        self.want = common.rewards_from_logps(
            self.logps, self.ids, tokenizer(), self.score, self.graded.strict, self.uid, group_size=G
        )

    def proto(self, **change: Any) -> Any:
        scores = torch.zeros(self.responses.shape)
        scores[torch.arange(len(self.ids)), self.mask.sum(1) - 1] = self.score
        batch = {"responses": self.responses, "response_mask": self.mask, "token_level_scores": scores,
                 "ref_log_prob": self.logps, **change}  # fmt: skip
        keys = {"uid": self.uid, "strict": self.graded.strict.float().tolist()}
        return SimpleNamespace(batch=batch, non_tensor_batch=keys, meta_info={"temperature": 1.0})
