"""What the processes of a run say to each other. Every function here is called by all ranks in one order.

Without `torch.distributed`, or with one process, each of them is the obvious local thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 without `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; what it raises there is raised on every rank."""
    if size() == 1:
        return make()
    said: list[Any] = [None, None]
    if rank() == 0:
        try:
            said[0] = make()
        except Exception as error:
            said[1] = error
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise said[1]
    value: T = said[0]
    return value


def gather(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    values: list[Any] = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def on_any(flag: bool) -> bool:
    """Whether some rank's flag is set: the same answer on every rank."""
    if size() == 1:
        return flag
    told = torch.tensor(int(flag), device=_device())
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told.item())


@dataclass(frozen=True)
class Part:
    """This rank's part of a tensor sharded as the DTensor `like` is, but perhaps lying elsewhere."""

    local: Tensor
    like: Any

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        size: torch.Size = self.like.shape
        return size

    @property
    def dtype(self) -> torch.dtype:
        """Of the part, and of the whole."""
        return self.local.dtype

    def numel(self) -> int:
        """Of the whole."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of one element."""
        return self.local.element_size()

    def gathered(self) -> Tensor:
        """The whole, where the DTensor lies; only now is the part brought there."""
        from torch.distributed.tensor import DTensor

        placed = self.local.to(self.like.to_local().device)
        mesh, placements = self.like.device_mesh, self.like.placements
        shape, stride = self.like.shape, self.like.stride()
        return DTensor.from_local(
            placed, mesh, placements, run_check=False, shape=shape, stride=stride
        ).full_tensor()


def whole(tensor: Tensor | Part) -> Tensor:
    """All of a tensor: a part or a DTensor is gathered, any other is this rank's own."""
    if isinstance(tensor, Part):
        return tensor.gathered()
    gathered: Callable[[], Tensor] | None = getattr(tensor.detach(), "full_tensor", None)
    return tensor.detach() if gathered is None else gathered()


def share_tensor(tensor: Tensor | None, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Rank 0's tensor on every rank; the others pass None and say what comes. As bytes: any dtype travels."""
    if size() == 1:
        assert tensor is not None
        return tensor
    told = torch.empty(shape, dtype=dtype, device=_device())
    if tensor is not None:
        told.copy_(tensor)
    if told.numel():
        dist.broadcast(told.reshape(-1).view(torch.uint8), src=0)
    return told


@torch.no_grad()
def cut(full: Tensor, like: Tensor) -> Tensor:
    """The whole tensor `full`, known to every rank, placed as `like` is: as a DTensor if that is one."""
    mesh: Any = getattr(like, "device_mesh", None)
    if mesh is None:
        return full.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(full.to(like.device), mesh, like.placements, src_data_rank=None)


def _device() -> torch.device:
    """Where the process group can send from."""
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
