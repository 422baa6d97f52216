"""Rewards from a packed group, and several candidate answers after one text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_core.scoring import scorer as scorer_module
from tests.budget import assert_exact, assert_within_error_budget
from tests.small_tokenizers import byte_level
from tests.tiny_models import text_model, text_prompt

TEXTS = [
    "<think>the blue ball moves left</think><answer>B</answer>",
    "<think>you see</think><answer>blue ball</answer> and more text after the answer",
    "<think>no answer at all",
    "<answer>A</answer>",
]
SCORE = [1.0, 0.4, 1.0, 0.0, 0.5, 0.0, 0.3, 1.0]
STRICT = [True] * 4 + [False] * 4


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model("Llama", vocab_size=400)


PROMPTS = [text_prompt(11), text_prompt(6, 2)]
COMPLETIONS = [[byte_level().encode(text).ids for text in TEXTS] for _ in PROMPTS]
FLAT = [ids for group in COMPLETIONS for ids in group]


@contextmanager
def fed(model: Any) -> Iterator[list[int]]:
    """Tokens of each pass of the decoder."""
    lengths: list[int] = []

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        x = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        lengths.append(x.shape[1])

    hook = model.model.register_forward_pre_hook(look, with_kwargs=True)
    yield lengths
    hook.remove()


def by_logits(model: Any) -> rc.Rewards:
    """The same rewards from the logits of one pass for each completion."""
    model = model.double()
    logits, first, start = [], [], 0
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
        for ids in group:
            whole = torch.cat([prompt["input_ids"], torch.tensor([ids])], 1)
            with torch.no_grad():
                logits.append(model(input_ids=whole).logits[0])
            first.append(start + prompt["input_ids"].shape[1] - 1)
            start += whole.shape[1]
    model.float()
    found = rc.find_answer_spans(FLAT, byte_level())
    spans = rc.build_spans(found, FLAT, first, [0] * 4 + [1] * 4)
    return rc.confidence_rewards(spans, torch.tensor(SCORE), torch.tensor(STRICT), logits=torch.cat(logits))


@pytest.mark.parametrize("packing", ["auto", "suffix"])
def test_rewards_are_those_of_the_whole_logits(model: Any, packing: str) -> None:
    got = rc.Scorer(model, packing=packing).rewards(PROMPTS, COMPLETIONS, SCORE, STRICT, byte_level())
    plain = rc.Scorer(model, packing="plain").rewards(PROMPTS, COMPLETIONS, SCORE, STRICT, byte_level())
    oracle = by_logits(model)
    for name in ("reward", "confidence"):
        want = getattr(oracle, name).double()
        assert_within_error_budget(getattr(got, name), want, getattr(plain, name), name=name)
    assert got.reward[2] == got.reward[3] == got.confidence[2] == 0 < got.confidence[3]
    assert torch.equal(got.parts["group"], oracle.parts["group"])


def test_only_answers_reach_the_model_and_the_head(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    inner = scorer_module.confidence_rewards

    def look(spans: rc.Spans, *args: Any, hidden: Tensor, **options: Any) -> rc.Rewards:
        rows.append(hidden.shape[0])
        return inner(spans, *args, hidden=hidden, **options)

    monkeypatch.setattr(scorer_module, "confidence_rewards", look)
    found = rc.find_answer_spans(FLAT, byte_level())
    scorer = rc.Scorer(model, self_check=False)
    with fed(model) as lengths:
        scorer.rewards(PROMPTS, COMPLETIONS, SCORE, STRICT, byte_level())
    assert rows == [sum(len(f) for f in found)]
    # A completion is fed up to its answer's last token, which itself is not fed; the third has no answer.
    prompts = sum(p["input_ids"].shape[1] for p in PROMPTS)
    assert lengths == [prompts + sum(f.stop - 1 for f in found if len(f))]


def test_wrong_answers_are_scored_when_someone_reads_them(model: Any) -> None:
    scorer = rc.Scorer(model)

    def rewards(**options: Any) -> rc.Rewards:
        return scorer.rewards(PROMPTS, COMPLETIONS, SCORE, STRICT, byte_level(), **options)

    full = rewards()
    wrong = torch.tensor([s == 0 for s in SCORE])
    for options in ({"score_wrong": True, "needed_by": []}, {"needed_by": ["evaluation"]}):
        assert_exact(rewards(**options).confidence, full.confidence, name="scored")
    for options in ({"score_wrong": False}, {"needed_by": ()}):
        got = rewards(**options)
        assert torch.equal(got.confidence.isnan(), wrong) and not full.confidence.isnan().any()
        assert torch.equal(got.parts["length"] == 0, wrong | (full.parts["length"] == 0))
        assert (got.reward[wrong] == 0).all()
        assert_within_error_budget(
            got.reward, by_logits(model).reward.double(), full.reward, name="the others' rewards"
        )
    with fed(model) as lengths:
        scorer.rewards(PROMPTS, COMPLETIONS, [0.0] * 8, STRICT, byte_level(), needed_by=())
    assert lengths == []
    with pytest.raises(ValueError, match="score_wrong"):
        rewards(score_wrong="never")
    with pytest.raises(TypeError, match="needed_by"):
        rewards(needed_by="logging")


def test_rewards_options_and_found_spans(model: Any) -> None:
    scorer = rc.Scorer(model)
    found = [rc.Found(0, min(2, len(ids)), "x") for ids in FLAT]
    got = scorer.rewards(PROMPTS, COMPLETIONS, SCORE, STRICT, byte_level(), found=found, eta=0.0, lam=0.0)
    stats = scorer.token_stats(PROMPTS, [[ids[:2] for ids in group] for group in COMPLETIONS])
    logp = torch.cat([s.logp for group in stats for s in group if s.logp is not None])
    assert_exact(got.parts["logp"], logp, name="the given spans")
    offsets = torch.nn.functional.pad(got.parts["length"].cumsum(0), (1, 0))
    product = rc.scre(logp, offsets, eta=0.0, lam=0.0)
    assert_exact(got.confidence[:4], product[:4], name="the options")
    for name, wrong in (
        ("score", {"score": [1.0]}),
        ("strict", {"strict": [True]}),
        ("found", {"found": []}),
    ):
        given = {"score": SCORE, "strict": STRICT, **wrong}
        with pytest.raises(ValueError, match=f"{name}: got"):
            scorer.rewards(PROMPTS, COMPLETIONS, tokenizer=byte_level(), **given)


@pytest.mark.parametrize("packing", ["packed", "suffix", "plain"])
def test_candidates_follow_the_prompt_or_a_text(model: Any, packing: str) -> None:
    """Each text is run once for its answers, and gives what text + answer gives as a completion."""
    scorer = rc.Scorer(model, packing=packing, self_check=False)
    options = [[[5, 6, 7], [8], []], [[9, 10]]]
    texts = [[[20, 21, 22], [], [30]], [[40, 41]]]
    with fed(model) as lengths:
        got = scorer.candidates(PROMPTS, options, after=texts)
    if packing == "packed":
        trunk = sum(len(t) for group in texts for t in group)
        assert lengths == [17 + trunk + 3 * 2 + 1]
    ours, oracle, peer = [], [], []
    for p, prompt in enumerate(PROMPTS):
        for t, text in enumerate(texts[p]):
            for k, answer in enumerate(options[p]):
                logp = got[p][t][k].logp
                assert logp is not None and len(logp) == len(answer)
                ours.append(logp)
                oracle.append(own_logp(model, prompt, text + answer, torch.float64)[len(text) :])
                peer.append(own_logp(model, prompt, text + answer, torch.float32)[len(text) :])
    assert_within_error_budget(torch.cat(ours), torch.cat(oracle), torch.cat(peer), name="candidates")
    bare = scorer.candidates(PROMPTS, options, want=("logp", "entropy"))
    assert [len(x) for x in bare] == [1, 1] and [len(x[0]) for x in bare] == [3, 1]
    first = scorer.token_stats(PROMPTS, options, want=("entropy",))[0][0].entropy
    assert first is not None and bare[0][0][0].entropy is not None
    assert_exact(bare[0][0][0].entropy, first, name="the prompt's own")


def own_logp(model: Any, prompt: dict[str, Tensor], ids: list[int], dtype: torch.dtype) -> Tensor:
    whole = torch.cat([prompt["input_ids"], torch.tensor([ids], dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model.to(dtype)(input_ids=whole).logits[0, prompt["input_ids"].shape[1] - 1 : -1]
    model.float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0]
