"""Progress of each reasoning step towards the reference answer (PACR, arXiv 2605.13467)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raise_core.family.segments import LEAST, as_given, by_span, each_alone, packed_logp, per_span


@dataclass(frozen=True, eq=False)
class Progress:
    """Of K reasoning steps of S chains, packed; offsets [S+1] into K. A chain of n + 1 values has n steps.

    gain [K]: what the step adds to log p(answer) [nats]. returns [K]: discounted sum of this and all later
    gains. normalized [K]: returns in [0, 1]. fp32, or fp64 for fp64.
    """

    gain: Tensor
    returns: Tensor
    normalized: Tensor
    offsets: Tensor


def pacr(
    logp_gold: Tensor, offsets: Tensor, *, gamma: float = 1.0, cluster: Tensor | None = None
) -> Progress:
    """Process rewards of reasoning steps (PACR, and PDCR's clusters, arXiv 2605.13467).

        c_k = log p(answer | prompt, steps 1..k)    g_k = c_k - c_{k-1}    G_k = sum_{m >= k} gamma^(m-k) g_m
        normalized_k = (G_k - min G) / (max G - min G), over all steps of the call, or over each cluster

    logp_gold [T] in nats: for each of S chains c_0 (before any step), c_1, …; offsets [S+1]. cluster [K]
    integer: of each step, such as visual and textual steps in PDCR. A chain of fewer than two values has no
    steps. Where all returns are equal they are normalized to 0. A NaN stays with its chain. ValueError for
    gamma outside 0..1.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma: got {gamma}, wanted a number from 0 to 1")
    values = packed_logp(logp_gold, offsets, "logp_gold").clamp(min=LEAST)
    gains = [chain.diff() if len(chain) else chain for chain in by_span(values, offsets)]
    empty = values.new_zeros(0)
    gain = torch.cat([empty, *gains])
    returns = torch.cat([empty, *(_discounted(own, gamma) for own in gains)])
    bounds = torch.tensor([0, *map(len, gains)], device=offsets.device).cumsum(0)
    if cluster is None:
        cluster = bounds.new_zeros(len(gain))
    cluster = per_span("cluster", cluster, each_alone(len(gain), offsets))
    normalized = torch.zeros_like(returns)
    for kind in sorted(set(cluster.tolist())):
        rows = cluster == kind
        normalized[rows] = _min_max(returns[rows])
    return Progress(
        as_given(gain, logp_gold), as_given(returns, logp_gold), as_given(normalized, logp_gold), bounds
    )


def _discounted(gain: Tensor, gamma: float) -> Tensor:
    """G_k = g_k + gamma * G_{k+1}."""
    found, after = list[Tensor](), gain.new_zeros(())
    for value in gain.flip(0):
        after = value + gamma * after
        found.append(after)
    return torch.stack(found[::-1]) if found else gain


def _min_max(values: Tensor) -> Tensor:
    known = values[~values.isnan()]
    if not len(known) or known.min() == known.max():
        return torch.where(values.isnan(), values, 0.0)
    return (values - known.min()) / (known.max() - known.min())
