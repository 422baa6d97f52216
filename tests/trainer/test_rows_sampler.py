"""No row is lost or used twice in an epoch, whatever the steps, the processes and the interruptions."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raise_trainer.errors import UserError
from raise_trainer.sampler import RowSampler

GOLDEN = [1, 4, 7, 0, 2, 5, 3, 6]


def step(samplers: list[RowSampler], count: int | None = None) -> list[int]:
    """The rows of a step in the global order, from every process's share."""
    shares = [s.take(count) for s in samplers]
    world = len(shares)
    total = sum(map(len, shares))
    return [shares[place % world][place // world] for place in range(total)]


def group(world: int, **settings: Any) -> list[RowSampler]:
    return [RowSampler(rank=r, world=world, **settings) for r in range(world)]


@given(
    rows=st.integers(1, 40),
    per_step=st.integers(1, 12),
    world=st.integers(1, 4),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**70),
)
@settings(max_examples=150, deadline=None)
def test_every_row_once_in_every_epoch(rows: int, per_step: int, world: int, epochs: int, seed: int) -> None:
    per_step = max(per_step, world)
    samplers = group(world, rows=rows, per_step=per_step, seed=seed)
    used: list[int] = []
    while len(used) < rows * epochs:
        used += step(samplers)
    for epoch in range(epochs):
        assert sorted(used[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(
    rows=st.integers(1, 30),
    worlds=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    sizes=st.lists(st.integers(4, 9), min_size=5, max_size=5),
    extra=st.integers(0, 5),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_resuming_on_another_number_of_processes_keeps_the_global_order(
    rows: int, worlds: list[int], sizes: list[int], extra: int, seed: int
) -> None:
    straight = RowSampler(rows, per_step=1, seed=seed)
    state, used = straight.state_dict(), []
    for world, per_step in zip(worlds, sizes, strict=False):
        samplers = group(world, rows=rows, per_step=per_step, seed=seed)
        for sampler in samplers:
            sampler.load_state_dict(state)
        used += step(samplers) + step(samplers, extra) + step(samplers)
        assert len({str(s.state_dict()) for s in samplers}) == 1
        state = samplers[0].state_dict()
    assert used == [straight.take()[0] for _ in used]
    assert state == straight.state_dict()


def test_looking_ahead_takes_nothing() -> None:
    sampler = RowSampler(10, per_step=4, seed=0)
    ahead = sampler.peek(8)
    assert sampler.peek() == ahead[:4] and sampler.position == 0
    assert sampler.take() + sampler.take() == ahead
    assert sampler.position == 8 and sampler.epoch == 0.8


def test_epochs_and_seeds_differ_and_the_order_is_mixed() -> None:
    one = RowSampler(200, per_step=200, seed=0)
    other = RowSampler(200, per_step=200, seed=1)
    orders = [one.take(), one.take(), other.take()]
    assert len(set(map(tuple, orders))) == 3 and list(range(200)) not in orders


def test_the_order_is_the_same_for_ever() -> None:
    assert RowSampler(8, per_step=8, seed=3).take() == GOLDEN


def test_shares_differ_by_one_at_most() -> None:
    shares = [s.peek() for s in group(3, rows=50, per_step=8, seed=0)]
    assert Counter(map(len, shares)) == {3: 2, 2: 1}


@pytest.mark.parametrize("name, value", [("rows", 11), ("seed", 1)])
def test_another_data_set_or_seed_is_no_continuation(name: str, value: int) -> None:
    state = RowSampler(10, per_step=2, seed=0).state_dict()
    other = RowSampler(**({"rows": 10, "per_step": 2, "seed": 0} | {name: value}))
    with pytest.raises(UserError, match=f"had {name}="):
        other.load_state_dict(state)


def test_fewer_prompts_than_processes_are_refused() -> None:
    with pytest.raises(UserError, match="prompts=2: fewer than the 3 processes; give prompts=3"):
        RowSampler(10, per_step=2, seed=0, rank=0, world=3)


@pytest.mark.parametrize("change", [{"rows": 0}, {"per_step": 0}, {"seed": -1}, {"rank": 2}, {"rank": -1}])
def test_senseless_counts_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}={next(iter(change.values()))}"):
        RowSampler(**({"rows": 10, "per_step": 2, "seed": 0, "rank": 0, "world": 2} | change))
