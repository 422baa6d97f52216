"""Tiny random models of each family, weights scaled so that positions matter, and prompts for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

VOCAB = 200
IMAGE_PAD, VIDEO_PAD, START, END = 190, 191, 192, 193
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GAIN = 12.0  # the usual initial weights are so small that attention is nearly flat and no position shows
MERGE = 2  # patches along each side of one media token


def _build(config: Any, kind: str, **other: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    attention = other.pop("attention", "sdpa")
    config._attn_implementation = attention
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= GAIN
    return model


def text_model(family: str, attention: str = "sdpa", **options: Any) -> Any:
    """Llama, Qwen2, Qwen3, Gemma2, Gemma3Text, Granite, Cohere, …"""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**TEXT, "head_dim": 8, **options})
    kind = f"{family.removesuffix('Text')}ForCausalLM"
    return _build(config, kind, attention=attention)


def vision_model(family: str, attention: str = "sdpa", **options: Any) -> Any:
    """Qwen2VL, Qwen2_5_VL or Qwen3VL."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
    if family == "Qwen2VL":
        vision |= {"embed_dim": 16, "hidden_size": 32}
    else:
        vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
    if family == "Qwen2_5_VL":
        vision |= {"fullatt_block_indexes": [1], "window_size": 16, "tokens_per_second": 2}
    if family == "Qwen3VL":
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        rope = {**rope, "mrope_interleaved": True}
    text = {**TEXT, "rope_parameters": rope, **options}
    if family == "Qwen3VL":
        text["head_dim"] = 8
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=bool(options.get("tie_word_embeddings", False)),
    )
    return _build(config, f"{family}ForConditionalGeneration", attention=attention)


def text_prompt(length: int, seed: int = 0) -> dict[str, Tensor]:
    """What a tokenizer returns."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 180, (1, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def media_prompt(
    model: Any,
    videos: Sequence[tuple[int, int, int]] = (),
    images: Sequence[tuple[int, int, int]] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """What a processor returns for a prompt with some videos and images of these patch grids.

    Qwen3-VL's processor puts a time stamp and markers around each frame, the others around each video.
    """
    qwen3 = model.config.model_type == "qwen3_vl"
    generator = torch.Generator().manual_seed(seed)
    ids = [5, 6, 7]
    for t, h, w in images:
        ids += [START, *[IMAGE_PAD] * (t * h * w // MERGE**2), END, 8]
    for t, h, w in videos:
        for frame in range(t if qwen3 else 1):
            tokens = h * w // MERGE**2 * (1 if qwen3 else t)
            ids += [*([10 + frame] if qwen3 else []), START, *[VIDEO_PAD] * tokens, END]
    ids += torch.randint(2, 180, (4,), generator=generator).tolist()
    vision = model.config.vision_config
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    row = torch.tensor([ids])
    prompt: dict[str, Any] = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    prompt["mm_token_type_ids"] = (row == IMAGE_PAD).int() + 2 * (row == VIDEO_PAD).int()
    for name, grids in (("image", images), ("video", videos)):
        if grids:
            count = sum(t * h * w for t, h, w in grids)
            key = "pixel_values" if name == "image" else "pixel_values_videos"
            prompt[key] = torch.randn(count, size, generator=generator)
            prompt[f"{name}_grid_thw"] = torch.tensor(grids)
    if videos and model.config.model_type == "qwen2_5_vl":
        prompt["second_per_grid_ts"] = torch.tensor([1.5] * len(videos))
    return prompt


def completions(lengths: list[int], seed: int = 1) -> list[list[int]]:
    """Random text of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 180, (n,), generator=generator).tolist() for n in lengths]
