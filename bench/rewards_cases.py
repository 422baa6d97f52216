"""The cases of `python -m bench rewards`: one call of a reward function, for a video's group of completions.

The naive function is what one writes first: for each completion a pass over prompt, video and completion, the
logits of every position, their log-softmax, the answer's tokens. Ours is the `ConfidenceReward` that TRL
calls. Both grade the text, find the answer, and give SCRE. The truth is the fp64 model's, one pass for each
completion.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import raise_core as rc
from bench.cases import PEER_FACTOR, Call, Case, Impl, Truth
from bench.scoring_cases import FEW, MOST, Shape
from bench.scoring_models import Size, build, repeated, video_prompt
from raise_core.integrations.trl import ConfidenceReward

CASE = "reward function"
NAIVE, KEPT, OURS = "naive: all logits", "naive: the completion's logits", "raise-core ConfidenceReward"
FIRST_TEXT, LAST_TEXT = 2, 250  # ids of single bytes, of which the text before an answer is made


@cache
def tokenizer() -> Tokenizer:
    """One token for each byte and each answer tag; ids below the smallest vocabulary that is measured."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<eos>": 1, **{c: i for i, c in enumerate(letters, 2)}}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(tag, normalized=False) for tag in ("<answer>", "</answer>")])
    return made


@dataclass
class Rows:
    """A model and a call's arguments: G rows of one prompt, each with its right answer of `answer` digits."""

    model: Any
    shape: Shape
    prompts: list[dict[str, Any]] = field(init=False)
    ids: list[list[int]] = field(init=False)
    columns: dict[str, Any] = field(init=False)
    reward: ConfidenceReward = field(init=False)

    def __post_init__(self) -> None:
        s, v = self.shape, self.model.config.text_config.vocab_size
        prompt = video_prompt(s.frames, s.side, v)
        self.prompts = [prompt] * s.group
        digits = "1234567890"[: s.answer]
        answer = tokenizer().encode(f"<answer>{digits}</answer>").ids
        source = torch.Generator().manual_seed(5)
        size = (s.group, s.length - len(answer))
        before = torch.randint(FIRST_TEXT, LAST_TEXT, size, generator=source)
        self.ids = [[*row, *answer] for row in before.tolist()]
        self.columns = {"solution": [digits] * s.group, "problem_type": ["numerical"] * s.group}
        self.reward = ConfidenceReward(
            self.model, tokenizer(), group_size=s.group, encode=lambda given: given
        )

    def few(self) -> Rows:
        """A small group of the same model and the same reward function: its first-use check runs here."""
        other = Rows(self.model, Shape(answer=self.shape.answer, **{**FEW, "length": self.shape.answer + 4}))
        other.reward = self.reward
        other.reward.group_size = None
        return other

    def truth(self) -> dict[str, Truth]:
        exact = copy.deepcopy(self.model).double()
        made = naive(exact, self.prompts, self.ids, **self.columns, kept=True)
        return {
            "log reward": Truth(torch.tensor(made, dtype=torch.float64).log(), _allowed(self.shape.answer))
        }


def _allowed(answer: int) -> float:
    """What MOST nats in each log-probability come to in log SCRE, whose weights are below 1."""
    return 2 * answer * MOST / PEER_FACTOR


@torch.no_grad()
def naive(
    model: Any,
    prompts: Sequence[dict[str, Any]],
    completion_ids: Sequence[Sequence[int]],
    *,
    solution: Sequence[str],
    problem_type: Sequence[str],
    kept: bool = False,
) -> list[float]:
    """A reward function without this package's operations on logits. kept: the completion's logits alone."""
    rewards = []
    for given, row, right, kind in zip(prompts, completion_ids, solution, problem_type, strict=True):
        prompt = {k: v.to(model.dtype) if k.startswith("pixel") else v for k, v in given.items()}
        score = rc.verify(kind, tokenizer().decode(list(row)), right)
        (found,) = rc.find_answer_spans([row], tokenizer())
        ids = torch.tensor([row])
        batch = repeated(prompt, ids)
        keep = {"logits_to_keep": len(row) + 1} if kept else {}
        logits = model(**batch, use_cache=False, **keep).logits[0]
        logp = torch.log_softmax(logits, -1)[-len(row) - 1 : -1].gather(1, ids[0, :, None])[:, 0]
        rewards.append(score * float(_scre(logp[found.start : found.stop])))
    return rewards


def _scre(logp: Tensor) -> Tensor:
    weight = torch.exp(-0.1 * torch.arange(1, len(logp) + 1, dtype=logp.dtype))
    p = logp.exp()
    return torch.exp((weight * logp).sum() - ((p - p.mean()) ** 2).mean())


def _call(rewards: Callable[[], Sequence[float | None]]) -> Call:
    return lambda: {"log reward": torch.tensor(rewards(), dtype=torch.float64).log().float()}


def cases(shape: Shape, sizes: Sequence[Size]) -> list[Case]:
    """A case for each vocabulary."""

    def naive_impl(kept: bool) -> Callable[[Rows], Call]:
        return lambda x: _call(lambda: naive(x.model, x.prompts, x.ids, **x.columns, kept=kept))

    def ours(x: Rows) -> Call:
        return _call(lambda: x.reward(x.prompts, [None] * len(x.ids), x.ids, **x.columns))

    def case(size: Size) -> Case:
        return Case(
            name=CASE,
            dtype=f"V = {size.vocabulary}",
            shape={"frames": shape.frames, "side": shape.side, "G": shape.group, "C": shape.length,
                   "answer": shape.answer, "V": size.vocabulary, "D": size.width},
            inputs=lambda: Rows(build(size), shape),
            impls=(
                Impl(NAIVE, "eager", naive_impl(kept=False)),
                Impl(KEPT, "eager", naive_impl(kept=True)),
                Impl(OURS, "ours", ours),
            ),
            unit=NAIVE,
            bytes=0,
            is_limit=False,
            expected_s=60.0,
        )  # fmt: skip

    return [case(size) for size in sizes]
