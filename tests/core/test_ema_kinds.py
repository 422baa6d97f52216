"""Kinds of reference, as a copy or swapped in: what each computes with, shares, saves and restores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import raise_core as rc
from tests.budget import assert_exact, assert_within_error_budget

IDS = torch.tensor([0, 3, 6])


class Video(nn.Module):
    """A tower, a tied embedding and head, a norm with buffers."""

    def __init__(self, dtype: torch.dtype = torch.float32, freeze: bool = True) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 4, dtype=dtype)
        self.embed = nn.Embedding(7, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 7, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.tower.requires_grad_(not freeze)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.tower(self.embed(ids)))))


def train(model: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += (size * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        for buffer in model.buffers():
            buffer += 1
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_exact(actual[name], tensor, name=name)


def inside(reference: rc.Reference) -> dict[str, Tensor]:
    with reference.active() as model:
        return bits(model)


MAKERS = {
    "policy": rc.PolicyReference,
    "frozen copy": lambda model: rc.FrozenReference(model, how="copy"),
    "frozen swap": lambda model: rc.FrozenReference(model, how="swap"),
    "frozen on the host": lambda model: rc.FrozenReference(model, offload="cpu"),
    "ema copy": lambda model: rc.EmaReference(model, decay=0.5, every=1),
    "ema swap": lambda model: rc.EmaReference(model, decay=0.5, every=1, how="swap"),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_is_asked_for_in_one_way(kind: str, dtype: torch.dtype) -> None:
    policy = Video(dtype).train()
    policy.norm.eval()
    start = bits(policy)
    reference = MAKERS[kind](policy)
    train(policy, 1)
    assert reference.update(policy, 1) == kind.startswith("ema")
    now = bits(policy)
    expected = {"policy": now, "frozen": start}.get(kind.split()[0])
    if expected is None:
        average = start["embed.weight"].float().lerp(now["embed.weight"].float(), 0.5).to(dtype)
        expected = {**now, "embed.weight": average, "head.weight": average}
        for name in ("norm.weight", "norm.bias"):
            expected[name] = start[name].float().lerp(now[name].float(), 0.5).to(dtype)
    with reference.active() as model:
        assert model is reference.model
        assert not torch.is_grad_enabled() and not any(m.training for m in model.modules())
        assert_same(bits(model), expected)
        assert model.head.weight is model.embed.weight
        assert_exact(model(IDS), model(IDS), name="no dropout")
    assert torch.is_grad_enabled()
    assert_same(bits(policy), now)
    assert policy.training and policy.drop.training and not policy.norm.training
    assert policy.embed.weight.requires_grad and not policy.tower.weight.requires_grad
    policy(IDS).sum().backward()
    assert policy.embed.weight.grad is not None


@pytest.mark.parametrize("kind", MAKERS)
def test_the_policy_is_put_back_after_an_exception(kind: str) -> None:
    policy = Video().train()
    reference = MAKERS[kind](policy)
    before = bits(train(policy, 2))
    with pytest.raises(KeyError, match="in the reward"), reference.active():
        raise KeyError("in the reward")
    assert_same(bits(policy), before)
    assert policy.training and torch.is_grad_enabled()


def test_the_policy_is_put_back_when_entering_fails() -> None:
    policy = Video().train()
    reference = rc.EmaReference(policy, how="swap")
    train(policy, 2)
    policy.norm.running_var = torch.zeros(9)
    before = bits(policy)
    with pytest.raises(RuntimeError, match="size of tensor"), reference.active():
        pass
    assert_same(bits(policy), before)
    assert policy.training


@given(
    st.floats(0, 1),
    st.lists(st.integers(0, 2**31), min_size=1, max_size=4),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_swapped_copied_and_offloaded_averages_are_one(
    decay: float, seeds: list[int], dtype: torch.dtype
) -> None:
    """And in closed form: theta_ref = decay^n theta_0 + sum over i of (1 - decay) decay^(n-i) theta_i."""
    policy = Video(dtype)
    kinds: list[dict[str, Any]] = [{}, {"how": "swap"}, {"how": "copy", "offload": "cpu"}, {"offload": "cpu"}]
    references = [rc.EmaReference(policy, decay=decay, every=1, **kind) for kind in kinds]
    master = torch.promote_types(dtype, torch.float32)
    count = len(seeds)
    start = policy.embed.weight.detach()
    oracle = start.double() * decay**count
    peer = start.to(master)
    for step, seed in enumerate(seeds, 1):
        train(policy, seed)
        weight = policy.embed.weight.detach()
        oracle = oracle + (1 - decay) * decay ** (count - step) * weight.double()
        peer = peer * decay + weight.to(master) * (1 - decay)
        for reference in references:
            reference.update(policy, step)
    for reference in references[1:]:
        assert_same(reference.state_dict(), references[0].state_dict())
        assert_same(inside(reference), inside(references[0]))
    average = references[0].state_dict()["weight.embed.weight"]
    assert average.dtype == master
    assert_within_error_budget(average, oracle, peer, name="closed form")
    with references[1].active() as model:
        assert_exact(model.embed.weight.detach(), average.to(dtype), name="rounded once")


def test_a_frozen_tower_is_shared_and_costs_nothing() -> None:
    policy = Video()
    reference = rc.EmaReference(policy, every=1, how="copy")
    assert reference.model.tower.weight is policy.tower.weight
    assert reference.model.embed.weight is not policy.embed.weight
    assert not any("tower" in name for name in reference.state_dict())
    swapped = rc.EmaReference(policy, how="swap").state_dict()
    assert swapped.keys() == reference.state_dict().keys()
    own = rc.EmaReference(policy, share_frozen=False)
    assert own.model.tower.weight is not policy.tower.weight
    assert "weight.tower.bias" in own.state_dict()
    assert own.update(train(policy, 3), 10)


def test_a_shared_tower_that_is_trained_later_is_refused() -> None:
    policy = Video()
    reference = rc.EmaReference(policy, every=1)
    policy.tower.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model: tower\.weight requires a gradient now.*share_frozen=False"):
        reference.update(policy, 1)
    assert reference.step == 0


@pytest.mark.parametrize("how", ["copy", "swap"])
def test_what_is_asked_for_is_shared_though_it_is_trained(how: str) -> None:
    policy = Video(freeze=False)
    reference = rc.EmaReference(policy, decay=0.5, every=1, how=how, share=["tower", "head.weight"])
    assert [name for name in reference.state_dict() if name.startswith("weight.")] == [
        "weight.norm.weight",
        "weight.norm.bias",
    ]
    now = bits(train(policy, 4))
    assert reference.update(policy, 1)
    seen = inside(reference)
    for name in ("tower.weight", "embed.weight"):
        assert_exact(seen[name], now[name], name=name)
    assert not seen["norm.weight"].equal(now["norm.weight"])
    assert policy.tower.weight.requires_grad and policy.embed.weight.requires_grad


@pytest.mark.parametrize("kind", [rc.EmaReference, rc.FrozenReference])
def test_a_policy_of_which_nothing_is_trained_is_refused(kind: Any) -> None:
    frozen = Video().requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of its parameters is trained.*share_frozen=False"):
        kind(frozen)
    assert kind(frozen, share_frozen=False).model is not frozen


def test_a_frozen_copy_has_nothing_to_offload() -> None:
    with pytest.raises(ValueError, match=r"offload: got 'cpu' with how=\"copy\".*how=\"swap\""):
        rc.FrozenReference(Video(), how="copy", offload="cpu")


def test_references_nest_and_a_lent_policy_is_not_averaged() -> None:
    policy = Video()
    start = bits(policy)
    frozen, average = rc.FrozenReference(policy, how="swap"), rc.EmaReference(policy, every=1, how="swap")
    now = bits(train(policy, 5))
    average.update(policy, 1)
    followed = inside(average)
    with average.active():
        with frozen.active(), frozen.active() as model:
            assert_same(bits(model), start)
        assert_same(bits(policy), followed)
        with pytest.raises(RuntimeError, match=r"update: the policy holds.*leave `active\(\)` first"):
            average.update(policy, 2)
    assert_same(bits(policy), now)
    assert average.update(policy, 2)


def test_a_graph_that_waits_for_its_backward_is_not_silently_wrong() -> None:
    policy = Video()
    reference = rc.EmaReference(policy, how="swap")
    loss = policy(IDS).square().sum()
    with reference.active():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_are_counted_and_never_twice() -> None:
    policy = Video()
    reference = rc.EmaReference(policy, decay=0.5, every=2)
    train(policy, 6)
    assert reference.update(policy, 2)
    before = inside(reference)
    assert not reference.update(policy, 2)
    assert_same(inside(reference), before)
    with pytest.raises(ValueError, match="step: got 1, but the reference has followed step 2"):
        reference.update(policy, 1)
    assert not reference.update(policy, 3) and reference.step == 3


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = Video(dtype)
    reference = MAKERS[kind](policy)
    for step in range(1, 4):
        reference.update(train(policy, step, 0.01), step)
    file = reference.save(tmp_path / "reference.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    twin = copy.deepcopy(policy)
    resumed = MAKERS[kind](twin)
    resumed.load(file)
    assert resumed.step == 3
    for step in range(4, 7):
        assert_same(inside(resumed), inside(reference))
        for model, its in ((policy, reference), (twin, resumed)):
            its.update(train(model, step, 0.01), step)
    assert_same(resumed.state_dict(), reference.state_dict())


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    reference = rc.EmaReference(Video())
    file = rc.EmaReference(Video(freeze=False)).save(tmp_path / "whole.safetensors")
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    with pytest.raises(ValueError, match=r"2 unknown \(first \['weight\.tower\.bias'\]\).*frozen parameters"):
        reference.load(file)
    with pytest.raises(FileNotFoundError, match="path: no file"):
        reference.load(tmp_path / "nowhere.safetensors")
    assert_same(reference.state_dict(), before)


def test_wrappers_are_looked_through() -> None:
    policy = Video()
    compiled: Any = torch.compile(policy)
    reference = rc.EmaReference(compiled, decay=0.5, every=1)
    train(policy, 7)
    assert reference.update(compiled, 1)
    assert type(reference.model) is Video


@pytest.mark.parametrize("kind", MAKERS)
def test_rewards_and_update_without_kl(kind: str) -> None:
    """One GRPO step whose only use of the reference is the reward's confidence."""
    policy = Video().train()
    reference = MAKERS[kind](policy)
    optimizer = torch.optim.SGD([weight for weight in policy.parameters() if weight.requires_grad], lr=0.1)
    offsets, group = torch.tensor([0, 2, 3]), torch.zeros(2, dtype=torch.long)
    spans = rc.Spans(torch.arange(3), IDS, offsets, group, torch.arange(2))
    scores = []
    for step in (1, 2):
        with reference.active() as model:
            rewards = rc.confidence_rewards(
                spans, torch.ones(2), torch.ones(2, dtype=torch.bool), logits=model(IDS), impl="reference"
            )
        scores.append(rewards.confidence)
        advantage = rc.group_advantages(rewards.reward, spans.group)
        logp = rc.token_stats(policy(IDS), IDS, impl="reference").logp
        loss = rc.policy_loss(
            logp, logp.detach(), advantage, spans.offsets, kl=0.0, num_tokens=3, num_sequences=2
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reference.update(policy, step)
    assert scores[0].equal(scores[1]) == kind.startswith("frozen")
