"""Preprocessed media for vLLM: the tensors the policy reads, where its tokens are, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from raise_trainer.engines.vllm_media import media_of
from raise_trainer.errors import UserError
from raise_trainer.prompts import Prompt
from raise_trainer.rows import Row
from tests.tiny_models import media_prompt, vision_model
from tests.trainer import fake_vllm


def prompt(ids: list[int]) -> Prompt:
    row = Row(7, "?", "text", "free-form", (), "x", None, "test")
    return Prompt(row, {"input_ids": torch.tensor([ids])}, None)


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_media_are_the_tensors_and_places_of_the_policy(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    policy = vision_model(family)
    inputs = media_prompt(policy, images=[(1, 4, 4), (1, 4, 8)])
    media = media_of(replace(prompt([3]), inputs=inputs), policy.config)
    assert media is not None
    ids = inputs["input_ids"][0].tolist()
    assert [n for _, n in media.places["image"]] == [4, 8]
    for first, n in media.places["image"]:
        assert ids[first : first + n] == [policy.config.image_token_id] * n
        assert ids[first - 1] == policy.config.vision_start_token_id
    parts = [item["pixel_values"] for item in media.items["image"]]
    assert torch.equal(torch.cat(parts), inputs["pixel_values"]) and len(set(media.hashes["image"])) == 2
    other = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    changed = media_of(replace(prompt([3]), inputs=other), policy.config)
    assert changed is not None and not set(changed.hashes["image"]) & set(media.hashes["image"])


def test_the_hash_of_a_video_is_of_its_times_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    policy = vision_model("Qwen2_5_VL")
    inputs = media_prompt(policy, videos=[(2, 4, 4)])
    slower = inputs | {"second_per_grid_ts": torch.tensor([3.0])}
    one, two = (media_of(replace(prompt([3]), inputs=x), policy.config) for x in (inputs, slower))
    assert one is not None and two is not None and one.hashes != two.hashes


def test_media_that_vllm_cannot_be_told_of_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    policy = vision_model("Qwen3VL")
    stamped = replace(prompt([3]), inputs=media_prompt(policy, videos=[(2, 4, 4)]))
    with pytest.raises(UserError, match=r"row 7: its video has time stamps .*engine=generate"):
        media_of(stamped, policy.config)
    policy = vision_model("Qwen2_5_VL")
    fewer = media_prompt(policy, videos=[(2, 4, 4)]) | {"video_grid_thw": torch.tensor([[4, 4, 4]])}
    with pytest.raises(UserError, match="too few tokens"):
        media_of(replace(prompt([3]), inputs=fewer), policy.config)
    with pytest.raises(UserError, match="model type other cannot be handed to vLLM here"):
        media_of(stamped, SimpleNamespace(model_type="other"))
    assert media_of(prompt([3]), policy.config) is None
