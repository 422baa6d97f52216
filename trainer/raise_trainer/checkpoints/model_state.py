"""The policy in Hugging Face form, so that `from_pretrained` loads it, and from there back, bit for bit.

`save_pretrained` renames, splits and drops tensors. So after saving, each tensor of the live model is looked
for in the files by its bits; `model.json` says where it is, what is nowhere goes to `weights.safetensors`.
Of a `peft.PeftModel` only what is trained is saved, and its buffers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raise_core.reference_store import is_sharded, local, plain

from . import ranks
from .files import Reader, Writer
from .trees import DTYPES, NAMES, bytes_of, size_of

FOLDER, APART = "model", "weights.safetensors"


def save_model(writer: Writer, model: nn.Module, processor: Any = None) -> None:
    """`model/`, `model.json`, perhaps `weights.safetensors`. All ranks; shards are gathered on the CPU.

    processor: saved beside the model, if it has `save_pretrained`.
    """
    model = plain(model)
    own, same = kept(model)
    found: dict[str, list[str]] = {}
    if hasattr(model, "save_pretrained"):
        full = dict(_gathered(own)) if is_sharded(model) else None
        found = writer.attempt(_save_pretrained, writer.folder, model, own, same, full) or {}
        rest = {name: t for name, t in (full or own).items() if name not in found}
        if rest and ranks.rank() == 0:
            writer.tensors(APART, rest)  # whole already, so no other rank takes part
        found |= {name: [APART, name] for name in rest}
    else:
        file = f"{FOLDER}/model.safetensors"
        writer.tensors(file, own)
        found = {name: [file, name] for name in own}
    if hasattr(processor, "save_pretrained"):
        writer.attempt(processor.save_pretrained, writer.folder / FOLDER)
    specs = {name: [NAMES[t.dtype], list(t.shape), *found[name]] for name, t in own.items() if name in found}
    writer.json("model.json", {"tensors": specs, "same": same, "trainable": trainable(model)})


@torch.no_grad()
def load_model(reader: Reader, model: nn.Module) -> None:
    """Write the saved tensors into `model`. ValueError, before anything is written, if they do not fit."""
    model = plain(model)
    own, same = kept(model)
    saved = reader.json("model.json")
    specs = saved["tensors"]
    check_names("model", specs, own)
    for name, tensor in own.items():
        dtype, shape = DTYPES[specs[name][0]], specs[name][1]
        if (dtype, shape) != (tensor.dtype, list(tensor.shape)):
            raise ValueError(
                f"model: {name} is {tensor.dtype} {list(tensor.shape)}, but {dtype} {shape} was saved; build "
                "the model as it was"
            )
    if same != saved["same"]:
        raise ValueError(
            f"model: ties {same or 'nothing'}, but with {saved['same'] or 'nothing'} tied it was saved"
        )
    check_names("model: trained parameters", saved["trainable"], trainable(model))
    for name, tensor in own.items():
        dtype_name, shape, file, key = specs[name]
        put(tensor, reader.tensor(file, key, DTYPES[dtype_name], shape))


def kept(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to save, each by its first name, and which further name means which of them.

    All parameters and persistent buffers; of a PEFT model the trained parameters and the buffers. The same on
    every rank, whatever its shards are.
    """
    is_sharded(model)  # a forward pass without a backward leaves gathered weights; this makes them shards
    persistent = set(model.state_dict())
    named: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    if is_peft(model):
        named = [(name, weight) for name, weight in named if weight.requires_grad]
    named += [(n, b) for n, b in model.named_buffers(remove_duplicate=False) if n in persistent]
    if not is_peft(model) and (other := sorted(persistent - {name for name, _ in named})):
        raise TypeError(
            f"model: its state_dict holds {other[0]!r}, which is neither parameter nor buffer; such state is "
            "not supported (a quantised base is, under a PEFT adapter)"
        )
    first: dict[int, str] = {}
    own: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, tensor in named:
        if first.setdefault(id(tensor), name) == name:
            own[name] = tensor
        else:
            same[name] = first[id(tensor)]
    return own, same


def trainable(model: nn.Module) -> list[str]:
    """The names of the parameters that require a gradient."""
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def is_peft(model: nn.Module) -> bool:
    """Whether it is a `peft.PeftModel`: those alone can say what their base is."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


@torch.no_grad()
def put(target: Tensor, full: Tensor) -> None:
    """Write this rank's part of the whole tensor `full` into `target`."""
    local(target).copy_(local(ranks.cut(full, target)))


def check_names(what: str, saved: Any, own: Any) -> None:
    """ValueError unless both hold the same names."""
    missing = [name for name in own if name not in saved]
    unknown = [name for name in saved if name not in own]
    if missing or unknown:
        raise ValueError(
            f"{what}: {len(missing)} were not saved (first {missing[:1]}), {len(unknown)} saved are not here "
            f"(first {unknown[:1]}); build it as it was, with the same adapters and frozen parameters"
        )


def _gathered(own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor whole, on rank 0's CPU; the other ranks only take part."""
    for name, tensor in own.items():
        full = ranks.whole(tensor)
        yield name, full.cpu() if ranks.rank() == 0 else full.new_empty(0)


def _save_pretrained(
    folder: Path, model: Any, own: dict[str, Tensor], same: dict[str, str], full: dict[str, Tensor] | None
) -> dict[str, list[str]]:
    """Save, and find every tensor in the files: {name: [file, key]}."""
    options: dict[str, Any] = {}
    if full is not None:
        options["state_dict"] = full | {name: full[first] for name, first in same.items()}
    if is_peft(model):
        # The reference's adapters are not the policy's. "auto" would ask the network for the vocabulary.
        options |= {"selected_adapters": list(model.active_adapters), "save_embedding_layers": False}
    with _no_bar():
        model.save_pretrained(folder / FOLDER, **options)
    return _find(folder, full or own)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' own progress bar, which would break into the run's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _find(folder: Path, own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    from safetensors import safe_open

    places: dict[str, tuple[str, Any]] = {}
    opened: Any
    for file in sorted((folder / FOLDER).rglob("*.safetensors")):
        opened = safe_open(file, framework="pt")
        places |= {key: (file.relative_to(folder).as_posix(), opened) for key in opened.keys()}  # noqa: SIM118
    found = {}
    for name, tensor in own.items():
        if name in places and _same_bits(places[name][1].get_tensor(name), tensor):
            found[name] = [places[name][0], name]
    if len(found) < len(own):
        taken = {key for _, key in found.values()}
        by_bits = {
            _digest(opened.get_tensor(key)): [file, key]
            for key, (file, opened) in places.items()
            if key not in taken
        }
        for name, tensor in own.items():
            if name not in found and (place := by_bits.get(_digest(tensor))):
                found[name] = place
    return found


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and bytes_of(a) == bytes_of(b)


def _digest(tensor: Tensor) -> str:
    said = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    digest = hashlib.sha256(said)
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def model_bytes(model: nn.Module) -> int:
    """What its tensors will take on disk."""
    return sum(size_of(tensor) for tensor in kept(plain(model))[0].values())
