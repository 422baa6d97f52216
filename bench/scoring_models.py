"""The random Qwen2.5-VL of `python -m bench scoring`, and prompts for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GAIN = (
    4.0  # on the usual initial weights, which are so small that attention is nearly flat: no position shows
)
MERGE = 2  # patches along each side of one media token
PATCH = 14
TEXT_AROUND = 13  # tokens of text before and after a video
RESERVED = 4  # the last ids of the vocabulary: placeholders and markers


@dataclass(frozen=True)
class Size:
    """A model: decoder and vision layers, width, vocabulary."""

    layers: int
    width: int
    vocabulary: int


def build(size: Size) -> Any:
    """A random Qwen2.5-VL in fp32, weights scaled so that a wrong position changes the result."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads, v = 4, size.vocabulary
    half = size.width // heads // 2
    rope = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": v, "hidden_size": size.width, "intermediate_size": 4 * size.width,
            "num_hidden_layers": size.layers, "num_attention_heads": heads, "num_key_value_heads": 2,
            "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": rope},
        },
        vision_config={
            "depth": size.layers, "num_heads": heads, "hidden_size": size.width,
            "intermediate_size": 4 * size.width, "out_hidden_size": size.width, "patch_size": PATCH,
            "temporal_patch_size": 2, "fullatt_block_indexes": [size.layers - 1], "window_size": 112,
            "tokens_per_second": 2,
        },
        image_token_id=v - 4, video_token_id=v - 3, vision_start_token_id=v - 2, vision_end_token_id=v - 1,
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(GAIN)
    return model


def text(length: int, vocabulary: int, seed: int) -> list[int]:
    """Random token ids that are neither special nor placeholders."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary - RESERVED, (length,), generator=source).tolist()


def video_prompt(frames: int, side: int, vocabulary: int) -> dict[str, Any]:
    """A video of `frames` x side x side patches with text around it, as the model's processor gives it."""
    start, end, pad = vocabulary - 2, vocabulary - 1, vocabulary - 3
    media = [start, *[pad] * (frames * side * side // MERGE**2), end]
    around = text(2 * TEXT_AROUND, vocabulary, 2)
    ids = torch.tensor([[*around[:TEXT_AROUND], *media, *around[TEXT_AROUND:]]])
    source = torch.Generator().manual_seed(3)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == pad).int(),
        "pixel_values_videos": torch.randn(frames * side * side, 3 * 2 * PATCH**2, generator=source),
        "video_grid_thw": torch.tensor([[frames, side, side]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }


def text_prompt(length: int, vocabulary: int) -> dict[str, Any]:
    """A prompt without media."""
    ids = torch.tensor([text(length, vocabulary, 2)])
    kinds = torch.zeros_like(ids).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}


def repeated(prompt: dict[str, Any], completions: Tensor) -> dict[str, Any]:
    """The prompt and its media once for each of the completions [G, C]: what a trainer's batch holds."""
    count, length = completions.shape
    batch = {k: torch.cat([v] * count) for k, v in prompt.items()}
    batch["input_ids"] = torch.cat([batch["input_ids"], completions], 1)
    for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        batch[key] = torch.nn.functional.pad(batch[key], (0, length), value=fill)
    return batch
