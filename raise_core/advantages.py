"""Group advantages: `A_i = (r_i - mean of its group) / max(std, min_std)`.

Exactly 0 in a group of equal rewards. GRPO (arXiv 2402.03300) divides by the group's std, Dr.GRPO
(2503.20783) by nothing, `batch` by the std of all rewards.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Tensor,  # [B]
    group: Tensor,  # [B] integer
    *,
    scale: Scale = "group",
    min_std: float = 0.02,
) -> Tensor:
    """Advantage of each of B completions inside its prompt's group, [B], on the device of `rewards`.

    group: any integers, in any order; groups may differ in size. A group of one has advantage 0.
    scale: "group" divides by the std of the group's rewards, "batch" by that of all B rewards, "none" by 1.
        Std is the sample std (n - 1), as in TRL and verl.
    min_std: smallest divisor, in units of reward. Confidence rewards of right answers differ by little;
        without a floor that noise would become advantages of ±1. The default is ours.
    fp32 out (fp64 for fp64 rewards), computed in fp64 on the host: rewards are few, the result is the same on
    every device and in every order of summation that a device may choose. No gradient flows.
    Raises ValueError for a reward that is not finite (naming its index), TypeError for wrong dtypes.
    """
    _check(rewards, group, scale, min_std)
    values = rewards.detach().to("cpu", torch.float64)
    _, member = torch.unique(group.detach().cpu(), return_inverse=True)
    groups = int(member.max()) + 1 if len(member) else 0
    centred, size = _centre(values, member, groups)
    if scale == "group":
        variance = _sum(centred * centred, member, groups) / (size - 1).clamp(min=1)
        advantage = centred / variance.sqrt().clamp(min=min_std)[member]
    elif scale == "batch":
        deviation = values - values.mean()
        std = ((deviation * deviation).sum() / max(len(values) - 1, 1)).sqrt()
        advantage = centred / std.clamp(min=min_std)
    else:
        advantage = centred
    # 0 / 0 when min_std is 0, and the rounding of a mean, must not reach a group without differences.
    advantage = torch.where(_all_equal(values, member, groups)[member], 0.0, advantage)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return advantage.to(rewards.device, dtype)


def _sum(values: Tensor, member: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=values.dtype).index_add_(0, member, values)


def _centre(values: Tensor, member: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    size = _sum(torch.ones_like(values), member, groups)
    return values - (_sum(values, member, groups) / size)[member], size


def _all_equal(values: Tensor, member: Tensor, groups: int) -> Tensor:
    empty = torch.zeros(groups, dtype=values.dtype)
    low = empty.scatter_reduce(0, member, values, "amin", include_self=False)
    high = empty.scatter_reduce(0, member, values, "amax", include_self=False)
    return low == high


def _check(rewards: Tensor, group: Tensor, scale: str, min_std: float) -> None:
    for name, value in (("rewards", rewards), ("group", group)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, wanted a [B] tensor; use torch.tensor(...)")
    if not rewards.dtype.is_floating_point:
        raise TypeError(f"rewards: got {rewards.dtype}, wanted a floating dtype; use rewards.float()")
    if group.dtype.is_floating_point or group.dtype == torch.bool:
        raise TypeError(f"group: got {group.dtype}, wanted integer prompt ids; use group.long()")
    if rewards.ndim != 1 or group.shape != rewards.shape:
        raise ValueError(
            f"rewards, group: got shapes {list(rewards.shape)} and {list(group.shape)}, wanted the same [B]; "
            "flatten [P, G] rewards and pass the prompt index of each"
        )
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: got {scale!r}, wanted 'group', 'batch' or 'none'")
    if not 0.0 <= min_std < float("inf"):
        raise ValueError(f"min_std: got {min_std}, wanted a finite number, 0 or more")
    broken = (~torch.isfinite(rewards.detach())).nonzero()
    if len(broken):
        at = int(broken[0])
        raise ValueError(
            f"rewards[{at}]: got {float(rewards[at])}, wanted a finite number; drop the row or "
            "set its reward to 0"
        )
