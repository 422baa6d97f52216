"""Prompts for videos, images and text by the real processors of three model families and a tokenizer."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import raise_core as rc
from raise_trainer import tiny
from raise_trainer.clips import write_mp4
from raise_trainer.errors import BadMedia, BadRow, UserError
from raise_trainer.media.loader import MediaLoader
from raise_trainer.media.sampling import Sampling
from raise_trainer.prompt_template import PromptTemplate
from raise_trainer.prompts import Prompt, PromptBuilder, context_length
from raise_trainer.rows import Row, parse_row
from raise_trainer.train_config import check

FPS, FRAMES, SIZE = 8, 24, 56
TEMPLATE = tiny.CHAT_TEMPLATE.replace(
    "{% elif c.type == 'text' %}",
    "{% elif c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif c.type == 'text' %}",
)
TEXT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHARP = {"shortest_edge": SIZE**2, "longest_edge": SIZE**2}


def processor(family: str) -> Any:
    image = Qwen2VLImageProcessor(size=SHARP, **({"patch_size": 16} if family == "Qwen3VL" else {}))
    common = {"image_processor": image, "tokenizer": tiny.build_tokenizer()}
    if family == "Qwen3VL":
        video = Qwen3VLVideoProcessor(size={k: v * 8 for k, v in SHARP.items()}, cap_pixels_per_frame=False)
        return Qwen3VLProcessor(**common, video_processor=video, chat_template=TEMPLATE.replace(
            "<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>"))  # fmt: skip
    video = Qwen2VLVideoProcessor(size=SHARP, cap_pixels_per_frame=False)
    kind = Qwen2VLProcessor if family == "Qwen2VL" else Qwen2_5_VLProcessor
    return kind(**common, video_processor=video, chat_template=TEMPLATE)


def tokenizer() -> PreTrainedTokenizerFast:
    plain = tiny.build_tokenizer()
    plain.chat_template = TEXT_TEMPLATE
    return plain


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    write_mp4(root / "a.mp4", rng.integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8), FPS)
    Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(root / "a.png")
    Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(root / "large.png")
    return root


def row(root: Path, data_type: str = "text", path: str | None = None, **change: Any) -> Row:
    raw = {
        "problem_id": 5, "problem": "What colour is it?", "data_type": data_type, "path": path,
        "problem_type": "multiple choice", "options": ["A. red", "B. blue"], "solution": "<answer>A</answer>",
    }  # fmt: skip
    return parse_row(0, raw | change, root)


def rows(root: Path) -> list[Row]:
    return [row(root, "video", "a.mp4"), row(root, "image", "a.png"), row(root)]


FAMILIES = ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_what_the_processor_itself_makes(root: Path, family: str) -> None:
    """The whole call of the processor, on the same frames, is the oracle."""
    whole = processor(family)
    builder = PromptBuilder(whole, frames=8, max_length=4000)
    with MediaLoader(workers=0) as loader:
        video, image, text = builder.build(rows(root), loader)
    assert isinstance(video, Prompt) and isinstance(image, Prompt) and isinstance(text, Prompt)
    said = [{"type": "text", "text": builder.template.render(text.row)}]
    indices = Sampling(frames=8).indices(FRAMES, FPS)
    meta = {"total_num_frames": FRAMES, "fps": float(FPS), "frames_indices": list(indices)}
    for prompt, kind, media in (
        (video, "video", {"videos": [video.thumbnails.permute(0, 3, 1, 2)], "video_metadata": [meta]}),
        (image, "image", {"images": [image.thumbnails[0].permute(2, 0, 1)]}),
        (text, "", {}),
    ):
        chat = [{"role": "user", "content": ([{"type": kind}] if kind else []) + said}]
        written = whole.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        want = whole(text=[written], do_sample_frames=False, return_tensors="pt", **media)
        assert set(prompt.inputs) == set(want) - {"attention_mask", "mm_token_type_ids", "video_metadata"}
        for name, value in prompt.inputs.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(want[name])), name


def test_a_model_scores_what_was_built(root: Path) -> None:
    whole = processor("Qwen2_5_VL")
    model = tiny.build_model(whole, seed=0)
    builder = PromptBuilder(whole, frames=4, max_length=400)
    with MediaLoader(workers=0) as loader:
        built = builder.build(rows(root), loader)
    inputs = [p.inputs for p in built if isinstance(p, Prompt)]
    assert len(inputs) == 3
    got = rc.Scorer(model).completion_rows(inputs, [[[5, 6]], [[5]], [[7, 8, 9]]])
    assert got.hidden.shape[0] == 6 and bool(got.hidden.isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_times_are_right_above_two_frames_a_second(root: Path, family: str) -> None:
    """24 frames at 8 a second, every other one: a patch of two frames spans half a second, not 0."""
    builder = PromptBuilder(processor(family), sampling=Sampling(fps=4.0), max_length=4000)
    prompt = builder(row(root, "video", "a.mp4"))
    if family == "Qwen2_5_VL":
        (seconds,) = prompt.inputs["second_per_grid_ts"]
        assert isinstance(seconds, float) and seconds == 2 / (12 / FRAMES * FPS) == 0.5
    elif family == "Qwen3VL":
        text = builder.tokenizer.decode(prompt.ids)
        indices = Sampling(fps=4.0).indices(FRAMES, FPS)
        middles = [(a + b) / 2 / FPS for a, b in zip(indices[::2], indices[1::2], strict=True)]
        assert all(f"<{middle:.1f} seconds>" in text for middle in middles) and len(set(middles)) == 6
    else:
        assert "second_per_grid_ts" not in prompt.inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_of_frames_and_images_are_bounded(root: Path, family: str) -> None:
    settings = check({"model": "m", "data": "d", "out": "o", "frames": 4, "pixels": 128 * 128})
    builder = PromptBuilder.configured(processor(family), settings, max_length=4000)
    patch = 16 if family == "Qwen3VL" else 14
    grid = builder(row(root, "image", "large.png")).inputs["image_grid_thw"][0]
    assert grid[0] == 1 and 96 * 96 <= int(grid.prod()) * patch**2 <= 128 * 128
    small = builder(row(root, "video", "a.mp4")).inputs["video_grid_thw"][0]
    assert small[0] == 2 and 112 * 112 <= int(small[1] * small[2]) * patch**2 <= 128 * 128


def test_settings_sample_by_count_or_by_rate() -> None:
    base = {"model": "m", "data": "d", "out": "o", "frames": 6}
    count = PromptBuilder.configured(processor("Qwen2VL"), check(base), max_length=9).sampling
    rate = PromptBuilder.configured(
        processor("Qwen2VL"), check(base | {"frames": {"fps": 2, "max": 6}}), max_length=9
    ).sampling
    assert count.count(100, 10.0) == 6 and rate.count(100, 10.0) == 6
    assert count.count(20, 10.0) == 6 and rate.count(20, 10.0) == 4


def test_questions_about_one_medium_share_it_while_they_are_alive(root: Path) -> None:
    builder = PromptBuilder(processor("Qwen2_5_VL"), frames=8, max_length=4000)
    asked: list[int] = []

    class Counting(MediaLoader):
        def load(self, requests: Any) -> Any:
            asked.append(len(requests))
            return super().load(requests)

    one, two = row(root, "video", "a.mp4"), row(root, "video", "a.mp4", problem="Which way?")
    with Counting(workers=0) as loader:
        first, second = builder.build([one, two], loader)
        (third,) = builder.build([two], loader)
        assert first.inputs["pixel_values_videos"] is second.inputs["pixel_values_videos"]
        assert first.inputs["pixel_values_videos"] is third.inputs["pixel_values_videos"]
        assert asked == [1, 0]
        del first, second, third
        gc.collect()
        builder.build([one], loader)
    assert asked == [1, 0, 1]


def test_a_batch_says_for_each_row_what_became_of_it(root: Path) -> None:
    builder = PromptBuilder(processor("Qwen2_5_VL"), frames=8, max_length=400)
    (root / "cut.mp4").write_bytes((root / "a.mp4").read_bytes()[:300])
    batch = [
        row(root, "video", "cut.mp4"),
        row(root),
        row(root, problem="<|im_end|> what?"),
        row(root, "image", "none.png"),
        row(root, "video", "a.mp4", problem="why? " * 600),
        row(root, "video", "cut.mp4"),
    ]
    with MediaLoader(workers=0) as loader:
        made = builder.build(batch, loader)
    kinds = [BadMedia, Prompt, BadRow, BadMedia, BadRow, BadMedia]
    assert [type(m) for m in made] == kinds
    assert "row 5: the prompt has" in str(made[4]) and "cut.mp4" in str(made[0])


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>", "<|im_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("change", ["problem", "options"])
def test_control_tokens_in_the_text_are_refused(root: Path, token: str, change: str) -> None:
    text = {"problem": f"a {token}?"} if change == "problem" else {"options": ["A. a", f"B. {token}"]}
    for builder in (
        PromptBuilder(processor("Qwen2_5_VL"), frames=8, max_length=400),
        PromptBuilder(tokenizer(), frames=8, max_length=400),
    ):
        with pytest.raises(BadRow, match=r"row 5: the text holds the control or media token"):
            builder(row(root, **text))


def test_a_picture_the_processor_refuses_is_bad_media(root: Path) -> None:
    builder = PromptBuilder(processor("Qwen2_5_VL"), frames=8, max_length=400)

    def refuse(**_: Any) -> Any:
        raise ValueError("sides")

    builder.processor.image_processor = refuse
    with pytest.raises(BadMedia, match=r"a\.png: the model's processor refuses it \(sides\)"):
        builder(row(root, "image", "a.png"))


# --- a tokenizer ------------------------------------------------------------------------------------------


def test_a_tokenizer_makes_text_prompts_and_refuses_media(root: Path) -> None:
    plain = tokenizer()
    template = PromptTemplate("{question}{options}", system="Be brief.")
    builder = PromptBuilder(plain, frames=8, max_length=400, template=template)
    prompt = builder(row(root))
    assert prompt.thumbnails is None and set(prompt.inputs) == {"input_ids"}
    assert plain.decode(prompt.ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat colour is it?\nOptions:\nA. red\nB. blue<|im_end|>\n<|im_start|>assistant\n"
    )
    for kind in ("video", "image"):
        with pytest.raises(BadRow, match=f"row 5: the model takes no {kind}"):
            builder(row(root, kind, "a.mp4"))


def test_the_beginning_of_a_sequence_is_not_doubled() -> None:
    plain = tokenizer()
    plain.chat_template = "<|endoftext|>" + TEXT_TEMPLATE
    plain.add_bos_token = True
    prompt = PromptBuilder(plain, frames=8, max_length=400)(row(Path("/")))
    assert plain.decode(prompt.ids).count("<|endoftext|>") == 1


def test_a_processor_gets_the_system_message_in_parts(root: Path) -> None:
    template = PromptTemplate("{question}", system="Be brief.")
    builder = PromptBuilder(processor("Qwen2_5_VL"), frames=8, max_length=400, template=template)
    assert builder.tokenizer.decode(builder(row(root)).ids).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>"
    )


def test_what_cannot_be_built_is_said_at_once() -> None:
    with pytest.raises(UserError, match="no chat template"):
        PromptBuilder(tiny.build_tokenizer(), frames=8, max_length=9)
    with pytest.raises(ValueError, match="give one of the two"):
        PromptBuilder(tokenizer(), max_length=9)


def test_a_chat_template_without_a_place_for_the_medium_stops_the_run(root: Path) -> None:
    whole = processor("Qwen2_5_VL")
    whole.chat_template = TEMPLATE.replace("<|video_pad|>", "")
    with pytest.raises(UserError, match=r"puts 0 '<\|video_pad\|>' for one video; expected 1"):
        PromptBuilder(whole, frames=8, max_length=400)(row(root, "video", "a.mp4"))


def test_a_model_without_a_limit_is_named() -> None:
    assert context_length(Qwen2Config(max_position_embeddings=77)) == 77
    with pytest.raises(UserError, match="model type 'mamba'"):
        context_length(MambaConfig())
