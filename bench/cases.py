"""What a case of `python -m bench ops` is, and how wrong a result may be before its speed is shown.

A result is judged by what plain PyTorch loses against fp64 on the same inputs:

    |result - fp64|  <=  2 * max |peer - fp64|  +  one rounding of the result's dtype
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

PEER_FACTOR = 2.0
Outputs = Mapping[str, Tensor]
Call = Callable[[], Outputs]


@dataclass(frozen=True)
class Truth:
    """The fp64 value of one output.

    peer_error: the error that the peer makes; None: that of the eager implementation of this run.
    where: the columns of the last-but-one axis that `value` holds, all when None.
    """

    value: Tensor
    peer_error: float | None
    where: Tensor | None = None


class Inputs(Protocol):
    """The tensors of a case."""

    def few(self) -> Inputs:
        """The same for some rows: a call on them loads code and starts threads."""

    def truth(self) -> dict[str, Truth]:
        """fp64 values by the name of the output."""


@dataclass(frozen=True)
class Impl:
    """One implementation: make(inputs) gives the call that is timed, or raises `peers.NotHere`.

    role: "unit" (what the table counts in), "ours", "eager" or "peer". compiles: the first call at a shape
    compiles for it. package: the distribution whose version is recorded.
    """

    name: str
    role: str
    make: Callable[..., Call]
    compiles: bool = False
    note: str = ""
    package: str = ""


@dataclass(frozen=True)
class Case:
    """Implementations of one operation on one set of inputs.

    bytes: what must be read and written at least. flops: of the matrix products. unit: the implementation
    whose time is 1 in the table, and, when is_limit, the fastest that this memory or these products allow.
    """

    name: str
    dtype: str
    shape: dict[str, int]
    inputs: Callable[[], Inputs]
    impls: tuple[Impl, ...]
    unit: str
    bytes: int
    flops: int = 0
    is_limit: bool = True
    expected_s: float = 1.0


@dataclass(frozen=True)
class Errors:
    """Errors of one implementation by output; `excess` is what is left of each beyond one rounding."""

    error: dict[str, float] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)


def errors(outputs: Outputs, truth: Mapping[str, Truth]) -> Errors:
    """Largest |result - fp64| of each output that has a fp64 value; NaN or a wrong shape is infinite."""
    error, excess = {}, {}
    for name, true in truth.items():
        if name not in outputs:
            continue
        got = outputs[name].detach()
        eps = torch.finfo(got.dtype).eps
        if true.where is not None:
            got = got[true.where]
        if got.shape != true.value.shape:
            error[name] = excess[name] = float("inf")
            continue
        off = (got.double() - true.value).abs().nan_to_num(float("inf"), float("inf"))
        error[name] = float(off.max())
        excess[name] = float((off - eps * true.value.abs()).max())
    return Errors(error, excess)


def gate(found: Errors, truth: Mapping[str, Truth], eager: Errors | None) -> tuple[bool, dict[str, float]]:
    """Whether every error is within its budget, and the budgets beside the rounding. No output: False."""
    budget = {}
    for name in found.error:
        peer = truth[name].peer_error
        if peer is None:
            peer = eager.error.get(name, 0.0) if eager is not None else 0.0
        budget[name] = PEER_FACTOR * peer
    return bool(budget) and all(found.excess[name] <= budget[name] for name in budget), budget
