"""Group advantages against a plain fp64 loop over the groups, and what equal rewards are promised."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raise_core.advantages import group_advantages
from tests.budget import assert_at_most, assert_exact, assert_within_error_budget, sum_slack

SCALES = ("group", "batch", "none")


def loop(rewards: Tensor, group: Tensor, scale: str, min_std: float) -> list[float]:
    """The definition, one completion at a time, with the standard library's mean and sample std."""
    values, ids = rewards.tolist(), group.tolist()
    everyone = statistics.stdev(values) if len(values) > 1 else 0.0
    out = []
    for value, owner in zip(values, ids, strict=True):
        mates = [v for v, i in zip(values, ids, strict=True) if i == owner]
        std = {"group": statistics.stdev(mates) if len(mates) > 1 else 0.0, "batch": everyone, "none": 1.0}[
            scale
        ]
        floor = min_std if scale != "none" else 0.0
        out.append(0.0 if len(set(mates)) == 1 else (value - statistics.mean(mates)) / max(std, floor))
    return out


REWARDS = st.floats(0.0, 1.0, width=32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Groups of different sizes under scattered ids, in any order."""
    group = draw(st.lists(st.sampled_from([0, 1, 7, -3, 10**12]), min_size=1, max_size=24))
    rewards = draw(st.lists(REWARDS, min_size=len(group), max_size=len(group)))
    return torch.tensor(rewards, dtype=torch.float32), torch.tensor(group)


@given(batch=batches(), scale=st.sampled_from(SCALES), min_std=st.sampled_from([0.0, 0.02, 0.5]))
def test_agrees_with_the_loop(batch: tuple[Tensor, Tensor], scale: str, min_std: float) -> None:
    rewards, group = batch
    oracle = torch.tensor(loop(rewards.double(), group, scale, min_std), dtype=torch.float64)
    actual = group_advantages(rewards, group, scale=scale, min_std=min_std)
    assert_within_error_budget(actual, oracle, oracle.float(), name=scale)


@given(
    value=st.floats(allow_nan=False, allow_infinity=False),
    size=st.integers(1, 64),
    scale=st.sampled_from(SCALES),
    min_std=st.sampled_from([0.0, 1e-12, 0.02]),
)
def test_equal_rewards_have_advantage_exactly_zero(
    value: float, size: int, scale: str, min_std: float
) -> None:
    """Beside a group that does differ, so that the batch's std is not 0."""
    rewards = torch.tensor([value] * size + [0.0, 1.0], dtype=torch.float64)
    group = torch.tensor([5] * size + [2, 2])
    advantage = group_advantages(rewards, group, scale=scale, min_std=min_std)
    assert_exact(advantage[:size], torch.zeros(size, dtype=torch.float64), name="equal group")
    assert advantage.isfinite().all()


@given(batch=batches(), scale=st.sampled_from(["group", "none"]), shift=REWARDS)
def test_another_prompts_rewards_do_not_matter(
    batch: tuple[Tensor, Tensor], scale: str, shift: float
) -> None:
    rewards, group = batch
    other = group != group[0]
    changed = torch.where(other, rewards * shift, rewards)
    before = group_advantages(rewards, group, scale=scale)
    after = group_advantages(changed, group, scale=scale)
    assert_exact(after[~other], before[~other], name="own group")


@given(batch=batches(), scale=st.sampled_from(SCALES), data=st.data())
def test_reordering_permutes_and_renaming_changes_nothing(
    batch: tuple[Tensor, Tensor], scale: str, data: st.DataObject
) -> None:
    rewards, group = batch
    order = torch.tensor(data.draw(st.permutations(range(len(group)))))
    first = group_advantages(rewards, group, scale=scale)
    moved = group_advantages(rewards[order], group[order], scale=scale)
    oracle = torch.tensor(loop(rewards.double(), group, scale, 0.02), dtype=torch.float64)[order]
    assert_within_error_budget(moved, oracle, first[order], name="permuted")
    assert_exact(group_advantages(rewards, 3 - group, scale=scale), first, name="renamed")


@given(batch=batches())
def test_groups_sum_to_zero_and_are_bounded(batch: tuple[Tensor, Tensor]) -> None:
    rewards, group = batch
    advantage = group_advantages(rewards.double(), group, min_std=0.0)
    for owner in group.unique():
        mates = advantage[group == owner]
        bound = (len(mates) - 1) / len(mates) ** 0.5
        assert_at_most(mates.abs().max().float(), bound, name="largest")
        assert_within_error_budget(
            mates.float().sum().reshape(1),
            torch.zeros(1, dtype=torch.float64),
            rounding_of(mates),
            name="sum",
        )


def rounding_of(values: Tensor) -> Tensor:
    """What adding numbers of this size in fp32 may leave behind."""
    return (values.abs().sum().float() * 2 * sum_slack(len(values))).reshape(1)


def test_by_hand() -> None:
    rewards, group = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.25]), torch.tensor([4, 9, 9, 4, 1])
    half = 0.25 / 0.125**0.5  # of two rewards d apart the sample std is d / sqrt(2)
    assert_exact(
        group_advantages(rewards, group),
        torch.tensor([half, -half, half, -half, 0.0]),
        name="group, sample std",
    )
    assert_exact(
        group_advantages(rewards, group, scale="none"),
        torch.tensor([0.25, -0.25, 0.25, -0.25, 0.0]),
        name="none",
    )


def test_min_std_keeps_noise_small() -> None:
    noise = torch.tensor([0.9000, 0.9010], dtype=torch.float64)
    group = torch.tensor([0, 0])
    assert group_advantages(noise, group, min_std=0.0).abs().max() > 0.7
    assert group_advantages(noise, group).abs().max() < 0.03


def test_dtypes_shapes_and_gradients() -> None:
    group = torch.tensor([0, 0, 1], dtype=torch.int32)
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        rewards = torch.tensor([0.0, 1.0, 0.5], dtype=dtype, requires_grad=True)
        advantage = group_advantages(rewards, group)
        assert advantage.dtype == wanted and advantage.shape == (3,) and not advantage.requires_grad
    for scale in SCALES:
        assert group_advantages(torch.empty(0), torch.empty(0, dtype=torch.long), scale=scale).shape == (0,)
        assert group_advantages(torch.tensor([0.3]), torch.tensor([0]), scale=scale).tolist() == [0.0]


def test_inputs_are_not_written() -> None:
    rewards, group = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([1, 1, 0])
    copies = rewards.clone(), group.clone()
    group_advantages(rewards, group)
    assert_exact(rewards, copies[0], name="rewards")
    assert_exact(group, copies[1], name="group")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"rewards\[2\]: got (nan|-?inf), wanted a finite number"):
        group_advantages(torch.tensor([0.0, 1.0, bad, bad]), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([0.0], torch.tensor([0])), {}, TypeError, "rewards: got list"),
        ((torch.tensor([0]), torch.tensor([0])), {}, TypeError, r"rewards: got torch\.int64"),
        ((torch.tensor([0.0]), torch.tensor([0.0])), {}, TypeError, r"group: got torch\.float32"),
        ((torch.tensor([0.0]), torch.tensor([True])), {}, TypeError, r"group: got torch\.bool"),
        ((torch.zeros(2, 2), torch.zeros(2, 2).long()), {}, ValueError, r"got shapes \[2, 2\] and \[2, 2\]"),
        ((torch.zeros(2), torch.zeros(3).long()), {}, ValueError, r"got shapes \[2\] and \[3\]"),
        ((torch.zeros(1), torch.zeros(1).long()), {"scale": "std"}, ValueError, "scale: got 'std'"),
        ((torch.zeros(1), torch.zeros(1).long()), {"min_std": -1.0}, ValueError, "min_std: got -1.0"),
        ((torch.zeros(1), torch.zeros(1).long()), {"min_std": float("nan")}, ValueError, "min_std: got nan"),
    ],
)
def test_refuses(
    arguments: tuple[object, ...], options: dict[str, object], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        group_advantages(*arguments, **options)
