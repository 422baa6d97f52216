"""What a scorer does at its edges: empty and short completions, broken prompts, unusual models and heads."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raise_core as rc
from raise_core.scoring.check import head_fault
from tests.budget import assert_exact, assert_within_error_budget
from tests.tiny_models import (
    VIDEO_PAD,
    completions,
    media_prompt,
    text_model,
    text_prompt,
    vision_model,
)


@pytest.fixture(scope="module")
def llama() -> Any:
    return text_model("Llama")


@pytest.fixture(scope="module")
def qwen() -> Any:
    return vision_model("Qwen2_5_VL")


def logp(scorer: rc.Scorer, prompts: list[Any], found: list[Any], **options: Any) -> Tensor:
    with torch.no_grad():
        stats = scorer.token_stats(prompts, found, **options)
    return torch.cat([s.logp for group in stats for s in group if s.logp is not None])


def own(model: Any, prompts: list[Any], found: list[Any]) -> Tensor:
    return logp(rc.Scorer(model, packing="plain", self_check=False), prompts, found)


def assert_as_plain(model: Any, prompts: list[Any], found: list[Any], name: str, **options: Any) -> None:
    oracle = own(copy.deepcopy(model).double(), prompts, found)
    got = logp(rc.Scorer(model, **options), prompts, found)
    assert_within_error_budget(got, oracle, own(model, prompts, found), name=name)


@pytest.mark.parametrize("packing", ["auto", "packed", "suffix", "plain"])
def test_nothing_to_score(llama: Any, packing: str) -> None:
    scorer, prompts = rc.Scorer(llama, packing=packing), [text_prompt(5), text_prompt(3)]
    assert scorer.token_stats([], []) == []
    assert scorer.token_stats(prompts, [[], []]) == [[], []]
    stats = scorer.token_stats(prompts, [[[], []], [[]]], want=("logp", "entropy"))
    assert [[(len(s.logp), len(s.entropy)) for s in group] for group in stats] == [[(0, 0)] * 2, [(0, 0)]]
    rows = scorer.completion_rows(prompts, [[[]], []])
    assert rows.hidden.shape == (0, 32) and rows.offsets.tolist() == [0, 0] and rows.group.tolist() == [0]
    got = scorer.rewards(prompts, [[[]], [[]]], [1.0, 0.5], [True, False], None, found=[rc.Found(0, 0)] * 2)
    assert got.reward.tolist() == [0, 0]


@pytest.mark.parametrize("lengths", [[1], [6], [1, 1, 1], [0, 1, 30], [2] * 9])
def test_short_and_unequal_completions(llama: Any, lengths: list[int]) -> None:
    prompts = [text_prompt(5), text_prompt(1)]
    found = [completions(lengths), completions([*lengths, 20], seed=2)]
    for packing in ("packed", "suffix"):
        assert_as_plain(llama, prompts, found, f"{packing} {lengths}", packing=packing, max_tokens=12)


def test_groups_may_differ_in_size(qwen: Any) -> None:
    prompts = [media_prompt(qwen, [(4, 4, 4)]), text_prompt(5), media_prompt(qwen, [], [(1, 4, 4)])]
    assert_as_plain(qwen, prompts, [completions([3]), completions([4, 2, 5]), []], "groups")


@pytest.mark.parametrize("key", ["input_ids", "video_grid_thw"])
def test_a_truncated_prompt_is_refused(qwen: Any, key: str) -> None:
    prompt = media_prompt(qwen, [(4, 4, 4)])
    if key == "input_ids":
        prompt = prompt | {k: prompt[k][:, :10] for k in ("input_ids", "attention_mask")}
    else:
        prompt = {k: v for k, v in prompt.items() if k != key}
    with pytest.raises(ValueError, match=r"prompts\[1\]: got \d+ video tokens, wanted \d+"):
        rc.Scorer(qwen).token_stats([text_prompt(3), prompt], [[[5]], [[5]]])


def test_seconds_cast_to_integers_are_refused(qwen: Any) -> None:
    prompt = {**media_prompt(qwen, [(4, 4, 4)]), "second_per_grid_ts": torch.tensor([0])}
    with pytest.raises(ValueError, match="second_per_grid_ts"):
        rc.Scorer(qwen).token_stats([prompt], [[[5]]])


@pytest.mark.parametrize("packing", ["packed", "suffix", "plain"])
def test_a_generated_media_token_is_text(qwen: Any, packing: str) -> None:
    """Like an ordinary token whose embedding is the placeholder's, in a model that has such a one."""
    prompt, stand_in = media_prompt(qwen, [(4, 4, 4)]), 199
    twin = copy.deepcopy(qwen)
    with torch.no_grad():
        embedding = twin.get_input_embeddings().weight
        embedding[stand_in] = embedding[VIDEO_PAD]
    found = [[5, VIDEO_PAD, 9, VIDEO_PAD, VIDEO_PAD, 7], [VIDEO_PAD], completions([4])[0]]

    def by_twin(model: Any) -> Tensor:
        out = []
        for ids in found:
            fed = torch.tensor([[stand_in if i == VIDEO_PAD else i for i in ids]])
            inputs = {**prompt, "input_ids": torch.cat([prompt["input_ids"], fed], 1)}
            inputs["mm_token_type_ids"] = nn.functional.pad(prompt["mm_token_type_ids"], (0, len(ids)))
            del inputs["attention_mask"]
            with torch.no_grad():
                z = model(**inputs).logits[0, prompt["input_ids"].shape[1] - 1 : -1]
            out.append(torch.log_softmax(z, -1).gather(1, torch.tensor(ids)[:, None])[:, 0])
        return torch.cat(out)

    oracle, peer = by_twin(copy.deepcopy(twin).double()), by_twin(twin)
    got = logp(rc.Scorer(qwen, packing=packing), [prompt], [found])
    assert_within_error_budget(got, oracle, peer, name=packing)


def test_padding_is_dropped_and_inputs_are_not_written(qwen: Any) -> None:
    prompt = media_prompt(qwen, [(4, 4, 4)], [(1, 4, 4)])
    found = [completions([3, 4])]
    before = {k: v.clone() for k, v in prompt.items()}
    want = logp(rc.Scorer(qwen), [prompt], found)
    assert all(torch.equal(before[k], prompt[k]) for k in before)
    padded = {k: nn.functional.pad(prompt[k], (3, 0)) for k in ("input_ids", "attention_mask")}
    assert_exact(logp(rc.Scorer(qwen), [{**prompt, **padded}], found), want, name="padded")
    bare = {k: v for k, v in prompt.items() if k not in ("mm_token_type_ids", "attention_mask")}
    assert_exact(logp(rc.Scorer(qwen), [bare], found), want, name="ids alone")
    lists = {**bare, "input_ids": prompt["input_ids"][0].tolist()}
    assert_exact(logp(rc.Scorer(qwen), [lists], found), want, name="a list of ids")


def test_the_vision_tower_runs_once(qwen: Any) -> None:
    """For each clip of a call, whatever the group's size; not at all with features from before."""
    patches: list[int] = []
    hook = qwen.model.visual.register_forward_pre_hook(lambda _, args: patches.append(args[0].shape[0]))
    prompt, other = media_prompt(qwen, [(4, 4, 4)]), media_prompt(qwen, [(6, 4, 4)], seed=1)
    asked = {**prompt, "input_ids": torch.cat([prompt["input_ids"], torch.tensor([[44]])], 1)}
    asked = {k: v for k, v in asked.items() if k not in ("mm_token_type_ids", "attention_mask")}
    prompts, found = [prompt, asked, other, text_prompt(4)], [completions([3, 4])] * 4
    scorer = rc.Scorer(qwen, self_check=False)
    want = logp(scorer, prompts, found)
    assert patches == [64 + 96]
    with torch.no_grad():
        features = scorer.vision_features(prompts)
    patches.clear()
    pixels = [{k: v for k, v in p.items() if k != "pixel_values_videos"} for p in prompts]
    assert_exact(logp(scorer, pixels, found, features=features), want, name="features")
    plain = rc.Scorer(qwen, packing="plain", self_check=False)
    oracle = own(copy.deepcopy(qwen).double(), prompts, found)
    patches.clear()
    got = logp(plain, pixels, found, features=features)
    assert patches == []
    hook.remove()
    assert_within_error_budget(got, oracle, want, name="plain with features")
    with pytest.raises(ValueError, match="features: got 1"):
        scorer.token_stats(prompts, found, features=features[:1])


@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen3VL"])
def test_the_vision_tower_runs_on_at_most_max_tokens(family: str) -> None:
    """16, 24, 8 + 8 and 4 media tokens, of videos and images; a prompt's own media are never split."""
    model = vision_model(family)
    grids = [[(4, 4, 4)], [(6, 4, 4)], [(2, 4, 4), (2, 4, 4)], [(1, 4, 4)]]
    prompts = [media_prompt(model, own, seed=i) for i, own in enumerate(grids)]
    prompts.append(media_prompt(model, [(2, 4, 4)], [(1, 4, 8), (1, 4, 4)], seed=4))
    tokens: list[int] = []
    hook = model.model.visual.register_forward_pre_hook(lambda _, args: tokens.append(len(args[0]) // 4))
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        oracle, peer = (rc.Scorer(m).vision_features(prompts) for m in (twin, model))
        for room, passes in ((20, [12, 16, 24, 20, 8]), (10, [12, 16, 24, 16, 4, 8]), (1000, [12, 68])):
            tokens.clear()
            got = rc.Scorer(model, max_tokens=room).vision_features(prompts)
            assert tokens == passes
            for g, o, p in zip(got, oracle, peer, strict=True):
                assert g is not None and o is not None and p is not None
                levels = zip((g.rows, *g.deep), (o.rows, *o.deep), (p.rows, *p.deep), strict=True)
                for level, want, fair in levels:
                    assert_within_error_budget(level, want, fair, name=f"{family} {room}")
    hook.remove()


@pytest.mark.parametrize("build", [lambda: text_model("Llama"), lambda: vision_model("Qwen3VL")])
def test_bf16_models(build: Any) -> None:
    model = build()
    prompts = [media_prompt(model, [(6, 4, 4)])] if hasattr(model.model, "visual") else [text_prompt(9)]
    found = [completions([5, 1, 9, 7])]
    half = copy.deepcopy(model).to(torch.bfloat16)
    oracle = own(copy.deepcopy(half).double(), prompts, found)
    peer = own(half, prompts, found)
    for packing in ("packed", "suffix"):
        got = logp(rc.Scorer(half, packing=packing), prompts, found)
        assert got.dtype == torch.float32
        assert_within_error_budget(got, oracle, peer, name=packing)


def test_temperature_divides_the_logits(llama: Any) -> None:
    """Confidence is taken at 1, a policy ratio at the sampling temperature."""
    prompt, ids = text_prompt(6), completions([20])[0]
    whole = torch.cat([prompt["input_ids"], torch.tensor([ids])], 1)

    def at(model: Any, temperature: float) -> Tensor:
        with torch.no_grad():
            z = model(input_ids=whole).logits[0, 5:-1] / temperature
        return torch.log_softmax(z, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    for temperature in (1.0, 0.7):
        got = logp(rc.Scorer(llama), [prompt], [[ids]], temperature=temperature)
        oracle, peer = at(copy.deepcopy(llama).double(), temperature), at(llama, temperature)
        assert_within_error_budget(got, oracle, peer, name=f"temperature {temperature}")


def test_a_sliding_window_is_packed_while_it_covers_everything() -> None:
    model = text_model("Gemma3Text", sliding_window=12, layer_types=["sliding_attention", "full_attention"])
    prompts, short, long = [text_prompt(6)], [completions([4, 5])], [completions([4, 30])]
    assert_as_plain(model, prompts, short, "inside the window")
    scorer = rc.Scorer(model)
    assert scorer.plan(prompts, short) == ["packed"]
    with pytest.warns(UserWarning, match="35 tokens are more than the model's sliding window of 12"):
        assert scorer.plan(prompts, long) == ["plain"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = logp(scorer, prompts, long)
    assert_exact(got, own(model, prompts, long), name="beyond the window")
    with pytest.raises(ValueError, match="sliding window"):
        rc.Scorer(model, packing="packed").plan(prompts, long)


UNPACKED = {
    "Mamba": (
        {"state_size": 4, "intermediate_size": 64, "attention": "eager"},
        "has linear_attention layers",
    ),
    "OPT": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "no rotary positions"),
}


@pytest.mark.parametrize("family", UNPACKED)
def test_other_models_take_the_plain_path_and_say_so_once(family: str) -> None:
    options, why = UNPACKED[family]
    model = text_model(family, **options)
    prompts, found = [text_prompt(6)], [completions([4, 5])]
    scorer = rc.Scorer(model)
    with pytest.warns(UserWarning, match=why):
        got = logp(scorer, prompts, found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_exact(logp(scorer, prompts, found), got, name="again")
    want = []
    for ids in found[0]:
        whole = torch.cat([prompts[0]["input_ids"], torch.tensor([ids])], 1)
        with torch.no_grad():
            want.append(torch.log_softmax(model(input_ids=whole).logits[0, 5:-1], -1)[range(len(ids)), ids])
    assert_within_error_budget(got, torch.cat(want).double(), torch.cat(want), name=family)


def test_an_attention_that_reads_its_mask_is_not_packed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone's replacement of the attention by that name: the self-check sees it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def reading(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        if mask is None:
            mask = torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1)[None, None]
        return eager_attention_forward(module, q, k, v, mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", reading)
    prompts, found = [text_prompt(6)], [completions([4, 5])]
    scorer = rc.Scorer(llama)
    with pytest.warns(RuntimeWarning, match="mask was read by"):
        got = logp(scorer, prompts, found)
    assert scorer.plan(prompts, found) == ["plain"]
    assert_exact(got, own(llama, prompts, found), name="plain")


def test_the_head_is_never_called(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a model whose forward pass was replaced (Liger) scores all the same."""
    prompts, found = [text_prompt(6)], [completions([4, 5])]
    want = logp(rc.Scorer(llama), prompts, found)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the head was called")

    monkeypatch.setattr(llama.lm_head, "forward", refuse)
    monkeypatch.setattr(llama, "forward", refuse)
    oracle = own(copy.deepcopy(llama).double(), prompts, found)
    for packing in ("packed", "plain"):
        got = logp(rc.Scorer(llama, packing=packing, self_check=False), prompts, found)
        assert_within_error_budget(got, oracle, want, name=packing)


def test_a_head_with_a_bias() -> None:
    model = text_model("Phi", partial_rotary_factor=0.5)
    with torch.no_grad():
        nn.init.normal_(model.lm_head.bias)
    assert head_fault(rc.Scorer(model)._engine.backbone) is None
    prompts, found = [text_prompt(6)], [completions([4, 5])]
    whole = torch.cat([prompts[0]["input_ids"], torch.tensor([found[0][0]])], 1)
    with torch.no_grad():
        peer = torch.log_softmax(model(input_ids=whole).logits[0, 5:-1], -1)[range(4), found[0][0]]
        twin = copy.deepcopy(model).double()
        oracle = torch.log_softmax(twin(input_ids=whole).logits[0, 5:-1], -1)[range(4), found[0][0]]
    assert_within_error_budget(logp(rc.Scorer(model), prompts, found)[:4], oracle, peer, name="bias")


@pytest.mark.parametrize("outlier", [1, 40])
def test_the_roundings_of_a_wide_head_are_no_fault(outlier: int) -> None:
    """Partial sums are larger than their terms, the more so where a few hidden units are."""
    model = text_model("Llama", hidden_size=512, num_hidden_layers=1, head_dim=64)
    with torch.no_grad():
        model.model.norm.weight[:4] *= outlier
    assert head_fault(rc.Scorer(model)._engine.backbone) is None
    with torch.no_grad():
        model.lm_head.register_forward_hook(lambda module, inputs, out: out * 1.001)
    assert "logits differ" in str(head_fault(rc.Scorer(model)._engine.backbone))


def test_heads_that_are_more_than_a_matrix_are_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, found = [text_prompt(6)], [completions([4, 5])]
    true_forward = type(llama).forward

    def doubled(self: Any, **inputs: Any) -> Any:
        out = true_forward(self, **inputs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(type(llama), "forward", doubled)
    with pytest.raises(ValueError, match="logits differ from its head"):
        rc.Scorer(llama).token_stats(prompts, found)

    def shortened(self: Any, **inputs: Any) -> Any:
        out = true_forward(self, **inputs)
        out.logits = out.logits[..., :-1]
        return out

    monkeypatch.setattr(type(llama), "forward", shortened)
    with pytest.raises(ValueError, match="logits have 199 columns, its head 200"):
        rc.Scorer(llama).token_stats(prompts, found)
    adapted = copy.deepcopy(llama)
    adapted.lm_head.base_layer = nn.Linear(32, 200)
    with pytest.raises(TypeError, match="language head"):
        rc.Scorer(adapted, self_check=False).token_stats(prompts, found)


def test_a_wrapped_model_and_its_mode(llama: Any) -> None:
    """A PEFT wrapper shows its model by `get_base_model`; training modes are left as they are."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(llama)

        def get_base_model(self) -> Any:
            return self.inner

    wrapper = Wrapper().train()
    wrapper.inner.model.layers[0].eval()
    prompts, found = [text_prompt(6)], [completions([4, 5])]
    got = logp(rc.Scorer(wrapper), prompts, found)
    assert_exact(got, logp(rc.Scorer(llama), prompts, found), name="wrapped")
    assert wrapper.inner.model.layers[1].training and not wrapper.inner.model.layers[0].training


def test_wrong_arguments_are_named(llama: Any) -> None:
    prompt, scorer = text_prompt(4), rc.Scorer(llama)
    for error, match, prompts, found in (
        (TypeError, "prompts: got one", prompt, [[[5]]]),
        (TypeError, r"prompts\[0\]: got int", [3], [[[5]]]),
        (ValueError, r"prompts\[0\]\['input_ids'\]", [{"input_ids": torch.ones(2, 3)}], [[[5]]]),
        (
            ValueError,
            r"prompts\[0\]: got no tokens",
            [{"input_ids": torch.zeros(1, 0, dtype=torch.int64)}],
            [[[5]]],
        ),
        (ValueError, "attention_mask", [prompt | {"attention_mask": torch.ones(1, 3).long()}], [[[5]]]),
        (ValueError, "completions: got 2 groups", [prompt], [[[5]], [[6]]]),
        (TypeError, r"completions\[0\]\[0\]: got 5", [prompt], [[5]]),
    ):
        with pytest.raises(error, match=match):
            scorer.token_stats(prompts, found)
    with pytest.raises(ValueError, match="packing: got 'tree'"):
        rc.Scorer(llama, packing="tree")
    with pytest.raises(ValueError, match="max_tokens: got 0"):
        rc.Scorer(llama, max_tokens=0)
    with pytest.raises(TypeError, match="language head"):
        rc.Scorer(llama.model)
    with pytest.raises(ValueError, match="sampled_logp: got other lengths"):
        scorer.check_sampler([prompt], [[[5, 6]]], [[[0.0]]])
    assert scorer.check_sampler([prompt], [[[]]], [[[]]]).agrees
