"""One meaning of a sequence: the sampler, the batched forward pass and the model's own forward pass agree.

The weights are scaled up so that positions matter, and a position error is shown to be seen: small random
weights would hide it.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from raise_trainer import forward as forward_module
from raise_trainer import tiny, world
from raise_trainer.clips import write_mp4
from raise_trainer.data import Row
from raise_trainer.errors import BadMedia, BadRow
from raise_trainer.forward import forward
from raise_trainer.prompts import Prompt, PromptBuilder, target_ids
from raise_trainer.rollout import Rollout, sample
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
        model, prompts, group_size=3, max_new_tokens=12, temperature=1.0, eos=eos,
        suppress=tokenizer.convert_tokens_to_ids(list(tiny.MEDIA)),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def scored(model: Any, rolled: Rollout) -> torch.Tensor:
    hidden = forward(model, rolled.prompts, rolled.completions, rolled.owner)
    logits = model.lm_head(hidden.states[hidden.completion_rows(rolled.completions)])
    targets = torch.tensor([t for c in rolled.completions for t in c])
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].detach()


def by_the_model_itself(model: Any, rolled: Rollout) -> torch.Tensor:
    out = []
    for ids, p in zip(rolled.completions, rolled.owner, strict=True):
        prompt = rolled.prompts[p]
        logits = model(
            input_ids=torch.cat([prompt.ids, torch.tensor(ids)])[None],
            mm_token_type_ids=torch.cat([prompt.media_kind, torch.zeros(len(ids), dtype=torch.int)])[None],
            pixel_values_videos=prompt.clip.patches.to(model.dtype),
            video_grid_thw=prompt.clip.grid,
            second_per_grid_ts=torch.tensor([prompt.clip.seconds_per_grid]),
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
    assert_within_error_budget(scored(model, rolled), oracle, own, name="batched forward")


def tiny_double(model: Any) -> Any:
    copy = type(model)(model.config).double().eval()
    copy.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    return copy


def test_a_wrong_position_would_be_seen(
    model: Any, prompts: list[Prompt], processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolled = rollout(model, prompts, processor)
    right = scored(model, rolled)
    true_positions = forward_module.positions

    def from_lengths(model: Any, prompt: Prompt, n: int) -> torch.Tensor:
        positions = true_positions(model, prompt, n).clone()
        after = torch.arange(len(prompt.ids), len(prompt.ids) + n)
        positions[:, len(prompt.ids) :] = after
        return positions

    monkeypatch.setattr(forward_module, "positions", from_lengths)
    assert (scored(model, rolled) - right).abs().max() > 0.1


def test_the_clip_matters_and_is_shared(model: Any, prompts: list[Prompt], processor: Any) -> None:
    shared = Prompt(prompts[1].row, prompts[1].ids, prompts[1].media_kind, prompts[0].clip)
    completions = [[5, 6, 7]]
    apart = forward(model, [prompts[1]], completions, [0]).states
    together = forward(model, [prompts[0], shared], completions * 2, [0, 1])
    alone = forward(model, [shared], completions, [0])
    assert (apart[-1] - alone.states[-1]).abs().max() > 0.1
    rows = together.completion_rows(completions * 2)[-3:]
    exact = forward(tiny_double(model), [shared], completions, [0])
    peer = alone.states[alone.completion_rows(completions)]
    oracle = exact.states[exact.completion_rows(completions)]
    assert_within_error_budget(together.states[rows], oracle, peer, name="shared clip")


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
        model, prompts[:1], group_size=2, max_new_tokens=4, temperature=0.0, eos=tokenizer.eos_token_id,
        suppress=[], generator=None,
    )  # fmt: skip
    hidden = forward(model, rolled.prompts, rolled.completions, rolled.owner)
    best = model.lm_head(hidden.states[hidden.completion_rows(rolled.completions)]).argmax(-1)
    assert best.tolist() == [t for c in rolled.completions for t in c]


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
