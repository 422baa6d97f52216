"""Two published bonuses on top of a group's accuracy rewards: T-GRPO's and GRPO-CARE's.

Computed in fp64 on the host, so that the result is the same on every device; no gradient flows. What comes
back is the bonus alone: add it to the rewards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raise_core.ops.loss import check_bounds, check_tensor


def temporal_bonus(
    acc: Tensor,  # [B]
    acc_shuffled: Tensor,  # [B']
    group: Tensor,  # [B] integer
    group_shuffled: Tensor,  # [B'] integer
    *,
    weight: float = 0.3,
    ratio: float = 0.8,
    least: float = 0.1,
) -> Tensor:
    """Bonus [B] of T-GRPO (Video-R1, arXiv 2503.21776): the order of the frames has to help.

        b_i = weight * [acc_i > least] * [mean acc of i's group >= ratio * mean acc_shuffled of i's group]

    acc: accuracy of each completion, in [0, 1]; acc_shuffled: of completions of the same prompts with their
    videos' frames shuffled. group, group_shuffled: the prompt of each, any integers; a group without shuffled
    completions (a prompt without video) gets 0, and shuffled ones of no group are ignored.
    Defaults are those of Video-R1's code, which samples G / 2 shuffled completions. The bonus has the dtype
    and device of `acc`. Raises TypeError / ValueError naming the argument; accuracies must be finite.
    """
    _check("acc", acc, "group", group)
    _check("acc_shuffled", acc_shuffled, "group_shuffled", group_shuffled)
    for name, value in (("weight", weight), ("ratio", ratio), ("least", least)):
        _check_number(name, value)
    mine, other = acc.detach().cpu().double(), acc_shuffled.detach().cpu().double()
    ids, member = torch.unique(group.cpu(), return_inverse=True)
    known = torch.isin(group_shuffled.cpu(), ids)
    other, place = other[known], torch.searchsorted(ids, group_shuffled.cpu()[known].to(ids.dtype))
    size, size_shuffled = (_sum(torch.ones_like(v), m, len(ids)) for v, m in ((mine, member), (other, place)))
    mean = _sum(mine, member, len(ids)) / size
    mean_shuffled = _sum(other, place, len(ids)) / size_shuffled.clamp(min=1)
    helps = (size_shuffled > 0) & (mean >= ratio * mean_shuffled)
    return (weight * ((acc.detach().cpu() > least) & helps[member]).double()).to(acc)


def consistency_bonus(
    logp: Tensor,  # [T] nats
    offsets: Tensor,  # [S+1]
    acc: Tensor,  # [S]
    group: Tensor,  # [S] integer
    *,
    weight: float = 0.5,
    upper: float = 0.95,
    margin: float = 0.01,
    least: float = 0.1,
) -> Tensor:
    """Bonus [S] of GRPO-CARE (arXiv 2506.16141): the reference has to find an accurate answer likely.

        L_i = min(exp(mean_j logp_ij), upper)
        H   = those of the group with acc_i > least and acc_i >= mean acc of the group
        b_i = weight * acc_i * [i in H] * [L_i >= mean L over H - margin]

    logp: of the answers' tokens under the reference, packed by offsets; one answer per completion. acc: their
    accuracy, in [0, 1]. group: the prompt of each, any integers. Defaults are those of GRPO-CARE's code; that
    takes an answer without tokens for a certain one, while here an empty span is not in H and gets 0, and
    still counts in the mean accuracy. The bonus has the dtype and device of `acc`. Equal values are never
    below their mean, whatever its rounding. Raises TypeError / ValueError naming the argument; accuracies
    must be finite, and a NaN in an answer of H is refused.
    """
    _check("acc", acc, "group", group)
    for name, value in (("weight", weight), ("margin", margin), ("least", least)):
        _check_number(name, value)
    if not 0.0 < upper <= 1.0:
        raise ValueError(f"upper: got {upper}, wanted a probability above 0, at most 1")
    check_tensor("logp", logp)
    if logp.ndim != 1 or not logp.dtype.is_floating_point:
        raise ValueError(f"logp: got {logp.dtype} of shape {list(logp.shape)}, wanted floating [T], packed")
    check_tensor("offsets", offsets)
    if offsets.shape != (len(acc) + 1,):
        raise ValueError(
            f"offsets: got shape {list(offsets.shape)}, wanted [{len(acc) + 1}], one span for each of acc"
        )
    bounds = offsets.detach().cpu().long()
    check_bounds(bounds, len(logp))
    values = acc.detach().cpu().double()
    ids, member = torch.unique(group.cpu(), return_inverse=True)
    lengths = bounds.diff()
    span = torch.repeat_interleave(torch.arange(len(values)), lengths)
    total = _sum(logp.detach().cpu().double(), span, len(values))
    likely = (total / lengths.clamp(min=1)).exp().clamp(max=upper)
    above = acc.detach().cpu() > least  # in the dtype of acc, where 0.1 is not above 0.1
    mean = _mean(values, member, torch.ones_like(above), len(ids))
    accurate = above & (values >= mean[member]) & (lengths > 0)
    if (broken := (accurate & likely.isnan()).nonzero()).numel():
        raise ValueError(
            f"logp: NaN in the answer of completion {int(broken[0])}; drop it or set its acc to 0"
        )
    confident = likely >= _mean(likely, member, accurate, len(ids))[member] - margin
    return (weight * values * (accurate & confident)).to(acc)


def _sum(values: Tensor, member: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=torch.float64).index_add_(0, member, values)


def _mean(values: Tensor, member: Tensor, chosen: Tensor, groups: int) -> Tensor:
    """Mean of the chosen of each group, never above the largest of them; 0 where none is."""
    count = _sum(chosen.double(), member, groups)
    mean = _sum(torch.where(chosen, values, 0.0), member, groups) / count.clamp(min=1)
    lowest = torch.full_like(mean, -torch.inf)
    largest = lowest.scatter_reduce(0, member, torch.where(chosen, values, -torch.inf), "amax")
    return torch.where(count > 0, torch.minimum(mean, largest), 0.0)


def _check(name: str, values: Tensor, group_name: str, group: Tensor) -> None:
    for called, value in ((name, values), (group_name, group)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{called}: got {type(value).__name__}, wanted a 1-D tensor; use torch.tensor(...)"
            )
    if not values.dtype.is_floating_point:
        raise TypeError(f"{name}: got {values.dtype}, wanted a floating dtype; use {name}.float()")
    if group.dtype.is_floating_point or group.dtype == torch.bool:
        raise TypeError(
            f"{group_name}: got {group.dtype}, wanted integer prompt ids; use {group_name}.long()"
        )
    if values.ndim != 1 or group.shape != values.shape:
        raise ValueError(
            f"{name}, {group_name}: got shapes {list(values.shape)} and {list(group.shape)}, wanted one [B]"
        )
    broken = (~torch.isfinite(values.detach())).nonzero()
    if len(broken):
        at = int(broken[0])
        raise ValueError(
            f"{name}[{at}]: got {float(values[at])}, wanted a finite accuracy; drop that completion"
        )


def _check_number(name: str, value: float) -> None:
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name}: got {value}, wanted a finite number, 0 or more")
