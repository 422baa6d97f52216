"""A prompt's preprocessed media as vLLM takes them: the very tensors and token ids the policy reads.

Written against vLLM 0.33.0: `vllm.multimodal.inputs`, fields as its Qwen2-VL models name them. Sending files
instead would have vLLM sample frames and count tokens by rules of its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..prompts import Prompt

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class Media:
    """By kind, for each medium: its hash, (first placeholder, their number), and vLLM's item."""

    hashes: dict[str, list[str]]
    places: dict[str, list[tuple[int, int]]]
    items: Any


def vllm_part(name: str) -> Any:
    """A module of vLLM. UserError with the command where there is none."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"engine: needs {name} in this environment ({error}); `pip install vllm`, 0.33 or later, or set "
            "engine=generate"
        ) from None


def media_of(prompt: Prompt, config: Any) -> Media | None:
    """Of a prompt for a model with this configuration; None for text alone. UserError for other models."""
    kinds = [kind for kind in GRIDS if GRIDS[kind] in prompt.inputs]
    if not kinds:
        return None
    row = prompt.row.problem_id
    if config.model_type not in FAMILIES:
        raise UserError(
            f"row {row}: media of model type {config.model_type} cannot be handed to vLLM here (only of "
            f"{', '.join(FAMILIES)}); set engine=generate"
        )
    places = {kind: _places(prompt, kind, config) for kind in kinds}
    hashes = {kind: _hashes(prompt.inputs, kind) for kind in kinds}
    return Media(hashes, places, _items(prompt.inputs))


def _places(prompt: Prompt, kind: str, config: Any) -> list[tuple[int, int]]:
    """Where each medium's placeholders are; each has to be one run of tokens."""
    pad, merged = getattr(config, f"{kind}_token_id"), config.vision_config.spatial_merge_size**2
    at = (prompt.ids == pad).nonzero()[:, 0].tolist()
    found = list[tuple[int, int]]()
    for grid in prompt.inputs[GRIDS[kind]]:
        n = int(grid.prod()) // merged
        run, at = at[:n], at[n:]
        if not run or run != list(range(run[0], run[0] + n)):
            raise UserError(
                f"row {prompt.row.problem_id}: its {kind} has time stamps between its tokens, or too few "
                "tokens, which vLLM's interface for preprocessed media cannot say; set engine=generate"
            )
        found.append((run[0], n))
    return found


def _hashes(inputs: dict[str, Any], kind: str) -> list[str]:
    """vLLM keeps encoded media by these: of everything that its encoding depends on, but the weights."""
    grids, rows, found = inputs[GRIDS[kind]], 0, []
    for i, grid in enumerate(grids):
        n = int(grid.prod())
        digest = hashlib.sha256(f"{kind} {grid.tolist()}".encode())
        pixels = inputs[PIXELS[kind]][rows : rows + n].contiguous()
        digest.update(pixels.view(torch.uint8).numpy().tobytes())
        if kind == "video" and "second_per_grid_ts" in inputs:
            digest.update(f" {float(inputs['second_per_grid_ts'][i])}".encode())
        found.append(digest.hexdigest())
        rows += n
    return found


def _items(inputs: dict[str, Any]) -> Any:
    made = vllm_part("vllm.multimodal.inputs")
    field = made.MultiModalFieldConfig
    data, fields = dict[str, Tensor](), dict[str, Any]()
    for kind in GRIDS:
        grid = inputs.get(GRIDS[kind])
        if grid is not None:
            data |= {GRIDS[kind]: grid, PIXELS[kind]: inputs[PIXELS[kind]]}
            fields[PIXELS[kind]] = field.flat_from_sizes(kind, grid.prod(-1))
            fields[GRIDS[kind]] = field.batched(kind, keep_on_cpu=True)
    seconds: Sequence[float] | None = inputs.get("second_per_grid_ts")
    if seconds is not None:
        data["second_per_grid_ts"] = torch.as_tensor(seconds, dtype=torch.float64)
        fields["second_per_grid_ts"] = field.batched("video", keep_on_cpu=True)
    return made.MultiModalKwargsItems.from_hf_inputs(data, fields)
