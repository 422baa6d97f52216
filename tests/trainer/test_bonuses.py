"""Bonuses in the trainer: form, likely answers, frames in order; how frames are shuffled."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

import raise_core as rc
from raise_core.bonuses import consistency_bonus
from raise_trainer import tiny, world
from raise_trainer.clips import write_mp4
from raise_trainer.data import Row
from raise_trainer.errors import UserError
from raise_trainer.grpo import Grpo
from raise_trainer.method import Method
from raise_trainer.prompts import Prompt, PromptBuilder
from raise_trainer.rescore import score_file
from raise_trainer.rollout import Rollout, draws
from raise_trainer.scoring import Scored, score
from raise_trainer.temporal import Shuffled, shuffled, with_bonus
from raise_trainer.train_config import check
from tests.budget import assert_as_exact_as_fp32, assert_exact

G, LONGEST = 4, 5
RIGHT = "<think>the colour is green</think><answer>B</answer>"
WRONG = "<think>the colour is red</think><answer>A</answer>"
BARE = "the colour is green<answer>B</answer>"


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny.build_processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return tiny.build_model(processor, seed=0).eval()


@pytest.fixture(scope="module")
def prompts(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """A question about a video, one about nothing, and another about the video."""
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    write_mp4(path, world.render(world.draw_scene(random.Random(0), "move")), world.FPS)
    options, answer = tuple(world.options_of("colour")), "<answer>B</answer>"
    kind = "multiple choice"
    rows = [
        Row(0, "What colour?", "video", kind, options, answer, path, "demo/colour"),
        Row(1, "What colour?", "text", kind, options, answer, None, "demo/colour"),
        Row(2, "Which colour?", "video", kind, options, answer, path, "demo/colour"),
    ]
    builder = PromptBuilder(processor, frames=8, max_length=400)
    return [builder(row) for row in rows]


def rolled(processor: Any, prompts: list[Prompt], *groups: tuple[str, ...]) -> Rollout:
    completions = [processor.tokenizer(t)["input_ids"] for group in groups for t in group]
    none = [torch.zeros(len(c)) for c in completions]
    owner = [p for p, group in enumerate(groups) for _ in group]
    return Rollout(list(prompts[: len(groups)]), completions, none, none, owner)


def scored(rollout: Rollout, model: Any, processor: Any, **other: Any) -> Scored:
    method = Method(group_size=G, max_new_tokens=28, reward="accuracy", **other)
    eos = [processor.tokenizer.eos_token_id]
    return score(rollout, rc.Scorer(model), processor.tokenizer, method, eos=eos)


@pytest.mark.parametrize("frames", [6, 5, 3])
@pytest.mark.parametrize("kind", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
def test_shuffled_patches_are_those_of_shuffled_frames(kind: Any, frames: int, prompts: list[Prompt]) -> None:
    """Bit for bit what the model's own processor makes of the frames in that order, odd numbers too."""
    worker = kind(size={"shortest_edge": 32 * 32, "longest_edge": 1 << 20})
    pixels = torch.randint(0, 256, (frames, 3, 64, 96), dtype=torch.uint8)

    def made(of: torch.Tensor) -> dict[str, Any]:
        return dict(worker(videos=[of], do_sample_frames=False, return_tensors="pt"))

    config = SimpleNamespace(patch_size=worker.patch_size, temporal_patch_size=worker.temporal_patch_size)
    prompt = replace(prompts[0], inputs=made(pixels), thumbnails=pixels.permute(0, 2, 3, 1))
    mixed = shuffled(
        prompt,
        SimpleNamespace(config=SimpleNamespace(vision_config=config)),
        torch.Generator().manual_seed(3),
    )
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(3))
    assert order.tolist() != list(range(frames))
    want = made(pixels[order])
    assert_exact(mixed.inputs["pixel_values_videos"], want["pixel_values_videos"], name="patches")
    assert_exact(mixed.inputs["video_grid_thw"], want["video_grid_thw"], name="grid")
    assert mixed.thumbnails is not None
    assert_exact(mixed.thumbnails, prompt.thumbnails[order], name="thumbnails")
    assert_exact(prompt.inputs["pixel_values_videos"], made(pixels)["pixel_values_videos"], name="the prompt")


def test_a_model_with_other_video_inputs_is_refused(prompts: list[Prompt]) -> None:
    for config in (SimpleNamespace(), SimpleNamespace(vision_config=SimpleNamespace(patch_size=14))):
        with pytest.raises(UserError, match="bonus t-grpo: needs a model with the video inputs of Qwen2-VL"):
            shuffled(prompts[0], SimpleNamespace(config=config), torch.Generator())


def test_order_and_draws_follow_from_the_prompts_own_draws(prompts: list[Prompt], model: Any) -> None:
    """Whatever shares the batch; another step has others. Prompts without a video are not asked again."""
    taken = draws(7, [(3, i) for i in range(3)], G, LONGEST)
    whole = Shuffled.of(prompts, taken, G, model)
    assert whole.index == [0, 2] and whole.draws.shape == (2 * (G // 2), LONGEST)
    assert [p.row for p in whole.prompts] == [prompts[0].row, prompts[2].row]
    alone = Shuffled.of(prompts[2:], taken[2 * G :], G, model)
    assert_exact(alone.draws, whole.draws[G // 2 :], name="draws")
    key = "pixel_values_videos"
    assert_exact(alone.prompts[0].inputs[key], whole.prompts[1].inputs[key], name="patches")
    later = Shuffled.of(prompts, draws(7, [(4, i) for i in range(3)], G, LONGEST), G, model)
    assert not torch.equal(later.draws, whole.draws) and not torch.isin(whole.draws, taken).any()
    assert not torch.equal(later.prompts[0].inputs[key], whole.prompts[0].inputs[key])
    assert Shuffled.of([], taken[:0], G, model).prompts == []


def test_right_answers_gain_where_the_order_helps(prompts: list[Prompt], processor: Any, model: Any) -> None:
    """Prompt 0 keeps its accuracy of 1/2 against 1/2; prompt 2 falls behind 1; prompt 1 has no video."""
    rollout = rolled(processor, prompts, *[(RIGHT, WRONG, RIGHT, WRONG)] * 3)
    before = scored(rollout, model, processor)
    other = rolled(processor, [prompts[0], prompts[2]], (RIGHT, WRONG), (RIGHT, RIGHT))
    after = with_bonus(before, rollout, [0, 2], other, processor.tokenizer, 0.25)
    assert after.reward.tolist() == [1.25, 0, 1.25, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    figures = {k: v for k, v in after.metrics.items() if v != before.metrics.get(k)}
    assert figures.keys() == {"reward_mean", "t_grpo_share", "shuffled_text_score_mean"}
    assert figures["shuffled_text_score_mean"] == 0.75
    assert_as_exact_as_fp32(figures["reward_mean"], 6.5 / 12, name="reward_mean")
    assert_as_exact_as_fp32(figures["t_grpo_share"], 2 / 12, name="t_grpo_share")
    none = with_bonus(before, rollout, [], rolled(processor, []), processor.tokenizer, 0.25)
    assert_exact(none.reward, before.reward, name="reward")
    assert none.metrics["t_grpo_share"] == none.metrics["shuffled_text_score_mean"] == 0.0


def test_the_form_and_likely_answers_are_rewarded(prompts: list[Prompt], processor: Any, model: Any) -> None:
    rollout = rolled(processor, prompts, (RIGHT, WRONG, BARE, RIGHT), (RIGHT, WRONG, WRONG, BARE))
    plain = scored(rollout, model, processor)
    assert "grpo_care_share" not in plain.metrics
    formed = scored(rollout, model, processor, bonus={"format": 0.25})
    assert (formed.reward - plain.reward).tolist() == [0.25, 0.25, 0, 0.25, 0.25, 0.25, 0.25, 0]
    care = scored(rollout, model, processor, bonus={"grpo-care": 0.5})
    stats = [s for group in rc.Scorer(model).token_stats(rollout.inputs, rollout.groups) for s in group]
    spans = [s.logp.detach()[f.start : f.stop] for s, f in zip(stats, care.found, strict=True)]
    offsets = torch.tensor([0, *map(len, spans)]).cumsum(0)
    want = consistency_bonus(torch.cat(spans), offsets, plain.score, torch.tensor(rollout.owner))
    assert 0 < want.count_nonzero() <= plain.score.count_nonzero()
    assert_exact(care.reward, plain.reward + want, name="reward")
    assert care.metrics["grpo_care_share"] == int(want.count_nonzero()) / len(want)


def test_a_step_learns_from_the_frames_in_order_alone(
    prompts: list[Prompt], processor: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G completions of each prompt, G // 2 on each shuffled video; the step is the same but for the bonus."""
    sampled = list[Rollout]()
    inner, tokenizer = Grpo._sample, processor.tokenizer

    def kept(*args: Any) -> Rollout:
        sampled.append(inner(*args))
        return sampled[-1]

    monkeypatch.setattr(Grpo, "_sample", kept)
    monkeypatch.setattr(Row, "text_score", lambda self, text: 0.5)  # of what is sampled on shuffled frames

    def step(**bonus: float) -> Any:
        mine = tiny.build_model(processor, seed=0)
        method = Method(group_size=G, max_new_tokens=LONGEST, bonus=bonus)
        grpo = Grpo(
            mine, rc.PolicyReference(mine), torch.optim.SGD(mine.parameters(), lr=0.0), tokenizer, method,
            eos=[tokenizer.eos_token_id], suppress=tokenizer.convert_tokens_to_ids(list(tiny.MEDIA)),
        )  # fmt: skip
        return grpo.step(prompts, draws(0, [(0, i) for i in range(3)], G, LONGEST), 0)

    plain, bonus = step(), step(**{"t-grpo": 0.3})
    assert [len(r.completions) for r in sampled] == [3 * G, 3 * G, 2 * (G // 2)]
    assert bonus.rollout.completions == plain.rollout.completions
    assert bonus.figures.keys() - plain.figures.keys() == {"t_grpo_share", "shuffled_text_score_mean"}
    assert bonus.figures["shuffled_text_score_mean"] == 0.5


@pytest.mark.parametrize(
    "bonus, size, message",
    [
        ({"formt": 0.1}, 4, "bonus: got 'formt', wanted format, t-grpo, grpo-care"),
        ({"format": -0.1}, 4, "bonus format: got -0.1"),
        ({"grpo-care": float("nan")}, 4, "bonus grpo-care: got nan"),
        ({"t-grpo": 0.3}, 1, "bonus t-grpo: needs a group_size of 2"),
    ],
)
def test_senseless_bonuses_are_refused(bonus: Any, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Method(group_size=size, max_new_tokens=5, bonus=bonus)


def test_a_file_of_completions_has_no_shuffled_frames(tmp_path: Path) -> None:
    settings = check({"model": "m", "data": "d.json", "out": tmp_path, "bonus": {"t-grpo": 0.3}})
    with pytest.raises(UserError, match="bonus t-grpo: needs completions on shuffled frames"):
        score_file(tmp_path / "completions.jsonl", settings)
