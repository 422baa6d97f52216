"""The model a reward is scored with: the policy, a frozen copy, or an average that follows the policy.

    theta_ref <- decay * theta_ref + (1 - decay) * theta        every `every` optimiser steps

It exists for the reward, so it is kept even when no KL is used. GRPO-CARE (arXiv 2506.16141) uses decay
0.995 every 10 steps. TRL's `ref_model_mixup_alpha` is 1 - decay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from raise_core.reference_store import (
    Adapter,
    Copy,
    Own,
    Store,
    Swap,
    evaluating,
    is_sharded,
    local,
    named_tensors,
    plain,
    refuse_lent,
    reshard,
    why_no_adapter,
)

HOWS = ("auto", "copy", "swap", "adapter")


class Reference:
    """What all kinds have in common. Use `PolicyReference`, `FrozenReference` or `EmaReference`.

    model: the module to score, so `Scorer(reference.model)` is made once; it computes as the reference inside
        `with reference.active()`. It is the policy's own module unless the reference is a copy.
    step: the last finished optimiser step that `update` was told of.
    """

    def __init__(
        self, store: Store, master_dtype: torch.dtype | None = None, offload: str | None = None
    ) -> None:
        self._store = store
        self.model = store.model
        self.step = 0
        apart = (store.in_place, offload)
        self._averages = {n: _held(w, *apart, master_dtype) for n, w in store.weights.items()}
        self._buffers = {n: _held(b, *apart, None) for n, b in store.buffers.items()}

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """`with reference.active() as model:` computes as the reference: evaluation mode, no gradient.

        Afterwards, also after an exception, the policy has its bits, adapters, modes and gradient flags
        again. References may be nested. No policy graph may wait for its backward pass meanwhile when the
        weights are swapped (torch raises then).
        """
        with evaluating(self.model), self._store.scoring({**self._averages, **self._buffers}):
            yield self.model

    def update(self, model: nn.Module, step: int) -> bool:
        """Tell the reference that optimiser step `step` of the policy `model` is finished; True if it moved.

        step: from 1. A step told again changes nothing. ValueError if it is before `self.step`: policy and
        reference were then not restored together.
        """
        if step < 1 or step == self.step:
            return False
        if step < self.step:
            raise ValueError(
                f"step: got {step}, but the reference has followed step {self.step}; load the reference that "
                "was saved with this policy, or make a new one"
            )
        moved = self._follow(plain(model), step)
        self.step = step
        return moved

    def _follow(self, model: nn.Module, step: int) -> bool:
        return False

    def state_dict(self) -> dict[str, Tensor]:
        """Everything to go on bit for bit: plain contiguous tensors, weights in master precision, the step.

        Shared weights are the policy's to save. Of sharded weights these are this process's parts. As in
        torch the tensors are not copies: save them before the next update.
        """
        state = {f"weight.{name}": tensor for name, tensor in self._averages.items()}
        state |= {f"buffer.{name}": tensor for name, tensor in self._buffers.items()}
        state["step"] = torch.tensor(self.step)
        if is_sharded(self.model):
            state["shard"] = torch.tensor(_place())
        return {name: tensor.detach().contiguous() for name, tensor in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave; ValueError, before anything is written, if it does not fit."""
        own = self.state_dict()
        _check_same("state", state, own, unknown_too=True)
        for name, tensor in own.items():
            if state[name].dtype != tensor.dtype:
                raise ValueError(
                    f"state[{name!r}]: got {state[name].dtype}, wanted {tensor.dtype}; "
                    "build the reference with the dtype and master_dtype it was saved with"
                )
        if "shard" in own and not torch.equal(state["shard"].cpu(), own["shard"]):
            raise ValueError(
                f"state['shard']: got process {state['shard'].tolist()} [rank, processes], wanted "
                f"{own['shard'].tolist()}; each process loads its own part, on as many processes as saved it"
            )
        for name in self._averages:
            self._averages[name].copy_(state[f"weight.{name}"])
        for name in self._buffers:
            self._buffers[name].copy_(state[f"buffer.{name}"])
        self._publish()
        self.step = int(state["step"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `state_dict` as safetensors and return the file; a sharded model writes one per process."""
        from safetensors.torch import save_file

        file = self._file(path)
        part = file.with_name(file.name + ".part")
        save_file(self.state_dict(), part)
        return part.replace(file)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restore what `save` wrote there. Raises as `load_state_dict`, FileNotFoundError without a file."""
        from safetensors.torch import load_file

        file = self._file(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"path: no file {file}; a sharded reference is loaded on as many processes as saved it"
            )
        self.load_state_dict(load_file(file))

    def close(self) -> None:
        """Delete the adapters the reference added to the policy; nothing to do for the other kinds.

        Without it PEFT's `save_pretrained` writes them too, unless told `selected_adapters`.
        """
        self._store.close()

    def _file(self, path: str | os.PathLike[str]) -> Path:
        file = Path(path)
        if not is_sharded(self.model):
            return file
        rank, size = _place()
        return file.with_name(f"{file.stem}-{rank + 1:05}-of-{size:05}{file.suffix}")

    def _publish(self) -> None:
        """Round the averages into the tensors that are scored, where those are others."""
        for name, weight in self._store.weights.items() if self._store.in_place else ():
            if weight is not self._averages[name]:
                weight.copy_(self._averages[name])
        for name, buffer in self._store.buffers.items() if self._store.in_place else ():
            if buffer is not self._buffers[name]:
                buffer.copy_(self._buffers[name])


class PolicyReference(Reference):
    """The policy itself, as it is at the time: no memory, nothing to save but the step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(Own(plain(model)))


class FrozenReference(Reference):
    """The policy as it was when this was made.

    Arguments as in `EmaReference`; offload needs how="swap", which "auto" then takes. With LoRA the adapter
    is kept, not the base.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        how: str = "auto",
        share_frozen: bool = True,
        share: Sequence[str] = (),
        offload: str | None = None,
    ) -> None:
        if offload is not None and how in ("copy", "adapter"):
            raise ValueError(
                f'offload: got {offload!r} with how="{how}", which has no average to keep elsewhere; wanted '
                'how="swap" (or "auto")'
            )
        super().__init__(_store(model, how, share_frozen, share, offload), None, offload)


class EmaReference(Reference):
    """A reference that follows the policy slowly.

    model: the policy: any `nn.Module`, a `peft.PeftModel`, or a model under `fully_shard`. DDP and
        `torch.compile` wrappers are looked through. Tied weights stay tied. Buffers are copied, not averaged.
    decay: weight of the old reference, in [0, 1]. 0 copies the policy at each update, 1 never moves.
    every: optimiser steps between updates.
    master_dtype: a parameter of lower precision also keeps a copy in this dtype, and that is averaged: at
        decay 0.995 an update is mostly below half a place of a bf16 weight and would be lost.
    how: "copy", a second module; "adapter", a second LoRA adapter on the same base weights; "swap", weights
        apart that are put into the policy's storage while scoring, by shard and with no collective. "auto"
        is "swap" for sharded models and with offload, "adapter" for LoRA, else "copy".
    share_frozen: parameters that require no gradient stay the policy's own: a frozen vision tower or a LoRA
        base costs nothing. Freeze before making the reference; a shared parameter that is trained later is
        refused by `update`. If none is trained, ValueError.
    share: modules or parameters, by name, that are the policy's own even though they are trained; the
        reference then follows these at once.
    offload: "cpu" keeps the averages in host memory; they are copied in for scoring.
    Two runs with the same updates agree bit for bit. Raises ValueError for values out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.995,
        every: int = 10,
        master_dtype: torch.dtype = torch.float32,
        how: str = "auto",
        share_frozen: bool = True,
        share: Sequence[str] = (),
        offload: str | None = None,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(
                f"decay: got {decay}, wanted a number in [0, 1]; it is the weight of the OLD reference"
            )
        if every < 1:
            raise ValueError(f"every: got {every}, wanted 1 or more optimiser steps")
        if not master_dtype.is_floating_point:
            raise ValueError(
                f"master_dtype: got {master_dtype}, wanted a floating dtype such as torch.float32"
            )
        self.decay = decay
        self.every = every
        super().__init__(_store(model, how, share_frozen, share, offload), master_dtype, offload)
        self._told = {name for name in self._store.shared if _inside(name, share)}

    @torch.no_grad()
    def _follow(self, model: nn.Module, step: int) -> bool:
        """Move towards `model`, which is not written, if `step` is a multiple of `every`.

        ValueError if `model` lacks a tensor of the model at the start, or its shape; RuntimeError inside
        `active()` of a reference that is swapped in.
        """
        if step % self.every:
            return False
        refuse_lent(model)
        reshard(model)
        named = named_tensors(model)
        for name in self._store.shared:
            if name not in self._told and name in named and named[name].requires_grad:
                raise ValueError(
                    f"model: {name} requires a gradient now, but did not when the reference was made, which "
                    "shares it; freeze first, or make the reference with share_frozen=False"
                )
        own = {**self._averages, **self._buffers}
        policy = {name: local(tensor) for name, tensor in named.items() if name in own}
        _check_same("model", policy, own)
        for name, average in self._averages.items():
            if average.is_floating_point():
                average.lerp_(policy[name].to(average.device, average.dtype), 1.0 - self.decay)
            else:
                average.copy_(policy[name])
        for name, buffer in self._buffers.items():
            buffer.copy_(policy[name])
        self._publish()
        return True


def _store(
    model: nn.Module, how: str, share_frozen: bool, share: Sequence[str], offload: str | None
) -> Store:
    if how not in HOWS:
        raise ValueError(f"how: got {how!r}, wanted one of {', '.join(HOWS)}")
    if offload not in (None, "cpu"):
        raise ValueError(f'offload: got {offload!r}, wanted None or "cpu"')
    model = plain(model)
    if how == "adapter" or (how == "auto" and offload is None and why_no_adapter(model) is None):
        return Adapter(model)
    reshard(model)
    shared = _shared(model, share_frozen, share)
    swap = how == "swap" or (how == "auto" and (offload is not None or is_sharded(model)))
    return Swap(model, shared) if swap else Copy(model, shared)


def _shared(model: nn.Module, share_frozen: bool, share: Sequence[str]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [name for name in share if not any(_inside(weight, (name,)) for weight in weights)]:
        raise ValueError(
            f"share: {unknown[0]!r} names no parameter, wanted names as in model.named_modules() or "
            "model.named_parameters()"
        )
    shared = {n: w for n, w in weights.items() if _inside(n, share) or (share_frozen and not w.requires_grad)}
    if weights and len(shared) == len(weights):
        raise ValueError(
            "model: none of its parameters is trained, so the reference would share all and follow every "
            "change at once; wanted the policy as it is trained, share_frozen=False, or PolicyReference"
        )
    return shared


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _held(weight: Tensor, in_place: bool, offload: str | None, master: torch.dtype | None) -> Tensor:
    """What is averaged: the scored tensor itself where it has the precision and the place."""
    high = weight.is_floating_point() and master is not None
    dtype = torch.promote_types(weight.dtype, master) if high and master else weight.dtype
    device = torch.device(offload) if offload else weight.device
    if in_place and dtype == weight.dtype and device == weight.device:
        return weight
    return weight.detach().to(device, dtype, copy=True)


def _place() -> tuple[int, int]:
    """This process's rank and how many there are."""
    from torch import distributed

    return distributed.get_rank(), distributed.get_world_size()


def _check_same(
    argument: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, unknown_too: bool = False
) -> None:
    missing = [name for name in wanted if name not in got]
    unknown = [name for name in got if name not in wanted] if unknown_too else []
    if missing or unknown:
        raise ValueError(
            f"{argument}: {len(missing)} tensors missing (first {missing[:1]}), {len(unknown)} unknown "
            f"(first {unknown[:1]}); wanted those of the model the reference was made from, with the same "
            "wrappers, adapters and frozen parameters"
        )
    for name, tensor in wanted.items():
        if got[name].shape != tensor.shape:
            raise ValueError(
                f"{argument}: {name} has shape {list(got[name].shape)}, wanted {list(tensor.shape)}; "
                "was the vocabulary resized after the reference was made?"
            )
