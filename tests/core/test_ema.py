"""The EMA reference: what it averages, that small updates do not stall, and bit-exact restore."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raise_core.ema import EmaReference
from tests.budget import assert_exact, assert_within_error_budget


class Tied(nn.Module):
    """A small language model: tied embedding and head, a norm with buffers, an integer buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.head = nn.Linear(4, 7, bias=False, dtype=dtype)
        if tie:
            self.head.weight = self.embed.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.embed(ids))))


def train(model: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    """One optimiser step's worth of change, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += (size * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        for buffer in model.buffers():
            buffer += 1
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def weights_of(reference: EmaReference) -> list[Tensor]:
    return [tensor for name, tensor in reference.state_dict().items() if name.startswith("weight.")]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_exact(actual[name], tensor, name=name)


def test_the_copy_is_frozen_in_eval_mode_and_shares_nothing() -> None:
    policy = Tied().train()
    policy(torch.tensor([0, 1, 2])).sum().backward()
    reference = EmaReference(policy)
    assert policy.training and not any(module.training for module in reference.model.modules())
    assert not any(weight.requires_grad or weight.grad is not None for weight in reference.model.parameters())
    assert all(weight.requires_grad and weight.grad is not None for weight in policy.parameters())
    before = weights(reference.model)
    assert_same(before, weights(policy))
    train(policy, 0)
    assert_same(weights(reference.model), before)
    ids = torch.tensor([0, 1, 2])
    assert_exact(reference.model(ids), reference.model(ids), name="no dropout")


def test_moves_every_so_many_steps() -> None:
    policy = Tied()
    reference = EmaReference(policy, decay=0.5, every=3)
    train(policy, 0)
    moved = []
    for finished in range(8):
        before = weights(reference.model)
        moved.append(reference.update(policy, finished))
        changed = any(not before[name].equal(now) for name, now in weights(reference.model).items())
        assert changed == moved[-1]
    assert moved == [False, False, False, True, False, False, True, False]


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.995])
def test_is_the_exponential_moving_average(decay: float) -> None:
    policy = Tied()
    reference = EmaReference(policy, decay=decay, every=1)
    oracle = {name: weight.detach().double() for name, weight in policy.named_parameters()}
    peer = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    for finished in range(1, 20):
        train(policy, finished)
        reference.update(policy, finished)
        for name, weight in policy.named_parameters():
            oracle[name] = decay * oracle[name] + (1 - decay) * weight.detach().double()
            peer[name] = decay * peer[name] + (1 - decay) * weight.detach()
    for name, weight in reference.model.named_parameters():
        assert_within_error_budget(weight.detach(), oracle[name], peer[name], name=name)
    for name, buffer in reference.model.named_buffers():
        assert_exact(buffer, dict(policy.named_buffers())[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_decay_zero_copies_and_decay_one_never_moves(dtype: torch.dtype) -> None:
    policy = Tied(dtype)
    copies, stays = EmaReference(policy, decay=0.0, every=1), EmaReference(policy, decay=1.0, every=1)
    start = weights(policy)
    for finished in range(1, 4):
        train(policy, finished)
        copies.update(policy, finished)
        stays.update(policy, finished)
    assert_same(weights(copies.model), weights(policy))
    for name, _ in policy.named_parameters():
        assert_exact(weights(stays.model)[name], start[name], name=name)


def test_tied_weights_stay_tied_and_move_once() -> None:
    policy = Tied()
    reference = EmaReference(policy, decay=0.5, every=1)
    start = policy.embed.weight.detach().clone()
    train(policy, 0)
    reference.update(policy, 1)
    assert reference.model.head.weight is reference.model.embed.weight
    wanted = start.double().lerp(policy.embed.weight.detach().double(), 0.5)
    peer = start.lerp(policy.embed.weight.detach(), 0.5)
    assert_within_error_budget(reference.model.head.weight.detach(), wanted, peer, name="moved once")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_do_not_stall_in_low_precision(dtype: torch.dtype) -> None:
    """Half a thousandth of the gap per update is below one place of the weight: lost without a master."""
    policy = nn.Linear(1, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        policy.weight.fill_(1.0)
    reference = EmaReference(policy, decay=0.9995, every=1)
    stalled = policy.weight.detach().clone()
    with torch.no_grad():
        policy.weight.fill_(1.0 + 1 / 64)
    for finished in range(1, 10_001):
        reference.update(policy, finished)
        stalled.lerp_(policy.weight.detach(), 0.0005)
    assert reference.model.weight.item() == 1.0 + 1 / 64
    assert stalled.item() == 1.0


def test_master_dtype_is_a_floor() -> None:
    policy = nn.Linear(2, 2).double()
    reference = EmaReference(policy, master_dtype=torch.float32)
    assert {tensor.dtype for tensor in weights_of(reference)} == {torch.float64}
    half = EmaReference(nn.Linear(2, 2).half(), master_dtype=torch.float64)
    assert {tensor.dtype for tensor in weights_of(half)} == {torch.float64}
    assert half.model.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restore_from_safetensors_continues_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    policy = Tied(dtype)
    reference = EmaReference(policy, decay=0.9, every=1)
    for finished in range(1, 6):
        reference.update(train(policy, finished, 0.01), finished)
    save_file(reference.state_dict(), tmp_path / "reference.safetensors")
    resumed = EmaReference(train(Tied(dtype), 99), decay=0.9, every=1)
    resumed.load_state_dict(load_file(tmp_path / "reference.safetensors"))
    assert_same(weights(resumed.model), weights(reference.model))
    for finished in range(6, 12):
        train(policy, finished, 0.01)
        reference.update(policy, finished)
        resumed.update(policy, finished)
    assert_same(weights(resumed.model), weights(reference.model))
    assert_same(resumed.state_dict(), reference.state_dict())


def test_two_runs_agree_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        policy = Tied(torch.bfloat16)
        reference = EmaReference(policy, decay=0.9, every=2)
        for finished in range(1, 9):
            reference.update(train(policy, finished), finished)
        runs.append(reference.state_dict())
    assert_same(runs[0], runs[1])


def test_the_policy_is_not_written_and_no_graph_is_kept() -> None:
    policy = train(Tied(), 0)
    reference = EmaReference(policy, decay=0.0, every=1)
    before = copy.deepcopy(weights(policy))
    reference.update(policy, 1)
    assert_same(weights(policy), before)
    assert all(
        tensor.grad_fn is None and not tensor.requires_grad for tensor in reference.state_dict().values()
    )


def test_a_policy_that_unties_or_lives_in_another_dtype() -> None:
    reference = EmaReference(Tied(), decay=0.0, every=1)
    policy = train(Tied(torch.bfloat16, tie=False), 3)
    assert reference.update(policy, 1)
    assert_exact(
        reference.model.embed.weight.detach(), policy.embed.weight.detach().float(), name="first of the tied"
    )


def test_a_policy_that_ties_what_the_reference_does_not() -> None:
    reference = EmaReference(Tied(tie=False), decay=0.0, every=1)
    policy = Tied()
    assert reference.update(policy, 1)
    assert_exact(reference.model.head.weight.detach(), policy.embed.weight.detach(), name="head")


def test_frozen_integer_parameters_are_copied() -> None:
    policy = nn.Module()
    policy.codes = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    reference = EmaReference(policy, decay=0.995, every=1, share_frozen=False)
    with torch.no_grad():
        policy.codes += 5
    reference.update(policy, 1)
    assert reference.model.codes.tolist() == [6, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.5}, "decay: got 1.5.*OLD reference"),
        ({"decay": float("nan")}, "decay: got nan"),
        ({"every": 0}, "every: got 0"),
        ({"how": "lora"}, "how: got 'lora', wanted one of auto, copy, swap, adapter"),
        ({"how": "adapter"}, 'how: got "adapter", but model is a Tied, not a peft.PeftModel; wanted "swap"'),
        ({"offload": "disk"}, "offload: got 'disk'"),
        ({"share": ["norms"]}, "share: 'norms' names no parameter"),
        ({"master_dtype": torch.int32}, r"master_dtype: got torch\.int32"),
    ],
)
def test_refuses_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmaReference(Tied(), **options)


def test_refuses_another_model() -> None:
    reference = EmaReference(Tied(), every=1)
    with pytest.raises(ValueError, match=r"model: \d+ tensors missing .*with the same wrappers"):
        reference.update(nn.Sequential(Tied()), 1)
    grown = Tied()
    grown.embed = nn.Embedding(9, 4)
    with pytest.raises(ValueError, match=r"model: embed\.weight has shape \[9, 4\], wanted \[7, 4\]"):
        reference.update(grown, 1)


def test_refuses_a_state_that_does_not_fit_and_keeps_its_own() -> None:
    reference = EmaReference(Tied(torch.bfloat16))
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    other = EmaReference(train(Tied(torch.bfloat16), 5)).state_dict()
    missing = {name: tensor for name, tensor in other.items() if name != "weight.norm.bias"}
    with pytest.raises(ValueError, match="state: 1 tensors missing"):
        reference.load_state_dict(missing)
    with pytest.raises(ValueError, match=r"state: 0 tensors missing .* 1 unknown"):
        reference.load_state_dict(other | {"weight.more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight\.embed\.weight has shape \[1\]"):
        reference.load_state_dict(other | {"weight.embed.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"got torch\.bfloat16, wanted torch\.float32; build the reference"):
        reference.load_state_dict(other | {"weight.norm.bias": other["weight.norm.bias"].bfloat16()})
    assert_same(reference.state_dict(), before)
