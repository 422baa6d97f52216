"""FSDP2 (`fully_shard`): weights are there while a module's own forward pass runs; scoring calls its parts.

So a call of the scorer is made a forward pass of the outermost sharded module, by PyTorch's own
`register_fsdp_forward_method`: weights are gathered before it, and its backward pass reduces their gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
METHOD = "_raise_core_pass"


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def sharded_path(model: nn.Module, part: nn.Module) -> list[Any]:
    """The sharded modules from the model down to a part of it, that included; the last holds its weights."""
    name = next((name for name, module in model.named_modules() if module is part), "")
    path = [model]
    for step in name.split(".") if name else ():
        path.append(getattr(path[-1], step))
    return [module for module in path if is_sharded(module)]


class Shards:
    """Gathers weights for calls of a model's decoder, and of its embedding and head, by themselves.

    For a model without `fully_shard` nothing happens.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self.model, self.decoder = model, decoder

    def _around(self) -> list[Any]:
        """The sharded modules that hold the decoder, from the outermost on."""
        return [module for module in sharded_path(self.model, self.decoder) if module is not self.decoder]

    def gather(self) -> None:
        """The weights beside the decoder's: embedding, vision tower, head."""
        for module in self._around():
            module.unshard()

    def gather_head(self, head: nn.Module) -> None:
        """The head's weights, until the next backward pass.

        Raises ValueError for a head that no wrap of the model around it makes a part of that pass.
        """
        path = sharded_path(self.model, head)
        if not path:
            return
        if path[0] is head:
            raise ValueError(
                "model: got a head under fully_shard by itself, whose gradient no backward pass would "
                "reduce; wanted the whole model wrapped as well: fully_shard(model), after its layers"
            )
        for module in path:
            module.unshard()

    def forward_pass(self, embedding: nn.Module, work: Callable[[], T]) -> T:
        """`work()` as a forward pass of the outermost sharded module around the decoder.

        Raises ValueError where the decoder's own wrap holds the embedding: the decoder's backward pass would
        reduce its gradient before it is complete.
        """
        if sharded_path(self.model, embedding)[-1:] == [self.decoder]:
            raise ValueError(
                "model: got a decoder under fully_shard together with its embedding, which scoring calls by "
                "themselves; wanted the embedding wrapped first, fully_shard(model.get_input_embeddings()), "
                "or its layers and then the whole model"
            )
        around = self._around()
        if not around:
            return work()
        from torch.distributed.fsdp import register_fsdp_forward_method

        outermost = around[0]
        setattr(outermost, METHOD, work)
        register_fsdp_forward_method(outermost, METHOD)
        try:
            result: T = getattr(outermost, METHOD)()
        finally:
            delattr(outermost, METHOD)
        return result
