"""PACR's gains, returns and their normalisation on values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

import raise_core as rc
from tests.budget import assert_exact

C = torch.tensor([-4.0, -2.0, -6.0, -1.0, -3.0])
OFFSETS = torch.tensor([0, 3, 3, 5])


def test_pacr_by_hand() -> None:
    """Two chains of three and one steps, and one without any."""
    values = torch.tensor([-5.0, -4.0, -4.5, -1.0, -3.0, -2.0, -2.0], dtype=torch.float64)
    got = rc.pacr(values, torch.tensor([0, 4, 6, 7]), gamma=0.5)
    assert got.offsets.tolist() == [0, 3, 4, 4]
    assert got.gain.tolist() == [1.0, -0.5, 3.5, 1.0]
    assert got.returns.tolist() == [1.0 + 0.5 * 1.25, 1.25, 3.5, 1.0]
    assert got.normalized.tolist() == [0.25, 0.1, 1.0, 0.0]
    undiscounted = rc.pacr(values, torch.tensor([0, 4, 6, 7]))
    assert undiscounted.returns.tolist() == [4.0, 3.0, 3.5, 1.0]  # c_end - c_{k-1}


def test_pacr_by_clusters_of_equal_steps_and_with_nan() -> None:
    values = torch.tensor([0.0, -1.0, -2.0, -3.0, -1.0, math.nan, -1.0])
    offsets = torch.tensor([0, 4, 7])
    got = rc.pacr(values, offsets, gamma=0.0, cluster=torch.tensor([0, 0, 1, 1, 0]))
    assert got.gain[:3].tolist() == [-1.0] * 3 and got.gain[3:].isnan().all()
    assert got.normalized[:3].tolist() == [0.0] * 3 and got.normalized[3:].isnan().all()
    lost = rc.pacr(torch.tensor([-1.0, -math.inf, -1.0]), torch.tensor([0, 3]))
    assert lost.gain.isfinite().all() and lost.returns[0] == 0
    none = rc.pacr(values[:0], torch.tensor([0, 0]))
    assert none.gain.shape == (0,) and none.offsets.tolist() == [0, 0]
    assert_exact(none.normalized, none.gain, name="nothing")


def test_pacr_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gamma: got 1\.5"):
        rc.pacr(C, OFFSETS, gamma=1.5)
    with pytest.raises(ValueError, match=r"cluster: got shape \[2\], wanted \[3\]"):
        rc.pacr(C, OFFSETS, cluster=torch.zeros(2))
    with pytest.raises(TypeError, match="logp_gold: got list"):
        rc.pacr([-1.0], torch.tensor([0, 1]))
