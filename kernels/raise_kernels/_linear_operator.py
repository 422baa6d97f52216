"""Token statistics of hidden @ weight.T + bias as one PyTorch operator with a gradient.

    raise_kernels::linear_token_stats(hidden, weight, bias, y, rows, ..., names, topk, memory, engine)

The result is [K, T], one row a name. Inputs and result are all that it saves: no tensor of the size of the
logits lives from one direction to the other. The gradient makes each product again.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from raise_kernels._backward import LinearEngine, Normaliser, coefficients
from raise_kernels._checks import DIFFERENTIABLE, PLAIN, LogitMap, check_linear, check_memory, check_want
from raise_kernels._maps import wide_dtype
from raise_kernels._operator import logit_map, with_what_the_gradient_needs

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor y, Tensor? rows"
_OPTIONS = (
    "float temperature, float logit_scale, float? softcap, int? valid_vocab, int ignore_index, "
    "str names, int topk, int memory, str engine"
)
_MODULES = {"native": "raise_kernels.linear_native", "triton": "raise_kernels.linear_stats"}
# Bytes of scratch when the caller names none. Devices with many cores want larger products.
MEMORY_CPU = 32 << 20
MEMORY_ELSEWHERE = 256 << 20


def linear_engine(name: str) -> LinearEngine:
    """The implementation of a name, imported at first use."""
    engine: LinearEngine = import_module(_MODULES[name]).ENGINE
    return engine


def scratch_bytes(memory: int | None, hidden: Tensor, on_cpu: int) -> int:
    """The bytes of scratch that a call may allocate: `on_cpu` there when the caller names none."""
    check_memory(memory)
    if memory is not None:
        return memory
    return on_cpu if hidden.device.type == "cpu" else MEMORY_ELSEWHERE


@torch.library.custom_op(
    "raise_kernels::linear_token_stats",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> Tensor",
)
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, rows: Tensor | None, *options: Any
) -> Tensor:
    *how, names, topk, memory, engine = options
    wanted = tuple(names.split(","))
    stats = linear_engine(engine).forward(
        hidden, weight, bias, y, rows, logit_map(tuple(how)), wanted, topk, memory
    )
    return torch.stack([stats[name] for name in wanted])


@torch.library.custom_op(
    "raise_kernels::linear_token_stats_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor stats, {_INPUTS}, bool[] needs, {_OPTIONS}) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    rows: Tensor | None,
    needs: list[bool],
    *options: Any,
) -> list[Tensor]:
    *scalars, names, _, memory, engine = options
    how = logit_map(tuple(scalars))
    value = dict(zip(names.split(","), stats, strict=True))
    given = {name: g for name, g in zip(value, grad, strict=True) if name in DIFFERENTIABLE}
    norm = Normaliser(value["top"], value["max_logp"])
    scored = y != how.ignore_index
    weights = coefficients(given, norm, value.get("entropy"), value.get("count"), scored)
    gradients = linear_engine(engine).backward(
        hidden, weight, bias, y, rows, norm, weights, how, tuple(needs), memory
    )
    return [g for g in gradients if g is not None]


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, rows: Tensor | None, *options: Any
) -> Tensor:
    wide = wide_dtype(hidden)
    return hidden.new_empty((options[5].count(",") + 1, y.shape[0]), dtype=wide)


@_backward.register_fake
def _(grad: Tensor, stats: Tensor, *inputs: Any) -> list[Tensor]:
    needs = inputs[5]
    return [x.new_empty(x.shape) for x, needed in zip(inputs[:3], needs, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.options = *inputs[:5], inputs[5:]
    ctx.save_for_backward(output, *tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    stats, *inputs = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    made = iter(
        torch.ops.raise_kernels.linear_token_stats_backward(grad, stats, *inputs, needs, *ctx.options)
    )
    return *(next(made) if needed else None for needed in needs), None, None, *(None for _ in ctx.options)


_forward.register_autograd(_gradient, setup_context=_setup_context)


def linear_token_stats(
    engine: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
    memory: int | None = None,
) -> dict[str, Tensor]:
    """As `reference.linear_token_stats`, by the engine "native" or "triton".

    Differentiable once in hidden, weight and bias. memory: bytes of scratch, beside inputs and results.
    """
    names = check_want(want)
    check_linear(hidden, weight, bias, targets, rows)
    if engine == "native" and hidden.device.type != "cpu":
        raise ValueError(f'hidden is on {hidden.device}; impl="native" runs on the CPU, use impl="triton"')
    if topk < 1:
        raise ValueError(f"topk is {topk}; give at least 1")
    memory = scratch_bytes(memory, hidden, MEMORY_CPU)
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, weight, bias)
    )
    asked = with_what_the_gradient_needs(names) if differentiable else names
    stats = torch.ops.raise_kernels.linear_token_stats(
        hidden, weight, bias, targets.reshape(-1).long(), None if rows is None else rows.long(),
        how.temperature, how.logit_scale, how.softcap, how.valid_vocab, how.ignore_index,
        ",".join(asked), topk, memory, engine,
    )  # fmt: skip
    out = {}
    for name, value in zip(names, stats, strict=False):
        # The gradient needs the values as they are now, whatever the caller does with his.
        kept = value.clone() if differentiable else value
        out[name] = (kept if name in DIFFERENTIABLE else kept.detach()).view(targets.shape)
    return out
