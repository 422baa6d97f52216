"""Scores of steps and of what they do for the reference answer, against the model's own forward pass."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import raise_core as rc
from raise_core.chain import BAD, END, GOOD, STEP_CLOSE, STEP_TAG, StepTokens, TaggedChain, tag_steps
from raise_core.scoring.step_scorer import LEAD
from raise_trainer.chain_tokens import add_chain_tokens
from tests.budget import HALF_ULP, assert_exact, assert_within_error_budget, close_to, no_better_than
from tests.small_tokenizers import EOS, byte_level
from tests.tiny_models import media_prompt, text_model, vision_model

STEPS = [rc.Step("look", "a ball", "seen"), rc.Step("then", "blue", "as said"), rc.Step("so", "B", "yes")]


@cache
def world(family: str = "Qwen2") -> tuple[Any, Any]:
    """A tiny model with the chain's tokens, and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(byte_level()).from_str(byte_level().to_str()), eos_token=EOS
    )
    other = {"attention": "eager", "final_logit_softcapping": 3.0} if family == "Gemma2" else {}
    model = text_model(family, vocab_size=len(tokenizer), max_position_embeddings=4096, **other)
    add_chain_tokens(model, tokenizer)
    return model, tokenizer


def case(tokenizer: Any) -> tuple[list[dict[str, Any]], list[list[list[int]]]]:
    """Two prompts; chains of three steps, of one, without an answer, and no chain at all."""
    prompts = [tokenizer(text, return_tensors="pt") for text in ("which ball moves", "where")]
    texts = [
        [rc.format_chain(STEPS, "B"), rc.format_chain(STEPS[:1], "A") + EOS],
        [rc.format_chain(STEPS[:2], "C").partition(END)[0], "no idea" + EOS],
    ]
    ids = [[tokenizer(t, add_special_tokens=False)["input_ids"] for t in group] for group in texts]
    return [dict(p) for p in prompts], ids


def separate(model: Any, prompts: Any, tagged: Any, tokens: StepTokens) -> Tensor:
    """z[good] - z[bad] at every tag, each completion by the model's own forward pass."""
    margins = []
    for prompt, group in zip(prompts, tagged, strict=True):
        for chain in group:
            whole = torch.cat([prompt["input_ids"], torch.tensor([chain.ids])], 1)
            z = model(input_ids=whole).logits[0, prompt["input_ids"].shape[1] :][list(chain.positions)]
            margins.append(z[:, tokens.good] - z[:, tokens.bad])
    return torch.cat(margins)


@pytest.mark.parametrize("packing", ["packed", "plain"])
@pytest.mark.parametrize("family", ["Qwen2", "Gemma2"])
def test_margins_and_gradients_are_those_of_passes_of_their_own(family: str, packing: str) -> None:
    model, tokenizer = world(family)
    prompts, completions = case(tokenizer)
    scorer = rc.StepScorer(rc.Scorer(model, packing=packing), tokenizer)
    tagged = scorer.tag(completions)
    exact = copy.deepcopy(model).double()
    up = torch.linspace(-1, 1, 8)
    found = []
    for one, margins in (
        (exact, separate(exact, prompts, tagged, scorer.tokens)),
        (model, separate(model, prompts, tagged, scorer.tokens)),
        (model, scorer.margins(prompts, tagged)),
    ):
        weights = list(one.parameters())
        grads = torch.autograd.grad(margins, weights, up.to(margins.dtype))
        found.append((margins.detach(), grads))
    (want, slopes), (near, near_slopes), (got, got_slopes) = found
    assert_within_error_budget(got, want, near, name="margins")
    share = max(float((p - w).abs().max() / w.abs().max()) for p, w in zip(near_slopes, slopes, strict=True))
    for a, w, p in zip(got_slopes, slopes, near_slopes, strict=True):
        fair = no_better_than(p, w, share * w.abs().max())
        assert_within_error_budget(a, w, fair, name="gradient")


class Named:
    """A tokenizer of which no more than three ids are known."""

    token_to_id = {STEP_TAG: 7, GOOD: 21, BAD: 22}.get


def test_a_prompt_with_a_video_is_one_pass_for_its_chains() -> None:
    model = vision_model("Qwen2_5_VL")
    prompt = media_prompt(model, videos=[(2, 4, 4)])
    places = (3, 8, 15, 16, 23)
    tagged = [
        TaggedChain(tuple(7 if i in places else first + i for i in range(24)), places, 5, places)
        for first in (30, 60, 90)
    ]
    found = []
    for dtype, packing in (
        (torch.float64, "plain"),
        (torch.float32, "plain"),
        (torch.float32, "packed"),
    ):
        one = copy.deepcopy(model).to(dtype)
        own = prompt | {"pixel_values_videos": prompt["pixel_values_videos"].to(dtype)}
        scorer = rc.StepScorer(rc.Scorer(one, packing=packing), cast("Any", Named()))
        found.append(scorer.margins([own], [tagged]).detach())
    want, near, got = found
    assert_within_error_budget(got, want, near, name="video")
    assert len(set(want.tolist())) == 15


def test_scores_by_completion() -> None:
    model, tokenizer = world()
    prompts, completions = case(tokenizer)
    scorer = rc.StepScorer(rc.Scorer(model), tokenizer, temperature=20.0)
    got = scorer.scores(prompts, completions)
    assert [[len(s.steps) for s in group] for group in got] == [[3, 1], [2, 0]]
    assert [[s.answer is None for s in group] for group in got] == [[False, False], [True, True]]
    with torch.no_grad():
        want = torch.sigmoid(scorer.margins(prompts, scorer.tag(completions))).tolist()
    own = [x for group in got for s in group for x in (*s.steps, *([] if s.answer is None else [s.answer]))]
    assert own == want and len(set(own)) == 7  # two chains begin with the same step
    for group, scores in zip(completions, got, strict=True):
        for ids, found in zip(group, scores, strict=True):
            assert all(tokenizer.decode(ids[:end]).endswith(STEP_CLOSE) for end in found.ends)
    assert got[1][1] == rc.StepScores((), None, ()) and got[1][1].mean == 0.0
    assert got[0][0].mean == sum(got[0][0].steps) / 3


def test_a_chain_beyond_the_context_is_refused() -> None:
    model, tokenizer = world()
    prompts, completions = case(tokenizer)
    scorer = rc.StepScorer(rc.Scorer(model), tokenizer, max_length=40)
    with pytest.raises(ValueError, match=r"completions\[0\]\[0\]: got 3 steps, .* context has 40: shorten"):
        scorer.scores(prompts, completions)
    assert rc.StepScorer(rc.Scorer(model), tokenizer).max_length == 4096
    with pytest.raises(ValueError, match="add_chain_tokens"):
        rc.StepScorer(rc.Scorer(model), byte_level())


@pytest.mark.parametrize("packing", ["packed", "plain"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gold_after_each_step_is_that_of_a_pass_of_its_own(packing: str, reduce: str) -> None:
    model, tokenizer = world()
    prompts, completions = case(tokenizer)
    scorer, gold = rc.Scorer(model, packing=packing), ["B", " blue ball "]
    logp, offsets = rc.gold_logp_after_steps(scorer, prompts, completions, gold, tokenizer, reduce=reduce)
    assert offsets.tolist() == [0, 4, 6, 9, 10]
    exact = copy.deepcopy(model).double()
    want, near = (one_by_one(m, tokenizer, prompts, completions, reduce) for m in (exact, model))
    assert_within_error_budget(logp, want, no_better_than(near, want, HALF_ULP * want.abs()), name=packing)


def test_lead_and_answer_are_tokenised_together() -> None:
    """A token that holds the end of the lead and the answer's beginning is scored."""
    model, tokenizer = world()
    prompt = dict(tokenizer("which ball moves", return_tensors="pt"))
    lead, gold, close = "so blue ", "ball", "</answer>"
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (lead, gold + close)]
    ids = tokenizer(lead + gold + close, add_special_tokens=False)["input_ids"]
    assert ids != [*apart[0], *apart[1]] and ids[:-2] == apart[0][: len(ids) - 2]
    logp, _ = rc.gold_logp_after_steps(
        rc.Scorer(model), [prompt], [[[]]], [gold], tokenizer, lead=lead, close=close, reduce="sum"
    )
    row = torch.cat([prompt["input_ids"], torch.tensor([ids])], 1)
    with torch.no_grad():
        z = model(input_ids=row).logits[0, -3:-1].double().log_softmax(-1)
    want = z.gather(1, torch.tensor(ids[-2:])[:, None]).sum()[None]
    assert_within_error_budget(logp, want, close_to(want, 8), name="together")


def one_by_one(model: Any, tokenizer: Any, prompts: Any, completions: Any, reduce: str) -> Tensor:
    found, tokens = [], StepTokens.of(tokenizer)
    for prompt, group, text in zip(prompts, completions, ("B", "blue ball"), strict=True):
        lead, answer = (tokenizer(t, add_special_tokens=False)["input_ids"]
                        for t in (LEAD, text + "<|answer_end|>"))  # fmt: skip
        for ids, chain in zip(group, tag_steps(group, tokenizer, tokens), strict=True):
            for end in (0, *chain.ends[: chain.steps]):
                row = [*prompt["input_ids"][0].tolist(), *ids[:end], *lead, *answer]
                z = model(input_ids=torch.tensor([row])).logits[0, -len(answer) - 1 : -1]
                each = z.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].detach()
                found.append(each.mean() if reduce == "mean" else each.sum())
    return torch.stack(found)


def test_what_each_step_did_is_progress() -> None:
    model, tokenizer = world()
    prompts, completions = case(tokenizer)
    logp, offsets = rc.gold_logp_after_steps(rc.Scorer(model), prompts, completions, ["B", "A"], tokenizer)
    progress = rc.pacr(logp, offsets)
    assert len(progress.gain) == 6
    first = logp[:4].diff()
    assert_exact(progress.gain[:3], first, name="gain of the first chain")


def test_wrong_references_are_named() -> None:
    model, tokenizer = world()
    prompts, completions = case(tokenizer)
    scorer = rc.Scorer(model)
    with pytest.raises(ValueError, match="gold: got 1, wanted one"):
        rc.gold_logp_after_steps(scorer, prompts, completions, ["B"], tokenizer)
    with pytest.raises(ValueError, match=r"gold\[1\]: got no text"):
        rc.gold_logp_after_steps(scorer, prompts, completions, ["B", " "], tokenizer)
    with pytest.raises(ValueError, match="reduce: got 'max'"):
        rc.gold_logp_after_steps(scorer, prompts, completions, ["B", "A"], tokenizer, reduce="max")


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "steps.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    prm, tokenizer = world()
    prompts, completions = case(tokenizer)
    names: dict[str, Any] = {
        "torch": torch, "prm": prm, "tokenizer": tokenizer, "prompt": prompts[0],
        "completions": completions[0],
    }  # fmt: skip
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and names["chain"].well_formed
    inside = [span.stop - span.start for spans in names["found"] for span in spans]
    assert int((names["by_token"] != 0).sum()) == sum(inside) and len(names["steps"]) == 4
