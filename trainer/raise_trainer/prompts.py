"""From a row to what the model reads: frames through the video processor, text through the chat template."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.video_utils import VideoMetadata

from .clips import read_frames
from .data import Row
from .errors import BadRow


@dataclass(frozen=True, eq=False)
class Clip:
    """One preprocessed video; its questions share it.

    inputs: patches [t*h*w, patch_dim], grid [1, 3], seconds of a temporal patch, as the model names them.
    """

    inputs: dict[str, Any]
    thumbnails: Tensor  # [F, H, W, 3] uint8, for the report


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question ready for the model.

    inputs: what a `raise_core.Scorer` takes for one prompt; its input_ids [1, L] end where the completion
    starts. thumbnails [F, H, W, 3] uint8: what was seen.
    """

    row: Row
    inputs: dict[str, Any]
    thumbnails: Tensor

    @property
    def ids(self) -> Tensor:
        """Token ids [L]."""
        ids: Tensor = self.inputs["input_ids"][0]
        return ids


class PromptBuilder:
    """Builds prompts and decodes every video once.

    processor: a Hugging Face vision-language processor with a chat template.
    frames: sampled frames per video.
    max_length: prompt tokens plus room for the completion; a longer prompt raises BadRow.
    """

    def __init__(self, processor: Any, *, frames: int, max_length: int):
        self.processor = processor
        self.frames = frames
        self.max_length = max_length
        self._clips: dict[Any, Clip] = {}

    def clip(self, row: Row) -> Clip:
        """The row's video, preprocessed; decoded on first use only. Raises BadMedia."""
        if row.path not in self._clips:
            read = read_frames(row.path, self.frames)
            metadata = VideoMetadata(
                total_num_frames=read.total, fps=read.fps, frames_indices=list(read.indices)
            )
            video = self.processor.video_processor(
                videos=[read.pixels.permute(0, 3, 1, 2)],
                video_metadata=[metadata],
                do_sample_frames=False,
                return_tensors="pt",
            )
            sampled_fps = len(read.indices) / read.total * read.fps
            seconds = self.processor.video_processor.temporal_patch_size / sampled_fps
            names = ("pixel_values_videos", "video_grid_thw")
            inputs = {name: video[name] for name in names} | {"second_per_grid_ts": [seconds]}
            self._clips[row.path] = Clip(inputs, read.pixels)
        return self._clips[row.path]

    def __call__(self, row: Row) -> Prompt:
        """The prompt of a row. Raises BadMedia, or BadRow when it does not fit the context."""
        clip = self.clip(row)
        content = [{"type": "video"}, {"type": "text", "text": row.question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        pad = self.processor.video_token
        merged = int(clip.inputs["video_grid_thw"].prod()) // self.processor.video_processor.merge_size**2
        if text.count(pad) != 1:
            raise BadRow(
                f"row {row.problem_id}: the text holds the media token {pad!r}; remove it from `problem`"
            )
        ids = self.processor.tokenizer(text.replace(pad, pad * merged), return_tensors="pt")["input_ids"]
        if ids.shape[1] > self.max_length:
            raise BadRow(
                f"row {row.problem_id}: the prompt has {ids.shape[1]} tokens, "
                f"the context leaves {self.max_length}; sample fewer frames or shorten the question"
            )
        return Prompt(row, {"input_ids": ids, **clip.inputs}, clip.thumbnails)


def target_ids(row: Row, tokenizer: Any) -> list[int]:
    """The supervised completion of a row: its chain, its solution, the end-of-sequence token."""
    if not row.process:
        raise BadRow(f"row {row.problem_id}: no `process`; a supervised row needs its chain")
    ids: list[int] = tokenizer(row.process + row.solution, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]
