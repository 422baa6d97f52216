"""What a Hugging Face processor returns for one prompt, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO = 1, 2  # the values of mm_token_type_ids; text is 0
PIXELS = {IMAGE: "pixel_values", VIDEO: "pixel_values_videos"}
GRIDS = {IMAGE: "image_grid_thw", VIDEO: "video_grid_thw"}
NAMES = {IMAGE: "image", VIDEO: "video"}


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt without padding.

    ids [L] int64 and kinds [L] (0 text, 1 image, 2 video), on the CPU. inputs: everything the processor
    returned besides input_ids, attention_mask and mm_token_type_ids.
    """

    ids: Tensor
    kinds: Tensor
    inputs: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_pixels(self) -> bool:
        """Whether the pixels of all its media are there."""
        return all(PIXELS[k] in self.inputs for k in (IMAGE, VIDEO) if self.has(k))

    def has(self, kind: int) -> bool:
        """Whether it holds an image (1) or a video (2)."""
        return self.inputs.get(GRIDS[kind]) is not None


@dataclass(frozen=True)
class MediaTokens:
    """Placeholder ids of a model, None where it has none, and patches per placeholder."""

    image: int | None = None
    video: int | None = None
    patches: int = 1

    def kinds(self, ids: Tensor) -> Tensor:
        """1 where an image placeholder is, 2 where a video one is, else 0; the shape of ids."""
        kinds = torch.zeros_like(ids)
        for kind, token in ((IMAGE, self.image), (VIDEO, self.video)):
            if token is not None:
                kinds[ids == token] = kind
        return kinds


def read_prompts(prompts: Sequence[Any], media: MediaTokens) -> list[Prompt]:
    """The prompts of a call. Raises TypeError / ValueError with the prompt's index when one does not fit."""
    if isinstance(prompts, (Mapping, str)):
        raise TypeError(
            f"prompts: got one {type(prompts).__name__}, wanted a list with what the processor returns for "
            "each prompt; wrap a single one as [inputs]"
        )
    return [read_prompt(f"prompts[{i}]", given, media) for i, given in enumerate(prompts)]


def read_prompt(name: str, given: Any, media: MediaTokens) -> Prompt:
    """One prompt; `name` stands in the messages."""
    if not isinstance(given, Mapping) or "input_ids" not in given:
        raise TypeError(
            f"{name}: got {type(given).__name__}, wanted what the processor returns for one prompt: a "
            "mapping with input_ids [1, L]"
        )
    ids = _row(name, "input_ids", given["input_ids"])
    kept = torch.ones_like(ids, dtype=torch.bool)
    if given.get("attention_mask") is not None:
        kept = _row(name, "attention_mask", given["attention_mask"]).bool()
    if len(kept) != len(ids):
        raise ValueError(
            f"{name}['attention_mask']: got {len(kept)} entries, wanted {len(ids)} as in input_ids; cut "
            "both, or leave it out"
        )
    ids = ids[kept]
    if len(ids) == 0:
        raise ValueError(f"{name}: got no tokens, wanted one or more; a completion follows at least one")
    inputs = {k: v for k, v in given.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    prompt = Prompt(ids, media.kinds(ids), {k: v for k, v in inputs.items() if v is not None})
    _check_media(name, prompt, media)
    _check_seconds(name, inputs.get("second_per_grid_ts"))
    return prompt


def _row(name: str, key: str, values: Any) -> Tensor:
    row = torch.as_tensor(values).cpu()
    if row.ndim == 2 and len(row) == 1:
        row = row[0]
    if row.ndim != 1 or row.dtype.is_floating_point:
        raise ValueError(
            f"{name}[{key!r}]: got {row.dtype} of shape {list(row.shape)}, wanted integers [1, L]; give each "
            "prompt by itself, not a padded batch"
        )
    return row.long()


def _check_media(name: str, prompt: Prompt, media: MediaTokens) -> None:
    """Placeholders must be as many as the grids stand for: a truncated prompt has lost some."""
    for kind, token in ((IMAGE, media.image), (VIDEO, media.video)):
        if token is None:
            continue
        grid = prompt.inputs.get(GRIDS[kind])
        wanted = 0 if grid is None else int(torch.as_tensor(grid).prod(-1).sum()) // media.patches
        got = int((prompt.kinds == kind).sum())
        if got != wanted:
            raise ValueError(
                f"{name}: got {got} {NAMES[kind]} tokens, wanted {wanted} for its {GRIDS[kind]}; a "
                "truncated prompt cannot be scored: sample fewer frames or pixels, or shorten its text"
            )


def _check_seconds(name: str, seconds: Any) -> None:
    """Seconds per grid step that were cast to integers put all frames of a fast clip at one time."""
    if isinstance(seconds, Tensor) and not seconds.is_floating_point() and bool((seconds == 0).any()):
        raise ValueError(
            f"{name}['second_per_grid_ts']: got {seconds.dtype} with a 0, wanted float seconds; keep the "
            "processor's floats when moving or casting the batch"
        )
