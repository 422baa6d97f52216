"""Rewards of packed spans as PyTorch operators without a gradient, for compiled graphs and fake tensors.

    raise_core::confidence_rewards(source, spans, scores, options) -> (parts [5, S], bins, applied, logp)
    raise_core::igsr(logp, offsets, score, group, options) -> [S]

Operators return no view of an input: logp is empty where it was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raise_core.ops.impl import kernels
from raise_core.ops.stats import run_linear_stats, run_stats
from raise_kernels import reference
from raise_kernels._checks import Igsr, LogitMap, Scre, check_whole, on_host

_SOURCES = "Tensor? logits, Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? logp"
_SPANS = "Tensor rows, Tensor targets, Tensor offsets, Tensor group, Tensor score, Tensor strict"
_MAP = "float temperature, float logit_scale, float? softcap, int? valid_vocab"
_SCRE = "float eta, float lam, int first_index, bool normalize"
_IGSR = "float tau, float delta, float penalty, float? min_bonus, str variant"
PARTS = ("reward", "confidence", "variance", "nll", "bonus")


def _how(options: tuple[Any, ...]) -> tuple[LogitMap, Scre, Igsr]:
    """The scalars of the schema as objects; no token of a span is ignored."""
    logit, scre, igsr = options[:4], options[4:8], options[8:]
    fields = LogitMap.__dataclass_fields__, Scre.__dataclass_fields__, Igsr.__dataclass_fields__
    return (
        LogitMap(**dict(zip(fields[0], logit, strict=False))),
        Scre(**dict(zip(fields[1], scre, strict=True))),
        Igsr(**dict(zip(fields[2], igsr, strict=True))),
    )


def check_groups(group: Tensor, group_size: int | None) -> None:
    """Refuse groups that are not `group_size` adjacent spans each, as far as no sync is needed to see it."""
    if group_size is None:
        return
    check_whole("group_size", group_size, "None for groups of any size")
    if len(group) % group_size:
        raise ValueError(
            f"group_size is {group_size}, which does not divide the {len(group)} spans; leave it out, or "
            "give the number of completions per prompt"
        )
    if not on_host(group):
        return
    blocks = group.view(-1, group_size)
    if (blocks != blocks[:, :1]).any() or len(torch.unique(blocks[:, 0])) != len(blocks):
        raise ValueError(
            f"group_size is {group_size}, but a group is split or incomplete: give the {group_size} "
            "completions of a prompt next to each other with one group id, or leave group_size out"
        )


@torch.library.custom_op(
    "raise_core::confidence_rewards",
    mutates_args=(),
    schema=f"({_SOURCES}, {_SPANS}, {_MAP}, {_SCRE}, {_IGSR}, int? group_size, int? memory, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _rewards(
    logits: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logp: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    offsets: Tensor,
    group: Tensor,
    score: Tensor,
    strict: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *plain, group_size, memory, impl = options
    how, scre_how, igsr_how = _how(tuple(plain))
    # A compiled graph is the first to see the values here.
    check_groups(group, group_size)
    made = logp
    if impl == "triton":
        module = kernels("confidence")
        source = logits if hidden is None else module.Linear(hidden, weight, bias)
        made, result = module.confidence_rewards(
            source, rows, targets, logp, offsets, score, strict, group, group_size, how, scre_how, igsr_how,
            memory,
        )  # fmt: skip
    else:
        if hidden is not None and weight is not None:
            want = ("logp",)
            made = run_linear_stats(hidden, weight, targets, bias, rows, how, want, 20, memory, impl)["logp"]
        elif logits is not None:
            made = run_stats(logits, targets, rows, how, ("logp",), 20, impl)["logp"]
        assert made is not None
        result = reference.span_rewards(made, offsets, score, strict, group, scre_how, igsr_how)
    parts = torch.stack([getattr(result, name) for name in PARTS])
    return parts, result.bin, result.applied, made if logp is None else parts.new_empty(0)


@_rewards.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = next(x for x in (inputs[0], inputs[1], inputs[4]) if x is not None)
    wide = torch.float64 if source.dtype == torch.float64 and inputs[-1] != "triton" else torch.float32
    count = inputs[7].shape[0] - 1
    parts = source.new_empty((len(PARTS), count), dtype=wide)
    bins, applied = source.new_empty(count, dtype=torch.int64), source.new_empty(count, dtype=torch.bool)
    tokens = 0 if inputs[4] is not None else inputs[6].shape[0]
    return parts, bins, applied, source.new_empty(tokens, dtype=wide)


@torch.library.custom_op(
    "raise_core::igsr",
    mutates_args=(),
    schema=f"(Tensor logp, Tensor offsets, Tensor score, Tensor group, {_IGSR}, str impl) -> Tensor",
)
def igsr(logp: Tensor, offsets: Tensor, score: Tensor, group: Tensor, *options: Any) -> Tensor:
    """IGSR of packed spans by a chosen implementation, [S]."""
    how = Igsr(**dict(zip(Igsr.__dataclass_fields__, options[:-1], strict=True)))
    run = kernels("igsr").igsr if options[-1] == "triton" else reference.igsr
    out: Tensor = run(logp, offsets, score, group, how)
    return out


@igsr.register_fake
def _(logp: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    wide = torch.float64 if logp.dtype == torch.float64 and rest[-1] != "triton" else torch.float32
    return logp.new_empty(offsets.shape[0] - 1, dtype=wide)
