"""One meaning in every model family: generate == the model's own pass == packed == cached prompt + suffix.

The weights are scaled up so that positions matter, and breaking the positions is shown to be seen.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_core.scoring.backbone import Backbone
from tests.budget import assert_within_error_budget
from tests.tiny_models import (
    END,
    IMAGE_PAD,
    START,
    VIDEO_PAD,
    completions,
    media_prompt,
    text_model,
    text_prompt,
    vision_model,
)

VISION = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
TEXT: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": {"attention": "eager", "final_logit_softcapping": 3.0},
    "Gemma3Text": {"final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.5},
}
LENGTHS = [5, 1, 0, 9]


def build(family: str) -> tuple[Any, list[dict[str, Any]]]:
    """A model, and prompts of every kind that it knows; the first clip is longer than it is wide."""
    if family in TEXT:
        return text_model(family, **TEXT[family]), [text_prompt(12), text_prompt(7, 3)]
    model = vision_model(family)
    prompts = [
        media_prompt(model, [(6, 4, 4)]),
        media_prompt(model, [(4, 4, 8), (2, 4, 4)], [(1, 4, 8), (1, 8, 4)], seed=1),
        text_prompt(9),
        media_prompt(model, [], [(1, 8, 4)], seed=2),
    ]
    return model, prompts


def groups(prompts: list[Any]) -> list[list[list[int]]]:
    return [completions(LENGTHS, seed=i) for i in range(len(prompts))]


def own_logp(model: Any, prompt: dict[str, Any], ids: list[int]) -> Tensor:
    """By the model's own forward pass, head and all: [n]."""
    inputs = {
        k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    whole = torch.cat([prompt["input_ids"], torch.tensor([ids], dtype=torch.long)], 1)
    if "mm_token_type_ids" in prompt:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, len(ids)))
    with torch.no_grad():
        logits = model(input_ids=whole, **inputs).logits[0, prompt["input_ids"].shape[1] - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0]


def own(model: Any, prompts: list[Any], found: list[list[list[int]]]) -> Tensor:
    return torch.cat(
        [own_logp(model, p, ids) for p, group in zip(prompts, found, strict=True) for ids in group]
    )


def scored(scorer: rc.Scorer, prompts: list[Any], found: list[list[list[int]]], **options: Any) -> Tensor:
    with torch.no_grad():
        stats = scorer.token_stats(prompts, found, **options)
    logps = [s.logp for group in stats for s in group]
    assert [len(x) for x in logps] == [len(ids) for group in found for ids in group]
    return torch.cat(logps)


@pytest.mark.parametrize("family", [*VISION, *TEXT])
def test_every_path_gives_the_models_own_log_probabilities(family: str) -> None:
    model, prompts = build(family)
    found = groups(prompts)
    oracle, peer = own(copy.deepcopy(model).double(), prompts, found), own(model, prompts, found)
    for packing in ("packed", "suffix", "plain", "auto"):
        for room in (10_000, 40):
            scorer = rc.Scorer(model, packing=packing, max_tokens=room)
            got = scored(scorer, prompts, found)
            assert_within_error_budget(got, oracle, peer, name=f"{family} {packing} {room}")


@pytest.mark.parametrize("family", [*VISION, *TEXT])
def test_a_sampler_agrees(family: str) -> None:
    model, prompts = build(family)
    drawn, logp = [], []
    for prompt in prompts:
        torch.manual_seed(3)
        n = prompt["input_ids"].shape[1]
        out = model.generate(
            **prompt, do_sample=True, max_new_tokens=6, min_new_tokens=6, output_logits=True, top_k=0,
            suppress_tokens=[IMAGE_PAD, VIDEO_PAD, START, END], return_dict_in_generate=True,
        )  # fmt: skip
        ids = out.sequences[0, n:]
        z = torch.stack([step[0] for step in out.logits]).float()
        drawn.append([ids.tolist()])
        logp.append(torch.log_softmax(z, -1).gather(1, ids[:, None])[:, 0])
    oracle, peer = own(copy.deepcopy(model).double(), prompts, drawn), own(model, prompts, drawn)
    assert_within_error_budget(torch.cat(logp), oracle, peer, name=f"{family} generate")
    scorer = rc.Scorer(model)
    report = scorer.check_sampler(prompts, drawn, [[x] for x in logp])
    assert report.agrees and report.tokens == 6 * len(prompts)
    with pytest.warns(RuntimeWarning, match="does not sample from the model"):
        worse = scorer.check_sampler(prompts, drawn, [[x - 0.1] for x in logp])
    assert not worse.agrees and worse.mean > 0.09


@pytest.mark.parametrize("family", [*VISION, "Llama", "Gemma2"])
def test_wrong_positions_are_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that goes on from the number of tokens, and text a step late: both change the result."""
    model, prompts = build(family)
    found = groups(prompts)
    right = scored(rc.Scorer(model, packing="packed"), prompts, found)
    true_positions = Backbone.positions

    def shifted(self: Backbone, prompt: Any, length: int) -> Tensor:
        found = true_positions(self, prompt, length).clone()
        found[:, len(prompt) :] += 7
        return found

    monkeypatch.setattr(Backbone, "positions", shifted)
    wrong = scored(rc.Scorer(model, packing="packed", self_check=False), prompts, found)
    assert (wrong - right).abs().max() > 0.1
    with pytest.warns(RuntimeWarning, match="disagrees with its plain passes"):
        caught = scored(rc.Scorer(model), prompts, found)
    assert torch.equal(caught, scored(rc.Scorer(model, packing="plain"), prompts, found))
