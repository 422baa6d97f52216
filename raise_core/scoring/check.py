"""First-use checks of the scorer: does a packed group give what separate passes give, is the head a matrix?

A rounding is allowed, a wrong mask or position is not. What roundings come to is measured on the model at
hand: a pass of one completion is repeated with its embeddings nudged by an ulp. Roundings inside the layers
are of the same size and add up at random, so that `ROUNDINGS` of them a layer give the square root of their
number times that. A wrong position changes the result by a share of its size instead.

The ulp is that of the coarsest dtype that some module gives: under autocast, or FSDP2's mixed precision, the
weights and the last norm are fp32 and the products are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raise_core.scoring.backbone import Backbone
from raise_core.scoring.group_forward import Call, chain, plain_branch, wanted_rows
from raise_core.scoring.packing import Tree
from raise_core.scoring.tree_attention import MaskRead

ROUNDINGS = 8  # tensors that a decoder layer rounds: norms, projections, products, sums
SLACK = 2.0  # both passes round


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient; every module's mode is as before afterwards.

    Weights that autocast has cast meanwhile are dropped: a pass with gradient must not meet casts without.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.clear_autocast_cache()


@contextmanager
def dtypes_of(modules: Iterable[nn.Module]) -> Iterator[set[torch.dtype]]:
    """The floating-point dtypes that these modules and the ones inside them return meanwhile."""
    seen = set[torch.dtype]()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            seen.add(output.dtype)

    inner = {inside: None for module in modules for inside in module.modules()}
    handles = [module.register_forward_hook(note) for module in inner]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def coarsest(dtypes: Iterable[torch.dtype]) -> float:
    """The largest ulp of 1 among these dtypes."""
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def group_fault(call: Call, tree: Tree, mode: str) -> str | None:
    """How far the last branch of a group is from its plain pass, when that is too far; else None."""
    branch = max(i for i, b in enumerate(tree.branches) if b.start < b.stop)
    wanted = tree.branches[branch]
    path = [branch]
    while (parent := tree.branches[path[0]].parent) >= 0:
        path.insert(0, parent)
    here = slice(tree.first(branch) - 1 + wanted.start, tree.first(branch) - 1 + wanted.stop)
    with evaluation(call.backbone.model):
        try:
            got = wanted_rows(call, [tree], [mode])[-(wanted.stop - wanted.start) :]
        except MaskRead as error:
            return str(error)
        with dtypes_of(call.backbone.layers) as seen:
            plain = plain_branch(call, tree, branch)[here]
        eps = coarsest({plain.dtype, *seen})
        still, nudged = (chain(call, tree, path, jitter=jitter)[here] for jitter in (0.0, eps))
    layers = len(call.backbone.layers)
    allowed = SLACK * math.sqrt(ROUNDINGS * (layers + 1)) * max(_rms(nudged - still), eps * _rms(plain))
    off = _rms(got - plain)
    if off <= allowed:
        return None
    return (
        f"its hidden states are off by {off / _rms(plain):.2g} of their size, "
        f"where roundings explain {allowed / _rms(plain):.2g}"
    )


def head_fault(backbone: Backbone, tokens: int = 8, columns: int = 512) -> str | None:
    """How far the model's own logits are from cap(scale * (hidden @ weight.T + bias)); None if rounded.

    On a few tokens of text and a few columns of the vocabulary, spread over all of it.
    """
    vocabulary, size = backbone.head().weight.shape
    ids = torch.arange(vocabulary)
    ids = ids[backbone.media.kinds(ids) == 0][:tokens][None].to(backbone.device)
    with evaluation(backbone.model):
        with dtypes_of([backbone.model.get_output_embeddings()]) as seen:
            # `forward`, not a call: a pass of FSDP2's outermost module inside its own would free its weights.
            own = backbone.model.forward(input_ids=ids, use_cache=False).logits[0]
        hidden = backbone.core(input_ids=ids, use_cache=False).last_hidden_state[0]
        head = backbone.head()  # as it is after those passes, which free a sharded head's weights
        if own.shape[1] != vocabulary:
            return f"its logits have {own.shape[1]} columns, its head {vocabulary}"
        eps = coarsest({own.dtype, hidden.dtype, head.weight.dtype, *seen})
        device = head.weight.device
        some = torch.arange(0, vocabulary, max(vocabulary // columns, 1), device=device)
        own, weight, hidden = own[:, some].double(), head.weight[some].double(), hidden.to(device).double()
        z = hidden @ weight.T
        reach = hidden.norm(dim=1)[:, None] * weight.norm(dim=1)
        if head.bias is not None:
            z, reach = z + head.bias[some], reach + head.bias[some].abs()
        z, reach = head.logit_scale * z, abs(head.logit_scale) * reach
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
    # A product of D terms is off by about sqrt(D) roundings of its partial sums, which are fp32 or better and
    # of the size reach / sqrt(D); its factors are rounded as they come, and then it is itself.
    sums = min(eps, torch.finfo(torch.float32).eps)
    allowed = 4 * (eps * (reach / math.sqrt(size) + z.abs() + 1) + sums * reach)
    off = (own.to(z.device) - z).abs()
    if bool((off <= allowed).all()):
        return None
    return f"its logits differ from its head's matrix product by up to {float(off.max()):.2g}"
