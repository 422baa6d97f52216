"""AdamW on fp32 copies: small steps of bf16 weights add up, as in fp32, also after a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raise_trainer.adamw import MasterAdamW, adamw
from raise_trainer.checkpoints import TrainingState
from tests.budget import assert_exact

LR = 1e-5


class Net(nn.Module):
    """A bf16 and an fp32 weight; at 1.0 half a place of bf16 is 390 steps of LR."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.full = nn.Parameter(torch.ones(2))
        self.still = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))


def learn(net: Net, optimizer: torch.optim.Optimizer, steps: range, parts: int = 1) -> None:
    for step in steps:
        slope = torch.tensor([1.0, -2.0, 0.25 * (step + 1)])
        for _ in range(parts):
            ((net.small * slope).sum() / parts + net.full.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def oracle(steps: int) -> Tensor:
    """torch's own AdamW of an fp32 weight."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        weight.grad = torch.tensor([1.0, -2.0, 0.25 * (step + 1)])
        optimizer.step()
    return weight.detach()


def test_steps_below_a_place_of_bfloat16_add_up() -> None:
    net, lost = Net(), Net()
    optimizer = adamw(net.parameters(), LR)
    assert isinstance(optimizer, MasterAdamW)
    learn(net, optimizer, range(1000))
    learn(lost, torch.optim.AdamW(lost.parameters(), lr=LR), range(1000))
    assert_exact(optimizer.state[net.small]["master"], oracle(1000), name="fp32 copy")
    assert_exact(net.small.detach(), oracle(1000).bfloat16(), name="weight")
    assert bool((net.small != 1).all()) and bool((lost.small == 1).all())
    assert bool((net.still == 1).all()) and net.still not in optimizer.state
    assert "master" not in optimizer.state[net.full]


def test_without_16_bit_weights_it_is_torchs_own() -> None:
    optimizer = adamw([nn.Parameter(torch.ones(2))], LR)
    assert type(optimizer) is torch.optim.AdamW


def test_gradients_of_16_bit_weights_are_added_up_in_fp32() -> None:
    """256 + 1 + 1 is 258 in fp32; in bf16 each 1 is lost."""
    net = Net()
    adamw(net.parameters(), LR)
    for slope in (256.0, 1.0, 1.0):
        (net.small * slope).sum().backward()
    assert net.small.grad is not None and net.small.grad.dtype == torch.float32
    assert net.small.grad.tolist() == [258.0] * 3


def test_a_checkpoint_holds_the_copies(tmp_path: Path) -> None:
    net = Net()
    optimizer = adamw(net.parameters(), LR)
    learn(net, optimizer, range(30))
    TrainingState(net, optimizer).save(tmp_path)
    other = Net()
    resumed = adamw(other.parameters(), LR)
    TrainingState(other, resumed).load(tmp_path)
    for some, its in ((net, optimizer), (other, resumed)):
        learn(some, its, range(30, 60))
    for name, state in optimizer.state[net.small].items():
        assert_exact(resumed.state[other.small][name], state, name=name)
    assert resumed.state[other.small]["master"].dtype == torch.float32
    assert_exact(optimizer.state[net.small]["master"], oracle(60), name="as if never stopped")


def test_a_closure_is_refused() -> None:
    with pytest.raises(TypeError, match=r"closure: got one, wanted None"):
        adamw(Net().parameters(), LR).step(lambda: 0.0)
