"""What step scores accept, and one wording of what they refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from raise_kernels._checks import check_index, check_linear, check_tensor


def check_steps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, good: int, bad: int
) -> None:
    """Refuse what `reference_steps.step_margins` cannot mean anything by."""
    check_tensor("hidden", hidden)
    no_targets = torch.zeros(hidden.shape[:-1], dtype=torch.int32, device=hidden.device)
    check_linear(hidden, weight, bias, no_targets, None)
    if rows is not None:
        check_index("rows", rows, hidden.device)
        if rows.dim() != 1:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; give one row of hidden for each tag, [S]")
    for name, token in (("good", good), ("bad", bad)):
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"{name} is {token!r}; give a token id")
        if not 0 <= token < len(weight):
            raise ValueError(
                f"{name} is {token}, weight has {len(weight)} rows; give a token id of the model"
            )
    if good == bad:
        raise ValueError(f"good and bad are both {good}; give two different token ids")
