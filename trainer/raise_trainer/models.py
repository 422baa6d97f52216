"""The model to train, its processor and its reference, as the settings ask for."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import raise_core as rc

from .errors import UserError
from .liger import check_liger, use_liger
from .prompts import base_of, context_length, load_processor
from .train_config import TrainConfig

ATTENTION = {"flash": "flash_attention_2"}  # names of transformers


@dataclass(frozen=True)
class Policy:
    """A loaded model. processor: the Hugging Face processor, or the tokenizer of a text model.

    eos: token ids that end a completion. suppress: media placeholders, which are never sampled.
    """

    model: Any
    processor: Any
    tokenizer: Any
    eos: list[int]
    suppress: list[int]

    @property
    def context(self) -> int:
        """Tokens that a prompt and its completion have together."""
        return context_length(self.model.config)


def load_policy(config: TrainConfig, device: torch.device) -> Policy:
    """Load, place and prepare the model for training. UserError where it cannot be had."""
    import transformers

    if config.liger:
        check_liger()
    processor, _ = load_processor(config.model)
    sees = getattr(processor, "tokenizer", None) is not None
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    options = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": ATTENTION.get(config.attention, config.attention),
    }
    try:
        model = read_model(kind, config.model, options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model {config.model!r}: cannot be loaded ({reason})") from None
    if config.liger:
        use_liger(model)
    model = _trainable(_aligned(model.to(device)), config)
    tokenizer = getattr(processor, "tokenizer", processor)
    return Policy(model, processor, tokenizer, _eos(model, tokenizer), _placeholders(model))


def read_model(kind: Any, name: str, options: dict[str, Any]) -> Any:
    """A model, with the adapters of a folder of them merged into the weights they were trained on."""
    base = base_of(name)
    if base is None:
        return kind.from_pretrained(name, **options)
    import peft

    adapted = peft.PeftModel.from_pretrained(read_model(kind, base, options), name)
    model: Any = adapted.merge_and_unload(safe_merge=True).requires_grad_(True)
    model.name_or_path = name  # adapters that are trained on it name it as their base
    return model


def _aligned(model: Any) -> Any:
    """Weights in memory of their own.

    Loaded ones lie in the mapped file, wherever its header ends, and products of the CPU's library differ in
    their last bits with that place: a run that goes on from a checkpoint would differ from one that ran on.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def _trainable(model: Any, config: TrainConfig) -> Any:
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    vision = vision_tower(model)
    if vision is not None and (config.freeze_vision or config.lora_rank):
        vision.requires_grad_(False)
    if config.lora_rank:
        model = _with_lora(model, config.lora_rank, vision)
    return model


def vision_tower(model: Any) -> nn.Module | None:
    """The part of a model (or of its PEFT wrapper) that sees, None where there is none."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    core = model.base_model if hasattr(model, "base_model") else model
    for name in ("visual", "vision_tower", "vision_model"):
        found = getattr(core, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def _with_lora(model: Any, rank: int, vision: nn.Module | None) -> Any:
    """Adapters on every linear layer of the language model but its head."""
    import peft

    inside_vision = set(vision.modules()) if vision is not None else set[nn.Module]()
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module not in inside_vision
    ]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0)
    )


def _eos(model: Any, tokenizer: Any) -> list[int]:
    """All ids that end a text: the generation settings may name several."""
    named = getattr(model.generation_config, "eos_token_id", None)
    found = [named] if isinstance(named, int) else list(named or [])
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if not found:
        raise UserError(
            "model: neither it nor its tokenizer has an end-of-sequence token; set one and save it"
        )
    return sorted(set(found))


def _placeholders(model: Any) -> list[int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    found = (getattr(model.config, name, None) for name in names)
    return sorted({i for i in found if i is not None})


def reference_of(model: Any, config: TrainConfig) -> rc.Reference:
    """Whose confidence is the reward."""
    if config.reference == "policy":
        return rc.PolicyReference(model)
    if config.reference == "frozen":
        return rc.FrozenReference(model)
    return rc.EmaReference(model, decay=config.ema_decay)
