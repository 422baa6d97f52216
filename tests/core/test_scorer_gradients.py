"""The packed policy update: gradients are those of separate passes, however the step is split."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from tests.budget import assert_within_error_budget, no_better_than
from tests.tiny_models import completions, media_prompt, text_model, text_prompt, vision_model

FAMILIES = ("Qwen2_5_VL", "Qwen3VL", "Llama", "Gemma2")
LENGTHS = [4, 1, 0, 6]


def build(family: str) -> tuple[Any, list[Any]]:
    if family == "Gemma2":
        return text_model(family, attention="eager"), [text_prompt(8), text_prompt(5, 3)]
    if family == "Llama":
        return text_model(family, tie_word_embeddings=True), [text_prompt(8), text_prompt(5, 3)]
    model = vision_model(family)
    return model, [
        media_prompt(model, [(6, 4, 4)]),
        text_prompt(7),
        media_prompt(model, [], [(1, 4, 8)], seed=2),
    ]


def weighted_sum(scorer: rc.Scorer, prompts: list[Any], found: list[Any], first: int = 0) -> Tensor:
    """A loss that weighs every token in its own way; `first` is the number of the first completion."""
    rows = scorer.completion_rows(prompts, found)
    logp = rc.linear_token_stats(rows.hidden, targets=rows.targets, **scorer.head().options()).logp
    assert logp is not None
    number = first + torch.repeat_interleave(torch.arange(len(rows.offsets) - 1), rows.offsets.diff())
    place = torch.arange(len(logp)) - rows.offsets[:-1].repeat_interleave(rows.offsets.diff())
    return (logp * torch.cos(1.0 + number + 0.3 * place)).sum()


Gradients = dict[str, Tensor]


def gradients(model: Any, *losses: Tensor) -> Gradients:
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: Gradients, oracle: Gradients, peer: Gradients, name: str) -> None:
    """Each weight's gradient against what separate passes lose, relative to its size, on any weight.

    The oracle is not fp64 throughout: transformers' norms compute in fp32 whatever the model's precision. So
    the peer's error on one weight alone can be luck.
    """
    assert got.keys() == peer.keys() == oracle.keys() and len(got) > 10
    size = {weight: want.abs().max() for weight, want in oracle.items()}
    share = max((peer[w] - want).abs().max() / size[w] for w, want in oracle.items() if size[w] > 0)
    for weight, g in got.items():
        want = oracle[weight]
        fair = no_better_than(peer[weight], want, share * size[weight])
        assert_within_error_budget(g, want, fair, name=f"{name} {weight}")


def separate(model: Any, prompts: list[Any], found: list[Any]) -> Gradients:
    return gradients(model, weighted_sum(rc.Scorer(model, packing="plain"), prompts, found))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradients_are_those_of_separate_passes(family: str) -> None:
    model, prompts = build(family)
    found = [completions(LENGTHS, seed=i) for i in range(len(prompts))]
    oracle, peer = separate(copy.deepcopy(model).double(), prompts, found), separate(model, prompts, found)
    for packing, room in (("packed", 1000), ("packed", 30), ("suffix", 8)):
        scorer = rc.Scorer(model, packing=packing, max_tokens=room)
        assert_same(gradients(model, weighted_sum(scorer, prompts, found)), oracle, peer, f"{packing} {room}")
    scorer = rc.Scorer(model)
    steps = enumerate(zip(prompts, found, strict=True))
    parts = [weighted_sum(scorer, [p], [f], len(LENGTHS) * i) for i, (p, f) in steps]
    assert_same(gradients(model, *parts), oracle, peer, "split by prompts")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients(family: str, reentrant: bool) -> None:
    """The layers are run again in the backward pass, and see the same tree."""
    model, prompts = build(family)
    found = [completions(LENGTHS, seed=i) for i in range(len(prompts))]
    oracle, peer = separate(copy.deepcopy(model).double(), prompts, found), separate(model, prompts, found)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    scorer = rc.Scorer(model, max_tokens=30)
    assert set(scorer.plan(prompts, found)) <= {"packed", "plain"}
    assert_same(gradients(model, weighted_sum(scorer, prompts, found)), oracle, peer, "checkpointed")
    assert model.training
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        rc.Scorer(model, packing="suffix").completion_rows(prompts, found)


def test_the_policy_loss_of_a_packed_group() -> None:
    """`linear_policy_loss` takes the rows and the head as they come; on-policy it needs no old values."""
    model, prompts = build("Qwen2_5_VL")
    found = [completions(LENGTHS, seed=i) for i in range(len(prompts))]
    scorer = rc.Scorer(model)
    rows = scorer.completion_rows(prompts, found)
    advantage = torch.linspace(-1, 1, len(rows.offsets) - 1)
    step = {"num_tokens": len(rows.targets), "num_sequences": len(advantage)}
    stats = rc.linear_token_stats(rows.hidden, targets=rows.targets, **scorer.head().options())
    assert stats.logp is not None
    loss = rc.policy_loss(stats.logp, stats.logp.detach(), advantage, rows.offsets, **step).loss
    peer = gradients(model, loss)
    rows = scorer.completion_rows(prompts, found)
    options = scorer.head().options()
    fused = rc.linear_policy_loss(
        rows.hidden, options.pop("weight"), rows.targets, None, advantage, rows.offsets, **step, **options
    )
    got = gradients(model, fused.loss)
    twin = copy.deepcopy(model).double()
    rows = rc.Scorer(twin).completion_rows(prompts, found)
    stats = rc.linear_token_stats(rows.hidden, targets=rows.targets, **rc.Scorer(twin).head().options())
    assert stats.logp is not None
    loss = rc.policy_loss(stats.logp, stats.logp.detach(), advantage.double(), rows.offsets, **step).loss
    assert_same(got, gradients(twin, loss), peer, "linear_policy_loss")
    assert rows.group.tolist() == [p for p in range(len(prompts)) for _ in LENGTHS]
