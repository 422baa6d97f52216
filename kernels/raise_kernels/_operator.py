"""Token statistics as one PyTorch operator with a gradient, which compiled graphs and fake tensors know.

    raise_kernels::token_stats(logits, y, rows, ..., names, topk, engine) -> [K, T], one row a name

The operator is opaque: what it saves for the gradient is the logits, which exist anyway, and [K, T] numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from raise_kernels._backward import Coefficients, Engine, Normaliser, coefficients
from raise_kernels._checks import DIFFERENTIABLE, PLAIN, LogitMap, check_stats, check_want
from raise_kernels._inplace import OverLogits, check_inplace
from raise_kernels._maps import wide_dtype

_OPTIONS = (
    "float temperature, float logit_scale, float? softcap, int? valid_vocab, int ignore_index, "
    "str names, int topk, str engine"
)
_MODULES = {"native": "raise_kernels.native", "triton": "raise_kernels.token_stats"}


def logits_engine(name: str) -> Engine:
    """The implementation of a name, imported at first use."""
    engine: Engine = import_module(_MODULES[name]).ENGINE
    return engine


def check_engine(name: str, logits: Tensor) -> None:
    """Refuse logits that an engine cannot take."""
    if name == "triton" and logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f'logits is {logits.dtype}; give fp32, bf16 or fp16, or use impl="native" or "reference"'
        )
    if name == "native" and logits.device.type != "cpu":
        raise ValueError(f'logits is on {logits.device}; impl="native" runs on the CPU, use impl="triton"')


def logit_map(options: tuple[Any, ...]) -> LogitMap:
    """The scalars of an operator's schema as one object."""
    temperature, logit_scale, softcap, valid_vocab, ignore_index = options
    return LogitMap(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )


def with_what_the_gradient_needs(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names` first, then what `_backward.coefficients` reads besides."""
    moments = ("entropy", "count") if {"entropy", "self_certainty"} & set(names) else ()
    return tuple(dict.fromkeys((*names, "top", "max_logp", *moments)))


@torch.library.custom_op(
    "raise_kernels::token_stats",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor y, Tensor? rows, {_OPTIONS}) -> Tensor",
)
def _forward(logits: Tensor, y: Tensor, rows: Tensor | None, *options: Any) -> Tensor:
    *how, names, topk, engine = options
    wanted = tuple(names.split(","))
    stats = logits_engine(engine).forward(logits, y, rows, logit_map(tuple(how)), wanted, topk)
    return torch.stack([stats[name] for name in wanted])


@torch.library.custom_op(
    "raise_kernels::token_stats_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor stats, Tensor logits, Tensor y, Tensor? rows, {_OPTIONS}) -> Tensor",
)
def _backward(
    grad: Tensor, stats: Tensor, logits: Tensor, y: Tensor, rows: Tensor | None, *options: Any
) -> Tensor:
    *scalars, names, _, engine = options
    how = logit_map(tuple(scalars))
    norm, weights = _constants(grad, stats, names, y != how.ignore_index)
    return logits_engine(engine).backward(logits, y, rows, norm, weights, how)


def _constants(grad: Tensor, stats: Tensor, names: str, scored: Tensor) -> tuple[Normaliser, Coefficients]:
    """What the gradient of a row is made of, from the gradients and values [K, T] of its statistics."""
    value = dict(zip(names.split(","), stats, strict=True))
    given = {name: g for name, g in zip(value, grad, strict=True) if name in DIFFERENTIABLE}
    norm = Normaliser(value["top"], value["max_logp"])
    return norm, coefficients(given, norm, value.get("entropy"), value.get("count"), scored)


@_forward.register_fake
def _(logits: Tensor, y: Tensor, rows: Tensor | None, *options: Any) -> Tensor:
    wide = wide_dtype(logits)
    return logits.new_empty((options[5].count(",") + 1, y.shape[0]), dtype=wide)


@_backward.register_fake
def _(grad: Tensor, stats: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, y, rows, *ctx.options = inputs
    ctx.save_for_backward(output, logits, y, rows)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.raise_kernels.token_stats_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dx, None, None, *(None for _ in ctx.options)


_forward.register_autograd(_gradient, setup_context=_setup_context)


def token_stats(
    engine: str,
    logits: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
    inplace_gradient: bool = False,
) -> dict[str, Tensor]:
    """As `reference.token_stats`, by the engine "native" or "triton"; differentiable once in logits.

    inplace_gradient: write the gradient over the logits; see `_inplace`.
    """
    names = check_want(want)
    check_stats(logits, targets, rows)
    check_engine(engine, logits)
    if topk < 1:
        raise ValueError(f"topk is {topk}; give at least 1")
    y = targets.reshape(-1).long().contiguous()
    n = None if rows is None else rows.long().contiguous()
    asked = names
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    if differentiable:
        asked = with_what_the_gradient_needs(names)
    options = (
        how.temperature, how.logit_scale, how.softcap, how.valid_vocab, how.ignore_index,
        ",".join(asked), topk, engine,
    )  # fmt: skip
    run = torch.ops.raise_kernels.token_stats
    if differentiable and inplace_gradient:
        check_inplace(logits)

        def write(into: Tensor, grad: Tensor, stats: Tensor) -> None:
            norm, weights = _constants(grad, stats, ",".join(asked), y != how.ignore_index)
            logits_engine(engine).backward(into, y, n, norm, weights, how, into)

        stats = OverLogits.apply(lambda x: run(x, y, n, *options), write, logits)
    else:
        stats = run(logits, y, n, *options)
    out = {}
    for name, value in zip(names, stats, strict=False):
        # The gradient needs the values as they are now, whatever the caller does with his.
        kept = value.clone() if differentiable else value
        out[name] = (kept if name in DIFFERENTIABLE else kept.detach()).view(targets.shape)
    return out
