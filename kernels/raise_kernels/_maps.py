"""Raw logits to z, and the dtype that it is computed in, in PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raise_kernels._checks import LogitMap


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 stays, everything else becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_z(x: Tensor, how: LogitMap) -> Tensor:
    """Logits, or dot products with the head, as z; -inf stays -inf."""
    a, b = how.factors
    return a * x if how.softcap is None else torch.where(x == -math.inf, x, b * torch.tanh(a * x))
