"""From a row to what the model reads: pixels through its processor, text through its chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata

from .data import Row
from .errors import BadMedia, BadRow, UserError
from .media.frames import Frames
from .media.loader import MediaLoader
from .media.sampling import Sampling
from .media.video import Kind, Request
from .prompt_template import PromptTemplate, load_template
from .train_config import TrainConfig

PLACEHOLDERS = {"video": "video_token", "image": "image_token"}


@dataclass(frozen=True, eq=False)
class Medium:
    """One preprocessed video or image; its questions share it.

    inputs: patches, grid and times, as the model names them. text: what stands for it in the prompt.
    thumbnails [F, H, W, 3] uint8: what was seen.
    """

    inputs: dict[str, Any]
    text: str
    thumbnails: Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question ready for the model.

    inputs: what a `raise_core.Scorer` takes for one prompt; its input_ids [1, L] end where the completion
    starts. thumbnails [F, H, W, 3] uint8: what was seen; None for text alone. medium: kept so that other
    questions about it find it.
    """

    row: Row
    inputs: dict[str, Any]
    thumbnails: Tensor | None
    medium: Medium | None = None

    @property
    def ids(self) -> Tensor:
        """Token ids [L]."""
        ids: Tensor = self.inputs["input_ids"][0]
        return ids

    def extended(self, prefix: Sequence[int]) -> "Prompt":
        """The same with these token ids of a completion behind it, to be gone on with."""
        ids = self.inputs["input_ids"]
        more = torch.tensor([list(prefix)], dtype=ids.dtype)
        kept = {k: v for k, v in self.inputs.items() if k != "attention_mask"}
        return replace(self, inputs=kept | {"input_ids": torch.cat([ids, more], 1)})


class PromptBuilder:
    """Builds prompts; a medium is decoded and preprocessed once for all prompts that are alive at a time.

    processor: a Hugging Face processor with a chat template, or a tokenizer with one for text alone.
    max_length: prompt tokens; a longer prompt raises BadRow. template: name or path of a prompt template, or
    the template itself. sampling: of rows that have none of their own; frames: evenly spread, in short for
    sampling=Sampling(frames=frames). decoder: name of the video decoder.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int,
        sampling: Sampling | None = None,
        frames: int | None = None,
        template: str | PromptTemplate = "plain",
        decoder: str = "auto",
    ):
        if (sampling is None) == (frames is None):
            raise ValueError(f"sampling={sampling}, frames={frames}; give one of the two")
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sampling = sampling or Sampling(frames=frames)
        self.max_length = max_length
        self.template = load_template(template) if isinstance(template, str) else template
        self.decoder = decoder
        self._media: WeakValueDictionary[Request, Medium] = WeakValueDictionary()
        added = self.tokenizer.added_tokens_decoder.values()
        control = {str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        self._control = sorted(control - {""})
        if not self.processor.chat_template:
            raise UserError("the model's tokenizer has no chat template; choose an instruction-tuned model")

    @classmethod
    def configured(cls, processor: Any, config: TrainConfig, *, max_length: int) -> "PromptBuilder":
        """As a training run's settings say."""
        return cls(processor, max_length=max_length, sampling=config.sampling(), template=config.template)

    def request(self, row: Row) -> Request | None:
        """The file a row needs decoded; None for text alone. BadRow for a medium the model cannot take."""
        if row.path is None:
            return None
        kind: Kind = "video" if row.data_type == "video" else "image"
        if not hasattr(self.processor, PLACEHOLDERS[kind]) or not hasattr(
            self.processor, f"{kind}_processor"
        ):
            raise BadRow(f"row {row.problem_id}: the model takes no {kind}; drop the row or change the model")
        return Request(row.path, row.sampling or self.sampling, kind, self.decoder)

    def __call__(self, row: Row) -> Prompt:
        """The prompt of a row, decoded in this process. Raises BadMedia, or BadRow."""
        with MediaLoader(workers=0) as loader:
            (prompt,) = self.build([row], loader)
        if isinstance(prompt, UserError):
            raise prompt
        return prompt

    def build(self, rows: Sequence[Row], loader: MediaLoader) -> list[Prompt | BadRow | BadMedia]:
        """The prompt of every row, or why there is none, in their order; files come from `loader`."""
        asked = [self._try(self.request, row) for row in rows]
        wanted = [r for r in dict.fromkeys(asked) if isinstance(r, Request)]
        media: dict[Request, Medium | BadMedia] = {r: self._media[r] for r in wanted if r in self._media}
        missing = [r for r in wanted if r not in media]
        for request, frames in zip(missing, loader.load(missing), strict=True):
            media[request] = frames if isinstance(frames, BadMedia) else self._preprocess(request, frames)
        made: list[Prompt | BadRow | BadMedia] = []
        for row, request in zip(rows, asked, strict=True):
            found = request if isinstance(request, BadRow) else request and media[request]
            if isinstance(found, (BadRow, BadMedia)):
                made.append(found)
            else:
                made.append(self._try(self._prompt, row, found))
        return made

    @staticmethod
    def _try(make: Any, *arguments: Any) -> Any:
        try:
            return make(*arguments)
        except (BadRow, BadMedia) as error:
            return error

    def _preprocess(self, request: Request, frames: Frames) -> Medium | BadMedia:
        try:
            medium = self._medium(request, frames)
        except ValueError as error:  # of the processor: sides it cannot take
            return BadMedia(f"{request.path}: the model's processor refuses it ({error}); drop the row")
        self._media[request] = medium
        return medium

    def _medium(self, request: Request, frames: Frames) -> Medium:
        pixels = frames.pixels.permute(0, 3, 1, 2)
        worker = getattr(self.processor, f"{request.kind}_processor")
        if request.kind == "image":
            found = worker(images=[pixels[0]], return_tensors="pt", **self._size(request.sampling, worker, 1))
            text = self.processor.replace_image_token(found, 0)
        else:
            metadata = VideoMetadata(
                total_num_frames=frames.total,
                fps=frames.fps,
                frames_indices=list(frames.indices),
                duration=frames.total / frames.fps,
            )
            found = worker(
                videos=[pixels],
                video_metadata=[metadata],
                do_sample_frames=False,
                return_metadata=True,
                return_tensors="pt",
                **self._size(request.sampling, worker, len(pixels)),
            )
            text = self.processor.replace_video_token(found, 0)
        inputs: dict[str, Any] = {k: v for k, v in found.items() if isinstance(v, Tensor)}
        if request.kind == "video" and "second_per_grid_ts" in self.processor.model_input_names:
            inputs["second_per_grid_ts"] = [frames.seconds_per_patch]
        return Medium(inputs, text, frames.pixels)

    @staticmethod
    def _size(sampling: Sampling, worker: Any, frames: int) -> dict[str, Any]:
        """The bounds on pixels as this processor counts them: of a frame, or in Qwen3-VL of a whole video.

        A processor that counts in no such way keeps its own size.
        """
        size = sampling.size(frames if "Qwen3VL" in type(worker).__name__ else 1)
        if size is None or not set(size) <= set(dict(worker.size)):
            return {}
        capped = hasattr(worker, "cap_pixels_per_frame")  # would share the bound of a frame among all frames
        return {"size": size} | ({"cap_pixels_per_frame": False} if capped else {})

    def _prompt(self, row: Row, medium: Medium | None) -> Prompt:
        text = self._text(row)
        if medium is not None:
            mark = getattr(self.processor, PLACEHOLDERS[row.data_type])
            if text.count(mark) != 1:
                raise UserError(
                    f"the chat template puts {text.count(mark)} {mark!r} for one {row.data_type}; expected 1"
                )
            text = text.replace(mark, medium.text)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if ids.shape[1] > self.max_length:
            raise BadRow(
                f"row {row.problem_id}: the prompt has {ids.shape[1]} tokens, "
                f"the context leaves {self.max_length}; sample fewer frames or shorten the question"
            )
        inputs = {"input_ids": ids, **(medium.inputs if medium else {})}
        return Prompt(row, inputs, medium.thumbnails if medium else None, medium)

    def _text(self, row: Row) -> str:
        """The chat, its placeholder for a medium not yet expanded."""
        said = self.template.render(row)
        for token in self._control:
            if token in row.problem or any(token in option for option in row.options):
                raise BadRow(
                    f"row {row.problem_id}: the text holds the control or media token {token!r}; "
                    "remove it from `problem` and `options`"
                )
        content: Any = said
        if self.tokenizer is not self.processor:  # a processor's template wants parts, a tokenizer's text
            parts = [{"type": "text", "text": said}]
            content = parts if row.path is None else [{"type": row.data_type}, *parts]
        system = self.template.system
        messages = [{"role": "user", "content": content}]
        if system is not None:
            first: Any = system if content is said else [{"type": "text", "text": system}]
            messages.insert(0, {"role": "system", "content": first})
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text


def base_of(model: str) -> str | None:
    """The model that LoRA adapters in a folder were trained on; None where the folder has none, or an id."""
    file = Path(model) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model {model!r}: its adapter_config.json names no base model ({error})") from None


def load_processor(model: str) -> tuple[Any, int]:
    """The processor of a model that sees, or the tokenizer of another, and its context length in tokens.

    model: Hugging Face id or folder; its weights are not loaded. UserError where it cannot be had.
    """
    import transformers

    whole = model
    while (base := base_of(whole)) is not None:
        whole = base
    try:
        about = transformers.AutoConfig.from_pretrained(whole)
        sees = type(about) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        reader = transformers.AutoProcessor if sees else transformers.AutoTokenizer
        return reader.from_pretrained(model), context_length(about)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model {model!r}: cannot be loaded ({reason}); name a folder that is there, or a Hugging Face id"
        ) from None


def context_length(config: Any) -> int:
    """Tokens of a model's context, by its Hugging Face config. UserError for a model that has no limit."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        raise UserError(
            f"model type {config.model_type!r}: its config names no max_position_embeddings, which "
            "prompts are measured by; set one in its config.json"
        )
    return int(most)


def target_ids(row: Row, tokenizer: Any) -> list[int]:
    """The supervised completion of a row: its chain, its solution, the end-of-sequence token."""
    if not row.process:
        raise BadRow(f"row {row.problem_id}: no `process`; a supervised row needs its chain")
    ids: list[int] = tokenizer(row.process + row.solution, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]
