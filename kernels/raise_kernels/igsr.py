"""IGSR of packed spans, one program per group; the kernel is that of `confidence`."""

from __future__ import annotations

import torch
from torch import Tensor

from raise_kernels._checks import IGSR, SCRE, Igsr
from raise_kernels.confidence import span_rewards


def igsr(logp: Tensor, offsets: Tensor, score: Tensor, group: Tensor, how: Igsr = IGSR) -> Tensor:
    """As `reference.igsr`: logp [T] in nats, offsets [S+1], score [S], group [S] -> [S] fp32."""
    strict = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    return span_rewards(logp, offsets, score, strict, group, None, SCRE, how).reward
