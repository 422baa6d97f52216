"""Scratch of one call, kept from block to block.

Blocks that allocate their own leave holes in the C library's heap: 40 to 65 MB at 64 rows, D = 128 and
V = 151936 in bf16, where 8 MB are in use.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Spare:
    """Flat tensors by name, each allocated when it is first taken or when more of it is wanted."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """`count` elements [count] of undefined values on the device of `like`, shared by name."""
        kept = self._kept.get((name, dtype))
        if kept is None or len(kept) < count:
            kept = self._kept[name, dtype] = torch.empty(count, dtype=dtype, device=like.device)
        return kept[:count]
