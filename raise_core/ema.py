"""The reward's reference: an exponential moving average of the policy, kept even when no KL is used.

    theta_ref <- decay * theta_ref + (1 - decay) * theta        every `every` optimiser steps

GRPO-CARE (arXiv 2506.16141) uses decay 0.995 every 10 steps. TRL's `ref_model_mixup_alpha` is 1 - decay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EmaReference:
    """A frozen copy of `model` in evaluation mode that follows it slowly.

    model: any `nn.Module`; it is deep-copied, so a second model's memory is needed. Tied weights stay tied.
    decay: weight of the old reference, in [0, 1]. 0 copies the policy at each update, 1 never moves.
    every: optimiser steps between updates.
    master_dtype: a parameter of lower precision also keeps a copy in this dtype, and that is averaged: at
        decay 0.995 an update is mostly below half a place of a bf16 weight and would be lost.
    Two runs with the same updates agree bit for bit. Raises ValueError for values out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.995,
        every: int = 10,
        master_dtype: torch.dtype = torch.float32,
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
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._masters = {
            name: weight.detach().to(torch.promote_types(weight.dtype, master_dtype))
            for name, weight in self.model.named_parameters()
            if weight.is_floating_point() and torch.promote_types(weight.dtype, master_dtype) != weight.dtype
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> bool:
        """Move towards `model` if `step` is a multiple of `every`; True if moved.

        step: finished optimiser steps, from 1. Buffers are copied, not averaged; `model` is not written.
        Raises ValueError if `model` lacks a tensor of the model copied at the start, or its shape.
        """
        if step < 1 or step % self.every:
            return False
        policy = _named_tensors(model)
        weights = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        _check_same("model", policy, {**weights, **buffers})
        for name, weight in weights.items():
            if not weight.is_floating_point():
                weight.copy_(policy[name])
                continue
            average = self._masters.get(name, weight)
            average.lerp_(policy[name].to(average.device, average.dtype), 1.0 - self.decay)
            if average is not weight:
                weight.copy_(average)
        for name, buffer in buffers.items():
            buffer.copy_(policy[name])
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Everything to go on bit for bit: plain contiguous tensors, weights in master precision.

        As in torch the tensors are not copies: save them before the next update.
        """
        state: dict[str, Tensor] = {
            f"weight.{name}": weight for name, weight in self.model.named_parameters()
        }
        state |= {f"weight.{name}": master for name, master in self._masters.items()}
        state |= {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
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
        for name, weight in self.model.named_parameters():
            saved = state[f"weight.{name}"]
            if name in self._masters:
                self._masters[name].copy_(saved)
            weight.copy_(saved)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state[f"buffer.{name}"])


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    # With duplicates: a policy may tie what the reference does not, and the other way round.
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def _check_same(
    argument: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, unknown_too: bool = False
) -> None:
    missing = [name for name in wanted if name not in got]
    unknown = [name for name in got if name not in wanted] if unknown_too else []
    if missing or unknown:
        raise ValueError(
            f"{argument}: {len(missing)} tensors missing (first {missing[:1]}), {len(unknown)} unknown "
            f"(first {unknown[:1]}); wanted those of the model the reference was made from, without a DDP or "
            "PEFT wrapper"
        )
    for name, tensor in wanted.items():
        if got[name].shape != tensor.shape:
            raise ValueError(
                f"{argument}: {name} has shape {list(got[name].shape)}, wanted {list(tensor.shape)}; "
                "was the vocabulary resized after the reference was made?"
            )
