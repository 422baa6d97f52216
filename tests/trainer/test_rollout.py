"""One meaning of a sequence: the sampler, the batched forward pass and the model's own forward pass agree.

The weights are scaled up so that positions matter, and a position error is shown to be seen: small random
weights would hide it.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_core.scoring.backbone import Backbone
from raise_trainer import prefill as prefill_module
from raise_trainer import rollout as rollout_module
from raise_trainer import tiny, world
from raise_trainer.clips import write_mp4
from raise_trainer.data import Row
from raise_trainer.errors import BadMedia, BadRow
from raise_trainer.prompts import Prompt, PromptBuilder, target_ids
from raise_trainer.rollout import Rollout, draws, sample
from tests.budget import assert_within_error_budget


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny.build_processor()


@pytest.fixture(scope="module")
def prompts(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    folder, rng = tmp_path_factory.mktemp("clips"), random.Random(0)
    builder = PromptBuilder(processor, frames=world.FRAMES, max_length=400)
    built = []
    for i, task in enumerate(("colour", "count", "describe", "when")):
        kind = next(kind for kind, tasks in world.TASKS_OF.items() if task in tasks)
        write_mp4(folder / f"{i}.mp4", world.render(world.draw_scene(rng, kind)), world.FPS)
        built.append(builder(make_row(folder / f"{i}.mp4", task)))
    return built


def make_row(path: Path, task: str, **other: Any) -> Row:
    options = tuple(world.options_of(task))
    kind = world.PROBLEM_TYPE[task]
    return Row(
        0, other.pop("problem", world.QUESTION[task]), "video", kind, options, "x", path, "demo", **other
    )


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    model = tiny.build_model(processor, seed=0).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.5
    return model


def rollout(model: Any, prompts: list[Prompt], processor: Any, seed: int = 0, eos: int = -1) -> Rollout:
    tokenizer = processor.tokenizer
    return sample(
        model, prompts, group_size=3, max_new_tokens=12, temperature=1.0, eos=[eos],
        suppress=tokenizer.convert_tokens_to_ids(list(tiny.MEDIA)),
        draws=draws(seed, [(0, i) for i in range(len(prompts))], 3, 12),
    )  # fmt: skip


def scored(model: Any, rolled: Rollout) -> torch.Tensor:
    stats = rc.Scorer(model).token_stats(rolled.inputs, rolled.groups)
    return torch.cat([s.logp.detach() for group in stats for s in group])


def by_the_model_itself(model: Any, rolled: Rollout) -> torch.Tensor:
    out = []
    for ids, p in zip(rolled.completions, rolled.owner, strict=True):
        prompt = rolled.prompts[p]
        kinds = (prompt.ids == model.config.video_token_id).int() * 2
        logits = model(
            input_ids=torch.cat([prompt.ids, torch.tensor(ids)])[None],
            mm_token_type_ids=torch.cat([kinds, torch.zeros(len(ids), dtype=torch.int)])[None],
            pixel_values_videos=prompt.inputs["pixel_values_videos"].to(model.dtype),
            video_grid_thw=prompt.inputs["video_grid_thw"],
            second_per_grid_ts=torch.tensor(prompt.inputs["second_per_grid_ts"]),
        ).logits[0, len(prompt.ids) - 1 : -1]
        out.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0].detach())
    return torch.cat(out)


def test_sampler_batch_and_model_agree(model: Any, prompts: list[Prompt], processor: Any) -> None:
    drawn = rollout(model, prompts, processor).completions
    rolled = rollout(model, prompts, processor, eos=drawn[4][3])  # an end that this random model does draw
    assert rolled.completions[4][-1] == drawn[4][3] and drawn[4][3] not in rolled.completions[4][:-1]
    assert len(set(map(len, rolled.completions))) > 1 and len({len(p.ids) for p in prompts}) > 1
    own = by_the_model_itself(model, rolled)
    oracle = by_the_model_itself(tiny_double(model), rolled)
    assert_within_error_budget(torch.cat(rolled.logp), oracle, own, name="sampler")
    assert_within_error_budget(scored(model, rolled), oracle, own, name="scorer")


def tiny_double(model: Any) -> Any:
    copy = type(model)(model.config).double().eval()
    copy.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    return copy


def test_a_wrong_position_would_be_seen(
    model: Any, prompts: list[Prompt], processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch.cat(rollout(model, prompts, processor).logp)
    true_positions = Backbone.positions

    def from_lengths(backbone: Backbone, prompt: Any, length: int) -> torch.Tensor:
        positions = true_positions(backbone, prompt, length).clone()
        positions[:, len(prompt) :] = torch.arange(len(prompt), length)
        return positions

    monkeypatch.setattr(Backbone, "positions", from_lengths)
    rolled = rollout(model, prompts, processor)
    monkeypatch.undo()
    own = by_the_model_itself(model, rolled)
    assert (torch.cat(rolled.logp) - own).abs().max() > 0.1
    assert len(right) == len(own)


def test_the_clip_matters_and_is_shared(model: Any, prompts: list[Prompt], processor: Any) -> None:
    """Two prompts of one clip: its pixels are encoded once, and each has the result it has alone."""
    other = {name: prompts[0].inputs[name] for name in prompts[0].inputs if name != "input_ids"}
    shared = Prompt(prompts[1].row, prompts[1].inputs | other, prompts[0].thumbnails)
    encoded = []
    encode = model.model.get_video_features
    model.model.get_video_features = lambda pixels, grid: encoded.append(len(grid)) or encode(pixels, grid)
    try:
        logp = [torch.cat(rollout(model, some, processor).logp) for some in ([prompts[0], shared], [shared])]
    finally:
        del model.model.get_video_features
    assert encoded == [1, 1]
    apart = rollout(model, [prompts[1]], processor)
    assert not torch.equal(logp[1][: len(apart.logp[0])], apart.logp[0])


def test_several_passes_are_one(model: Any, prompts: list[Prompt], processor: Any, monkeypatch: Any) -> None:
    """Prompts that exceed a pass are run in several; nothing else changes."""
    together = rollout(model, prompts, processor)
    monkeypatch.setattr(prefill_module, "MAX_TOKENS", 40)
    apart = rollout(model, prompts, processor)
    assert apart.completions == together.completions
    own = by_the_model_itself(model, together)
    oracle = by_the_model_itself(tiny_double(model), together)
    assert_within_error_budget(torch.cat(apart.logp), oracle, own, name="several passes")


def test_rows_that_have_ended_leave_the_batch(
    model: Any, prompts: list[Prompt], processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model sees fewer rows as completions end, and those that go on are as right as before."""
    monkeypatch.setattr(rollout_module, "SHRINK", 0.99)
    drawn = rollout(model, prompts, processor).completions
    ends = max({t for c in drawn for t in c}, key=lambda t: sum(t in c[:6] for c in drawn))
    rows = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    rolled = rollout(model, prompts, processor, eos=ends)
    hook.remove()
    assert rows[-1] < 12, "no row has left: the case is not tested"
    own = by_the_model_itself(model, rolled)
    oracle = by_the_model_itself(tiny_double(model), rolled)
    assert_within_error_budget(torch.cat(rolled.logp), oracle, own, name="log-probabilities")
    assert [len(x) for x in rolled.entropy] == [len(c) for c in rolled.completions]
    assert all(len(c) == 12 or c[-1] == ends for c in rolled.completions)


def test_sampling_repeats_with_its_seed_and_never_draws_media(
    model: Any, prompts: list[Prompt], processor: Any
) -> None:
    first, again, other = (rollout(model, prompts, processor, seed) for seed in (0, 0, 1))
    assert first.completions == again.completions != other.completions
    media = set(processor.tokenizer.convert_tokens_to_ids(list(tiny.MEDIA)))
    assert not media & {t for c in first.completions for t in c}
    assert first.owner == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_greedy_takes_the_best_token(model: Any, prompts: list[Prompt], processor: Any) -> None:
    tokenizer = processor.tokenizer
    rolled = sample(
        model, prompts[:1], group_size=2, max_new_tokens=4, temperature=0.0, eos=[tokenizer.eos_token_id],
        suppress=[], draws=None,
    )  # fmt: skip
    rows = rc.Scorer(model).completion_rows(rolled.inputs, rolled.groups)
    assert model.lm_head(rows.hidden).argmax(-1).tolist() == [t for c in rolled.completions for t in c]


def test_a_prompt_longer_than_the_context_is_refused(processor: Any, prompts: list[Prompt]) -> None:
    builder = PromptBuilder(processor, frames=8, max_length=30)
    with pytest.raises(BadRow, match=r"row 0: the prompt has \d+ tokens, the context leaves 30"):
        builder(prompts[0].row)


def test_a_question_that_holds_the_media_token_is_refused(processor: Any, prompts: list[Prompt]) -> None:
    builder = PromptBuilder(processor, frames=8, max_length=400)
    with pytest.raises(BadRow, match="media token"):
        builder(make_row(prompts[0].row.path, "colour", problem="<|video_pad|> what?"))


def test_a_missing_video_is_refused(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(BadMedia, match="No such file"):
        PromptBuilder(processor, frames=8, max_length=400)(make_row(tmp_path / "none.mp4", "colour"))


def test_the_target_is_chain_then_answer_then_end(processor: Any, tmp_path: Path) -> None:
    row = make_row(tmp_path, "colour", process="<think>the colour is red</think>")
    tokenizer = processor.tokenizer
    assert tokenizer.decode(target_ids(row, tokenizer)) == "<think>the colour is red</think>x<|im_end|>"
    with pytest.raises(BadRow, match="no `process`"):
        target_ids(make_row(tmp_path, "colour"), tokenizer)
