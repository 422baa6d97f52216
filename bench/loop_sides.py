"""What `python -m bench loop` compares: one tiny text model, its prompts, our GRPO step on them.

Both trainers start from the same saved weights, read the same prompts, sample 64 tokens that cannot end,
and reward a completion by the same function of its text.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import raise_core as rc
from raise_trainer.grpo import Grpo
from raise_trainer.method import Method
from raise_trainer.prompts import Prompt
from raise_trainer.rollout import draws
from raise_trainer.rows import Row

END = "<|end|>"
LEARNING_RATE = 1e-3
KL = 0.04  # weight of the KL term: more than 0, so that both sides need the reference's log-probabilities
SEED = 0
CONSONANTS, VOWELS = "bdgklmnprstv", "aeiou"
PHASES = ("rollout", "score", "update", "other")


@dataclass(frozen=True)
class Shape:
    """A step: P prompts of `prompt` tokens, `group` completions each, of `length` tokens.

    width, layers, vocabulary: of the model. at_least: how many times faster we have to be.
    """

    prompt: int
    at_least: float
    prompts: int = 4
    group: int = 8
    length: int = 64
    width: int = 128
    layers: int = 4
    vocabulary: int = 1024


@dataclass(frozen=True)
class Step:
    """Seconds of one step, and of its phases."""

    seconds: float
    phases: dict[str, float]


def reward(text: str) -> float:
    """Of constant cost, different within a group, without meaning: the last digit of the text's length."""
    return len(text) % 10 / 10


class Marked(Row):
    """A row judged by `reward`."""

    def verdict(self, completion: str) -> rc.Verdict:
        return rc.Verdict(reward(completion), "", None, False)


def build_tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE of `vocabulary` tokens, many of them whole words with a space in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    syllables = [a + b for a in CONSONANTS for b in VOWELS]
    source = random.Random(SEED)
    words = [source.choice(syllables) + source.choice(syllables) for _ in range(vocabulary)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [f" {word}" for word in words],
        trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, padding_side="left")


def texts(tokenizer: Any, shape: Shape, count: int) -> list[str]:
    """Prompts of `shape.prompt` random tokens, each a word, so that tokenising them gives these back."""
    words = sorted(
        word
        for i in range(len(tokenizer))
        if (word := tokenizer.decode([i])).startswith(" ")
        and tokenizer(word, add_special_tokens=False)["input_ids"] == [i]
        and word.strip().isalpha()
    )
    source = random.Random(SEED + 1)
    return ["".join(source.choices(words, k=shape.prompt)) for _ in range(count)]


def save_model(folder: Path, tokenizer: Any, shape: Shape) -> None:
    """A random Qwen2 of about a million weights, fp32, with its tokenizer, as both trainers load it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=shape.width, intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=shape.prompt + shape.length, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def method_of(shape: Shape) -> Method:
    """TRL's defaults where they mean the same: normalised by tokens, advantages divided by their group's std.

    No floor under that std, as TRL has none.
    """
    return Method(
        group_size=shape.group, max_new_tokens=shape.length, reward="accuracy", loss="dapo", kl=KL,
        min_std=0.0,
    )  # fmt: skip


class Ours:
    """Our trainer, a step at a time; prompts are taken in order."""

    def __init__(self, folder: Path, tokenizer: Any, shape: Shape, said: list[str]) -> None:
        self.shape, self.done = shape, 0
        self.prompts = [prompt(tokenizer, text) for text in said]
        model = load_model(folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.grpo = Grpo(
            model, rc.FrozenReference(model), optimizer, tokenizer, method_of(shape),
            eos=[], suppress=[tokenizer.eos_token_id],
        )  # fmt: skip

    def step(self) -> Step:
        """One step, its random draws included."""
        shape, first = self.shape, self.done * self.shape.prompts
        begun = time.perf_counter()
        drawn = draws(SEED, [(self.done, i) for i in range(shape.prompts)], shape.group, shape.length)
        made = self.grpo.step(self.prompts[first : first + shape.prompts], drawn, self.done)
        seconds = time.perf_counter() - begun
        self.done += 1
        if {len(ids) for ids in made.rollout.completions} != {shape.length}:
            raise RuntimeError("a completion of ours ended early: the two sides do not do the same work")
        phases = self.grpo.phases.take()
        return Step(seconds, phases | {"other": seconds - sum(phases.values())})


def prompt(tokenizer: Any, text: str) -> Prompt:
    """A prompt of text alone, tokenised as it stands."""
    row = Marked(0, text, "text", "free-form", (), "<answer>0</answer>", None, "bench")
    return Prompt(row, {"input_ids": tokenizer(text, return_tensors="pt")["input_ids"]}, None)
