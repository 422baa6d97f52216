"""Attention over a packed tree: a prompt, and branches that see the prompt and themselves.

`[prompt | c_1 | … | c_G]` is one sequence. With `scaled_dot_product_attention` the layout itself travels in
the place of the mask, as a `TreeMask`: PyTorch's own extension point hands the call to `attend`, which never
forms an [L, L] matrix and reads a prompt's keys once for all that follow it (`flash_tree`). It is an argument
of the layers like any mask, so recomputation under gradient checkpointing sees it too, and the model stays as
it is. Other attention code gets `dense_mask`.

There are no FlashAttention kernels for fp32 on a GPU: there attention goes node by node and copies the
prompt's keys and values for each branch. With grouped queries transformers repeats keys and values for all H
heads whenever it is given a mask, so that `attend` sees H heads of each and the repeated ones are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from raise_core.scoring.flash_tree import flash_for, plan, tree_attention


@dataclass(frozen=True)
class Layout:
    """A packed sequence of nodes, in order; a node's tokens see its ancestors' and their own past.

    lengths: tokens of each node, 1 or more. parents: index of the node it follows, always an earlier one;
    -1 for a prompt. cached: how many leading nodes have keys and values but no queries in this pass.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    cached: int = 0

    def path(self, node: int) -> list[int]:
        """The node's ancestors, from the prompt down, and the node itself."""
        found = [node]
        while self.parents[found[0]] >= 0:
            found.insert(0, self.parents[found[0]])
        return found

    @property
    def keys(self) -> int:
        """Tokens that have a key."""
        return sum(self.lengths)

    @property
    def queries(self) -> int:
        """Tokens that have a query in this pass."""
        return sum(self.lengths[self.cached :])


def attend(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of a packed tree: query [1, H, layout.queries, E]; key, value [1, H, layout.keys, E].

    By `flash_tree` where it has kernels (CPU; fp16 and bf16 on a GPU), else a call for each node.
    Differentiable.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    kernels = flash_for(query, key, value, gqa=enable_gqa) if dropout_p == 0.0 else None
    if kernels is None:
        return node_by_node(
            layout, query, key, value, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
        )
    calls = plan(layout.lengths, layout.parents, layout.cached)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return tree_attention(kernels, calls, query, key, value, scale)


def node_by_node(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """One call for each node, a branch's with copies of its path's keys: on every device, with dropout."""
    sizes = list(layout.lengths)
    keys, values = torch.split(key, sizes, 2), torch.split(value, sizes, 2)
    queries = torch.split(query, sizes[layout.cached :], 2)
    out = []
    for node, q in enumerate(queries, layout.cached):
        path = layout.path(node)
        alone = len(path) == 1
        out.append(
            scaled_dot_product_attention(
                q,
                keys[node] if alone else torch.cat([keys[a] for a in path], 2),
                values[node] if alone else torch.cat([values[a] for a in path], 2),
                attn_mask=None if alone else _lower_right(layout, path, query.device),
                dropout_p=dropout_p,
                is_causal=alone,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        )
    return torch.cat(out, 2)


def _lower_right(layout: Layout, path: Sequence[int], device: torch.device) -> Tensor:
    """True where the last node of the path may look: all ancestors, and its own past."""
    n, seen = layout.lengths[path[-1]], sum(layout.lengths[a] for a in path)
    return torch.ones(n, seen, dtype=torch.bool, device=device).tril(seen - n)


def dense_mask(layout: Layout, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The same rule as an additive mask [1, 1, queries, keys]: 0, or the least number of the dtype."""
    starts = torch.tensor([0, *layout.lengths]).cumsum(0).tolist()
    allowed = torch.zeros(layout.keys, layout.keys, dtype=torch.bool)
    for node, n in enumerate(layout.lengths):
        rows = slice(starts[node], starts[node] + n)
        for a in layout.path(node)[:-1]:
            allowed[rows, starts[a] : starts[a + 1]] = True
        allowed[rows, rows] = torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    return mask[None, None, layout.keys - layout.queries :].to(device)


# What layers, and the hooks of FSDP2, accelerate and checkpointing, ask any tensor; none of it is a value.
_READS: set[Any] = {
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "is_cuda",
        "is_meta",
        "requires_grad",
        "is_leaf",
    )
} | {Tensor.dim, Tensor.size, Tensor.__len__, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex}
_READS |= {torch.is_floating_point, torch.is_complex, torch.numel}


class MaskRead(ValueError):
    """Something other than `scaled_dot_product_attention` read the values of a `TreeMask`."""


class TreeMask(Tensor):
    """A mask [1, 1, queries, keys] that holds its layout and no matrix.

    `scaled_dot_product_attention` given one runs `attend`. Every other use of its values raises MaskRead: an
    attention that would read it as numbers must not go on with wrong ones.
    """

    tree: Layout

    @staticmethod
    def of(layout: Layout, device: torch.device | str) -> TreeMask:
        """The mask of a layout."""
        shape = (1, 1, layout.queries, layout.keys)
        mask = torch.ones((), dtype=torch.bool, device=device).expand(shape).as_subclass(TreeMask)
        mask.tree = layout
        return mask

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return _attend_from_call(*args, **kwargs)
        if func in _READS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.to:
            return cls._moved(*args, **kwargs)
        raise MaskRead(
            f"a packed group's mask was read by {getattr(func, '__name__', func)}, not by "
            'scaled_dot_product_attention; load the model with attn_implementation="sdpa" or "eager"'
        )

    @staticmethod
    def _moved(mask: TreeMask, *args: Any, **kwargs: Any) -> TreeMask:
        """`.to(device)`, which hooks that place inputs call; the dtype is the mask's own affair."""
        device = kwargs.get("device", next((a for a in args if not isinstance(a, torch.dtype)), mask.device))
        device = device.device if isinstance(device, Tensor) else torch.device(device)
        return mask if device == mask.device else TreeMask.of(mask.tree, device)


def _attend_from_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: TreeMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The arguments of `scaled_dot_product_attention`, as they come."""
    if is_causal:
        raise ValueError("is_causal: got True beside a packed group's mask, which says it all; wanted False")
    return attend(attn_mask.tree, query, key, value, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa)
