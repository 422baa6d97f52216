"""AdamW for weights of any precision: 16-bit ones have fp32 copies that the steps are taken on.

A bf16 weight keeps 8 bits: a step below 1/512 of it would be rounded away, and at the learning rates of this
method nearly all are. The passes still run in bf16, so sampling, scoring and the update see the same weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as take_step

HALF = (torch.bfloat16, torch.float16)
BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.01


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW, with fp32 copies where a parameter is 16-bit. Shards (DTensors) stay shards."""
    trained = list(parameters)
    kind = MasterAdamW if any(p.dtype in HALF for p in trained) else torch.optim.AdamW
    return kind(trained, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)


class MasterAdamW(torch.optim.AdamW):
    """AdamW in fp32 of parameters that may be 16-bit.

    `state[p]["master"]` is the fp32 copy of a 16-bit p, made from p at its first step; after each step p is
    that copy, rounded. Moments are fp32. Gradients of 16-bit parameters are added up in fp32: `p.grad` is
    fp32 after the first backward pass. Saved and restored with the optimizer's state, so that resuming is
    exact: 4 bytes a weight for the copy, 8 for the moments.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, **options)
        for p in (p for group in self.param_groups for p in group["params"] if p.dtype in HALF):
            p.grad_dtype = None  # any: fp32 from the hook on
            p.register_post_accumulate_grad_hook(_widen)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the parameters that have a gradient. No closure: TypeError."""
        if closure is not None:
            raise TypeError("closure: got one, wanted None; a step is taken on gradients that are there")
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in trained]
            masters = [s.get("master", p) for s, p in zip(states, trained, strict=True)]
            take_step(
                masters,
                [p.grad.to(m.dtype) for p, m in zip(trained, masters, strict=True)],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for p, master in zip(trained, masters, strict=True):
                if master is not p:
                    p.copy_(master)

    def _state_of(self, p: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            wide = p.detach().float() if p.dtype in HALF else p.detach()
            state |= {"exp_avg": torch.zeros_like(wide), "exp_avg_sq": torch.zeros_like(wide)}
            state["step"] = torch.tensor(0.0)
            if p.dtype in HALF:
                state["master"] = wide
        return state


def _widen(p: Tensor) -> None:
    if p.grad is not None and p.grad.dtype in HALF:
        p.grad = p.grad.float()
