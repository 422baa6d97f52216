"""The policy's weights as vLLM loads them: whole tensors under the names of a Hugging Face checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class Weight:
    """One parameter. shape: of the whole tensor. full(): the tensor, a collective where it is sharded."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    full: Callable[[], Tensor]


def weights_of(model: Any) -> list[Weight]:
    """All parameters, in one order on every process; a tied one once.

    Active LoRA adapters are added to the weights they adapt, W + scaling * B @ A in W's dtype, in a copy: the
    model is not merged and unmerged, which would leave roundings in it. Other adapters (a reference's) are
    left out.
    """
    adapted = {
        id(module.base_layer.weight): module for module in model.modules() if hasattr(module, "lora_A")
    }
    found = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        layer = adapted.get(id(parameter))
        full = partial(_whole, parameter) if layer is None else partial(_merged, layer)
        found.append(Weight(_plain(name), parameter.dtype, tuple(parameter.shape), full))
    return found


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@torch.no_grad()
def _whole(parameter: Tensor) -> Tensor:
    gather = getattr(parameter, "full_tensor", None)  # of a sharded one
    whole: Tensor = gather() if gather is not None else parameter
    return whole.detach()


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    weight = _whole(layer.base_layer.weight)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = (_whole(part[name].weight).to(wide) for part in (layer.lora_A, layer.lora_B))
            wide = wide + layer.scaling[name] * (b @ a)
    return wide.to(weight.dtype)
