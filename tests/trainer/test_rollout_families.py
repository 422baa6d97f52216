"""What is sampled comes from the model that is scored, in every family: scale, softcap, window, positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_trainer import prefill
from raise_trainer.errors import UserError
from raise_trainer.prompts import Prompt
from raise_trainer.rollout import draws, sample
from tests.budget import assert_within_error_budget
from tests.tiny_models import media_prompt, text_model, text_prompt, vision_model

G, LONGEST = 2, 6
TEXT = {
    "Llama": {},
    "Qwen3": {},
    "Gemma3Text": {"final_logit_softcapping": 5.0, "sliding_window": 512},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Mistral": {"sliding_window": 6},
}
VISION = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")


def agree(model: Any, inputs: list[dict[str, Any]]) -> None:
    """The sampler's log-probabilities against passes of one completion each, and its entropies."""
    prompts = [Prompt(None, given, None) for given in inputs]  # type: ignore[arg-type]
    places = [(0, i) for i in range(len(prompts))]
    rolled = sample(
        model, prompts, group_size=G, max_new_tokens=LONGEST, temperature=1.0, eos=[-1], suppress=[],
        draws=draws(0, places, G, LONGEST),
    )  # fmt: skip
    oracle, peer = (by_itself(m, inputs, rolled.groups) for m in (copy.deepcopy(model).double(), model))
    for name, got in (("logp", rolled.logp), ("entropy", rolled.entropy)):
        assert_within_error_budget(torch.cat(got), oracle[name].double(), peer[name], name=name)


def by_itself(
    model: Any, inputs: list[dict[str, Any]], groups: list[list[list[int]]]
) -> dict[str, torch.Tensor]:
    """Statistics from a pass of one completion each."""
    given = [{k: v.to(model.dtype) if k.startswith("pixel") else v for k, v in i.items()} for i in inputs]
    with torch.no_grad():
        found = rc.Scorer(model, packing="plain").token_stats(given, groups, want=("logp", "entropy"))
    flat = [stats for group in found for stats in group]
    return {name: torch.cat([getattr(s, name) for s in flat]) for name in ("logp", "entropy")}


@pytest.mark.parametrize("family", TEXT)
def test_text(family: str) -> None:
    agree(
        text_model(family, **TEXT[family]), [text_prompt(12), text_prompt(9, seed=1), text_prompt(3, seed=2)]
    )


@pytest.mark.parametrize("family", VISION)
def test_videos_images_and_text_together(family: str) -> None:
    model = vision_model(family)
    agree(
        model,
        [
            media_prompt(model, videos=[(6, 4, 4)]),
            media_prompt(model, images=[(1, 4, 8)], seed=1),
            media_prompt(model, videos=[(4, 4, 4)], images=[(1, 4, 4)], seed=2),
            text_prompt(7, seed=3),
        ],
    )


@pytest.mark.filterwarnings("ignore:raise_core.Scorer runs each completion by itself")
def test_models_that_cannot_be_packed_are_sampled_prompt_by_prompt() -> None:
    agree(text_model("OPT", ffn_dim=64, word_embed_proj_dim=32), [text_prompt(12), text_prompt(9, seed=1)])


def test_a_model_with_a_cache_of_its_own_is_refused() -> None:
    model = text_model("Mamba", "eager", state_size=4, intermediate_size=64)
    with pytest.raises(UserError, match=r"MambaForCausalLM keeps what it has read.*engine=vllm"):
        agree(model, [text_prompt(12)])


@pytest.mark.filterwarnings("ignore:raise_core.Scorer runs each completion by itself")
def test_an_attention_without_tree_masks_runs_each_prompt_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashAttention: it takes a mask of padding, and no other. One pass a prompt, all grow together."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.setitem(functions._global_mapping, "other", functions["sdpa"])
    passes = list[int]()
    lay_out = prefill.lay_out
    monkeypatch.setattr(prefill, "lay_out", lambda parts: passes.append(len(parts)) or lay_out(parts))
    for model in (text_model("Llama"), vision_model("Qwen2_5_VL")):
        model.set_attn_implementation("other")
        text = [text_prompt(12), text_prompt(9, seed=1)]
        agree(model, [*text, media_prompt(model, videos=[(4, 4, 4)])] if hasattr(model, "visual") else text)
    assert set(passes) == {1}
