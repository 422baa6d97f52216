"""Where a reference keeps its weights, and how the policy's code is run with them.

Copy: a second module. Swap: tensors of their own, put into the policy's storage for the time of scoring.
Adapter: a second LoRA adapter on the same base weights. All three name a weight as the policy does.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Models whose storage holds some reference's weights at the moment.
_LENT: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class Store(Protocol):
    """model: what is scored. weights, buffers: what the reference has of its own there, by name.

    shared: parameters that are the policy's own, by name. in_place: whether `weights` and `buffers` are
    scored as they are; otherwise they are the policy's, and `scoring` puts the reference's in their place.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    shared: dict[str, Tensor]
    in_place: bool

    def scoring(self, held: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """While entered, `model` computes with `held`, the reference's tensors by name."""
        ...

    def close(self) -> None:
        """Take from the policy what the reference added to it."""
        ...


class Copy:
    """A second module; the parameters in `shared` are the same objects in both."""

    in_place = True

    def __init__(self, model: nn.Module, shared: dict[str, Tensor]) -> None:
        if is_sharded(model):
            raise ValueError(
                'how: got "copy" for a model under fully_shard, whose modules cannot be copied; '
                'wanted "swap" (or "auto")'
            )
        same = {id(weight): weight for weight in shared.values()}
        self.model = copy.deepcopy(model, dict(same)).eval()
        self.shared = shared
        own = {n: p for n, p in self.model.named_parameters() if id(p) not in same}
        self.weights: dict[str, Tensor] = dict(own)
        self.buffers = dict(self.model.named_buffers())
        for weight in self.weights.values():
            weight.requires_grad_(False)

    def scoring(self, held: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Nothing to do: the copy always computes with them."""
        return nullcontext()

    def close(self) -> None:
        """Nothing was added to the policy."""


class Swap:
    """The policy's own module. While scoring, its weights wait where the reference's are kept."""

    in_place = False

    def __init__(self, model: nn.Module, shared: dict[str, Tensor]) -> None:
        reshard(model)
        same = {id(weight) for weight in shared.values()}
        self.model, self.shared = model, shared
        self.weights = {n: local(p) for n, p in model.named_parameters() if id(p) not in same}
        self.buffers = dict(model.named_buffers())

    @contextmanager
    def scoring(self, held: Mapping[str, Tensor]) -> Iterator[None]:
        """Put the reference's weights in; put the policy's back bit for bit, whatever happens in between."""
        reshard(self.model)
        policy = named_tensors(self.model)
        waiting: list[tuple[Tensor, Tensor]] = []
        _LENT[self.model] = _LENT.get(self.model, 0) + 1
        try:
            for name, tensor in held.items():
                place = local(policy[name])
                waiting.append((place, place.to(tensor.device, copy=True)))
                place.copy_(tensor)
            yield
        finally:
            reshard(self.model)
            for place, tensor in waiting:
                place.copy_(tensor)
            _LENT[self.model] -= 1

    def close(self) -> None:
        """Nothing was added to the policy."""


class Own:
    """The policy as it is."""

    in_place = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}

    def scoring(self, held: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def close(self) -> None:
        """Nothing was added to the policy."""


class Adapter:
    """A second LoRA adapter for each active one of a `peft.PeftModel`; base weights are shared.

    The random state, the base weights and what requires a gradient are left as they were.
    """

    in_place = True

    def __init__(self, model: nn.Module) -> None:
        peft: Any = model
        reason = why_no_adapter(model)
        if reason:
            raise ValueError(f'how: got "adapter", but {reason}; wanted "swap" (or "auto")')
        self.model = model
        self.buffers: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.weights: dict[str, Tensor] = {}
        before = named_tensors(model)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        active = peft.base_model.active_adapter
        for policy in _as_list(active):
            name = _free_name(model)
            config = copy.deepcopy(peft.peft_config[policy])
            # Other initial values (PiSSA, OLoRA, ...) rewrite the base weights; these are overwritten anyway.
            config.init_lora_weights, config.inference_mode = True, True
            devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
            with torch.random.fork_rng(devices=devices):
                peft.add_adapter(name, config)
            self.names.append(name)
            for key, weight in model.named_parameters():
                if key not in before and name in key.split("."):
                    source = before[_renamed(key, name, policy)].detach()
                    weight.data = source.to(copy=True)
                    self.weights[_renamed(key, name, policy)] = weight.requires_grad_(False)
        peft.base_model.set_adapter(active)
        _restore(flags)
        self.shared: dict[str, Tensor] = {
            n: p for n, p in model.named_parameters() if n in before and n not in self.weights
        }

    @contextmanager
    def scoring(self, held: Mapping[str, Tensor]) -> Iterator[None]:
        """Switch to the reference's adapters and back, whatever happens in between."""
        peft: Any = self.model
        tuner = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
        layers = [m for m in peft.modules() if isinstance(m, tuner)]
        if any(layer.merged for layer in layers) or any(layer.disable_adapters for layer in layers):
            raise RuntimeError(
                "active: the policy's adapters are merged or disabled, so no other adapter can be scored; "
                "call unmerge_adapter(), or leave disable_adapter() first"
            )
        if missing := [name for name in self.names if name not in peft.peft_config]:
            raise RuntimeError(f"active: adapter {missing[0]!r} was deleted; make a new reference")
        active = peft.base_model.active_adapter
        flags = [(p, p.requires_grad) for p in peft.parameters()]
        try:
            peft.base_model.set_adapter(self.names if len(self.names) > 1 else self.names[0])
            yield
        finally:
            peft.base_model.set_adapter(active)
            _restore(flags)

    def close(self) -> None:
        """Delete the reference's adapters."""
        peft: Any = self.model
        flags = [(p, p.requires_grad) for p in peft.parameters()]
        for name in self.names:
            if name in peft.peft_config:
                peft.delete_adapter(name)
        _restore(flags)


def plain(model: nn.Module) -> nn.Module:
    """Without a DistributedDataParallel or torch.compile wrapper."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def why_no_adapter(model: nn.Module) -> str | None:
    """What keeps a second LoRA adapter from being the reference of this model."""
    peft = sys.modules.get("peft")  # without it no model can have been wrapped by it
    if peft is None or not isinstance(model, peft.PeftModel):
        return f"model is a {type(model).__name__}, not a peft.PeftModel"
    wrapper: Any = model
    kinds = {wrapper.peft_config[name].peft_type.value for name in wrapper.active_adapters}
    if kinds != {"LORA"}:
        return f"its active adapters are {sorted(kinds)}, not LoRA"
    if is_sharded(model):
        return "it is under fully_shard, which a new adapter would not be"
    for name, weight in model.named_parameters():
        if weight.requires_grad and not set(wrapper.active_adapters) & set(name.split(".")):
            return f"{name} is trained too, and is no adapter's"
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is a DTensor, of which each process holds a part."""
    reshard(model)
    return any(hasattr(weight, "to_local") for weight in model.parameters())


def reshard(model: nn.Module) -> None:
    """Make the parameters of an FSDP2 model its shards again. Local; nothing to do for other models."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if fsdp and isinstance(module, fsdp.FSDPModule):
            module.reshard()


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, the same memory; other tensors detached."""
    part: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return (tensor if part is None else part()).detach()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name: a policy may tie what the reference does not, or not tie it."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def refuse_lent(model: nn.Module) -> None:
    """Raise RuntimeError while some reference's weights are in this model's storage."""
    if _LENT.get(model):
        raise RuntimeError("update: the policy holds a reference's weights; leave `active()` first")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _free_name(model: nn.Module) -> str:
    """A part of a name that occurs nowhere in the model."""
    taken = {part for name, _ in model.named_modules() for part in name.split(".")}
    taken |= {part for name in named_tensors(model) for part in name.split(".")}
    taken |= set(getattr(model, "peft_config", ()))
    number = 1
    while f"reference_{number}" in taken:
        number += 1
    return f"reference_{number}"


def _renamed(key: str, old: str, new: str) -> str:
    return ".".join(new if part == old else part for part in key.split("."))


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for weight, flag in flags:
        weight.requires_grad_(flag)
