"""fp32 weights under autocast: groups stay packed, and the first-use checks still see what is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_core.scoring import tree_attention
from raise_core.scoring.backbone import Backbone
from raise_core.scoring.tree_attention import Layout
from tests.budget import assert_exact, assert_within_error_budget, no_better_than
from tests.tiny_models import completions, media_prompt, text_model, text_prompt, vision_model

HALF = torch.bfloat16
FAMILIES = ("Llama", "Gemma2", "Qwen2_5_VL", "Qwen3VL")


def build(family: str) -> tuple[Any, list[Any], list[Any]]:
    if "VL" in family:
        model = vision_model(family)
        prompts = [media_prompt(model, [(6, 4, 4)]), text_prompt(9)]
    else:
        # Gemma 2 scales scores for heads of 256: with heads of 8 its attention would be flat.
        gemma = {"attention": "eager", "query_pre_attn_scalar": 8} if family == "Gemma2" else {}
        model = text_model(family, **gemma)
        prompts = [text_prompt(8), text_prompt(5, 3)]
    return model, prompts, [completions([4, 1, 0, 6], seed=i) for i in range(len(prompts))]


def hidden(scorer: rc.Scorer, prompts: list[Any], found: list[Any]) -> Tensor:
    with torch.no_grad():
        return scorer.completion_rows(prompts, found).hidden


def plain(model: Any) -> rc.Scorer:
    return rc.Scorer(model, packing="plain", self_check=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", ["auto", "suffix"])
def test_groups_are_packed_under_autocast(family: str, packing: str) -> None:
    model, prompts, found = build(family)
    oracle = hidden(plain(copy.deepcopy(model).double()), prompts, found)
    with torch.autocast("cpu", HALF):
        scorer = rc.Scorer(model, packing=packing)
        got, peer = hidden(scorer, prompts, found), hidden(plain(model), prompts, found)
        assert set(scorer.plan(prompts, found)) == {"suffix" if packing == "suffix" else "packed"}
    assert got.dtype == peer.dtype == torch.float32
    assert_within_error_budget(got, oracle, peer, name=f"{family} {packing}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_mask_or_position_is_seen_under_autocast(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, found = build(family)
    true_positions, true_attend, true_dense = (
        Backbone.positions,
        tree_attention.attend,
        tree_attention.dense_mask,
    )

    def late(self: Backbone, prompt: Any, length: int) -> Tensor:
        found = true_positions(self, prompt, length).clone()
        found[:, len(prompt) :] += 1
        return found

    def siblings(layout: Layout) -> Layout:
        """Each completion sees the ones before it."""
        return Layout(layout.lengths, tuple(range(-1, len(layout.lengths) - 1)), layout.cached)

    with monkeypatch.context() as broken, torch.autocast("cpu", HALF):
        broken.setattr(Backbone, "positions", late)
        with pytest.warns(RuntimeWarning, match="disagrees with its plain passes"):
            caught = hidden(rc.Scorer(model), prompts, found)
        assert_exact(caught, hidden(plain(model), prompts, found), name="positions")
    with monkeypatch.context() as broken, torch.autocast("cpu", HALF):
        broken.setattr(tree_attention, "attend", lambda t, *a, **kw: true_attend(siblings(t), *a, **kw))
        broken.setattr("raise_core.scoring.backbone.dense_mask", lambda t, *a: true_dense(siblings(t), *a))
        with pytest.warns(RuntimeWarning, match="disagrees with its plain passes"):
            caught = hidden(rc.Scorer(model), prompts, found)
        assert_exact(caught, hidden(plain(model), prompts, found), name="mask")


def test_another_head_is_refused_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, found = build("Llama")
    true_forward = type(model).forward

    def scaled(self: Any, **inputs: Any) -> Any:
        out = true_forward(self, **inputs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(type(model), "forward", scaled)
    with torch.autocast("cpu", HALF), pytest.raises(ValueError, match="logits differ from its head"):
        rc.Scorer(model).token_stats(prompts, found)


def test_statistics_are_fp32_whatever_autocast_says() -> None:
    model, prompts, found = build("Llama")
    scorer = rc.Scorer(model)
    with torch.autocast("cpu", HALF), torch.no_grad():
        stats = scorer.token_stats(prompts, found)
        rows = scorer.completion_rows(prompts, found)
    got = torch.cat([s.logp for group in stats for s in group if s.logp is not None])
    want = rc.linear_token_stats(rows.hidden, targets=rows.targets, **scorer.head().options()).logp
    assert want is not None and want.dtype == torch.float32
    assert_exact(got, want.detach(), name="logp")


def test_gradients_under_autocast() -> None:
    """As far from fp64 as separate passes under autocast, relative to a weight's size, on any weight."""
    model, prompts, found = build("Llama")

    def gradients(model: Any, scorer: rc.Scorer, enabled: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", HALF, enabled=enabled):
            rows = scorer.completion_rows(prompts, found)
            logp = rc.linear_token_stats(rows.hidden, targets=rows.targets, **scorer.head().options()).logp
        assert logp is not None
        (logp * torch.cos(torch.arange(len(logp)))).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    twin = copy.deepcopy(model).double()
    oracle, peer = gradients(twin, plain(twin), False), gradients(model, plain(model), True)
    got = gradients(model, rc.Scorer(model), True)
    share = max((peer[w] - g).abs().max() / g.abs().max() for w, g in oracle.items() if g.any())
    for weight, want in oracle.items():
        fair = no_better_than(peer[weight], want, share * want.abs().max())
        assert_within_error_budget(got[weight], want, fair, name=weight)
