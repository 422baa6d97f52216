"""Statistics of whole rows from the statistics of parts of their columns.

With lse_k the log-normaliser of part k, w_k = exp(lse_k - lse) its share of the probability, n_k its columns:

    logp            logp_k + log w_k of the part that holds the target
    lse             log sum_k exp(lse_k)
    entropy         sum_k w_k a_k,   a_k = entropy_k - log w_k
    varentropy      sum_k w_k (varentropy_k + (a_k - entropy)^2)
    self_certainty  from sum z = sum_k n_k mean_k,   mean_k = lse_k - self_certainty_k - log n_k
    topk_logp_mean  from the best logits of each part

Everything is relative to the largest logit and in float64, so that a merge costs one rounding: the K x T
numbers are few. Parts are added in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Names that each merged statistic is made from; every merge needs these two of its parts.
NORMALISER = ("top", "max_logp")
NEEDS = {
    "logp": ("logp",),
    "entropy": ("entropy",),
    "self_certainty": ("self_certainty", "count"),
    "varentropy": ("entropy", "varentropy"),
    "count": ("count",),
    "rank": ("rank",),
}
# PyTorch's vector loops round differently in their last elements and where threads meet: tokens go through
# in calls of whole vectors that one thread takes.
VECTOR, CALL = 64, 16384


def part_names(names: Sequence[str], topk: int = 0) -> tuple[str, ...]:
    """What each part has to give, so that `names` can be merged.

    With topk, topk_logp_mean needs "best0", "best1", ...: how far the `topk` largest z of the part lie below
    its top, -inf where it has fewer.
    """
    needed = [*NORMALISER, *(part for name in names for part in NEEDS.get(name, ()))]
    if "topk_logp_mean" in names:
        needed += [f"best{k}" for k in range(topk)]
    return tuple(dict.fromkeys(needed))


def merge_parts(parts: Mapping[str, Tensor], mine: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Whole-row statistics [T] for each of `names` from parts [K, T]; mine [K, T] marks the target's part.

    A part whose columns are all masked has top = -inf. A row is NaN where a part is, where all parts are
    masked (but its top is -inf), and where no part holds the target. Results have the dtype of the parts.
    """
    count = mine.shape[1]
    out = {name: torch.empty(count, dtype=parts["top"].dtype, device=mine.device) for name in names}
    for start in range(0, count, CALL):
        block = slice(start, min(start + CALL, count))
        width = -(-(block.stop - start) // VECTOR) * VECTOR
        padded = {name: _pad(value[:, block].double(), width) for name, value in parts.items()}
        merged = _merge_block(padded, _pad(mine[:, block], width), names)
        for name in names:
            out[name][block] = merged[name][: block.stop - start]
    return out


def _pad(x: Tensor, width: int) -> Tensor:
    out = x.new_zeros(len(x), width)
    out[:, : x.shape[1]] = x
    return out


def _total(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _merge_block(parts: dict[str, Tensor], mine: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    k = range(len(mine))
    top = parts["top"].amax(0)
    seen = [parts["top"][i] != -math.inf for i in k]
    # log-normaliser of each part, relative to the largest logit of the row
    size = [torch.where(seen[i], parts["top"][i] - top - parts["max_logp"][i], -math.inf) for i in k]
    log_s = _total([size[i].exp() for i in k]).log()
    bad = top.isnan() | ~log_s.isfinite() | ~mine.any(0)
    log_w = [size[i] - log_s for i in k]

    def over_parts(name: str) -> list[Tensor]:
        return [torch.where(seen[i], parts[name][i], 0.0) for i in k]

    def weighted(values: list[Tensor]) -> Tensor:
        return _total([torch.where(seen[i], log_w[i].exp() * values[i], 0.0) for i in k])

    out = {"top": top, "max_logp": -log_s, "lse": top + log_s}
    if "logp" in names:
        logp = over_parts("logp")
        out["logp"] = _total([torch.where(mine[i], logp[i] + log_w[i], 0.0) for i in k]).clamp(max=0.0)
        # a masked target lies in a part that may be masked as a whole
        masked = _total([(mine[i] & ~seen[i]).double() for i in k]) > 0
        out["logp"] = out["logp"].masked_fill(masked, -math.inf)
    if {"entropy", "varentropy"} & set(names):
        surprise = [torch.where(seen[i], h - log_w[i], 0.0) for i, h in enumerate(over_parts("entropy"))]
        out["entropy"] = weighted(surprise)
        if "varentropy" in names:
            spread = [(a - out["entropy"]) ** 2 for a in surprise]
            out["varentropy"] = weighted(
                [v + s for v, s in zip(over_parts("varentropy"), spread, strict=True)]
            )
    if {"self_certainty", "count"} & set(names):
        n = over_parts("count")
        out["count"] = _total(n)
        if "self_certainty" in names:
            certainty = over_parts("self_certainty")
            total = [torch.where(seen[i], n[i] * (size[i] - certainty[i] - n[i].log()), 0.0) for i in k]
            out["self_certainty"] = log_s - _total(total) / out["count"] - out["count"].log()
    if "rank" in names:
        out["rank"] = _total(over_parts("rank"))
    if "topk_logp_mean" in names:
        shift = torch.where(parts["top"] == -math.inf, 0.0, parts["top"] - top)
        best = [value + shift for name, value in parts.items() if name.startswith("best")]
        out["topk_logp_mean"] = _best_mean(best, log_s)
    no_top = bad & ~((top == -math.inf) & mine.any(0))
    return {n: out[n].masked_fill(no_top if n == "top" else bad, math.nan) for n in names}


def _best_mean(best: list[Tensor], log_s: Tensor) -> Tensor:
    """Mean log-probability of the best columns of all parts; best [K, T] each, relative to the largest z."""
    chosen = torch.cat(best).topk(len(best), 0).values.unbind(0)
    logp = [torch.where(z > -math.inf, z - log_s, 0.0) for z in chosen]
    return _total(logp) / _total([(z > -math.inf).double() for z in chosen])
