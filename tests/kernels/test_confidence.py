"""confidence_rewards: logits to rewards in two launches, equal to the reference on every part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raise_kernels import _linear_operator, confidence, reference, token_stats
from raise_kernels._checks import IGSR, PLAIN, SCRE, LogitMap
from tests.budget import HALF_ULP, assert_exact, assert_within_error_budget, no_better_than, undecided
from tests.kernels.spans import Case, cases

REAL = ("reward", "confidence", "variance", "nll", "bonus")


def compare(got: confidence.SpanRewards, logp: torch.Tensor, case: Case) -> None:
    oracle = reference.span_rewards(logp.double(), *case[1:])
    peer = reference.span_rewards(logp, *case[1:])
    edge = undecided(oracle.bonus, IGSR.threshold)
    for name in REAL:
        want, near = getattr(oracle, name), getattr(peer, name)
        near = no_better_than(near, want, HALF_ULP)
        assert_within_error_budget(getattr(got, name)[~edge], want[~edge], near[~edge], name=name)
    assert_exact(got.bin, oracle.bin, name="bin")
    assert_exact(got.applied[~edge], oracle.applied[~edge], name="applied")


@given(case=cases())
def test_from_logp(case: Case) -> None:
    got = confidence.span_rewards(*case)
    compare(got, case.logp, case)


@given(data=st.data(), case=cases())
def test_from_logits(data: st.DataObject, case: Case) -> None:
    count, vocab = len(case.logp), data.draw(st.sampled_from([5, 700]))
    logits = torch.randn(count + 3, vocab) * 4
    rows = torch.randperm(count + 3)[:count]
    targets = torch.randint(0, vocab, (count,))
    logp, got = confidence.confidence_rewards(logits, rows, targets, None, *case[1:])
    alone = token_stats.token_stats(logits, targets, rows=rows)["logp"]
    assert_exact(logp, alone, name="the same bits as token_stats")
    compare(got, logp, case)


def groups_of(size: int, count: int = 4) -> Case:
    spans = size * count
    lengths = torch.randint(0, 6, (spans,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    group = torch.repeat_interleave(torch.randperm(count) * 5, size)
    return Case(-torch.rand(int(offsets[-1])), offsets, torch.rand(spans), torch.rand(spans) < 0.4, group)


@pytest.mark.parametrize("size", [1, 3, 8, 17])
def test_blocks_of_a_known_size_give_the_same_bits(size: int) -> None:
    case = groups_of(size)
    blocks = confidence.span_rewards(*case, group_size=size)
    found = confidence.span_rewards(*case)
    for name in confidence.SpanRewards._fields:
        assert_exact(getattr(blocks, name), getattr(found, name), name=name)


@pytest.mark.parametrize(
    "group",
    [[0, 0, 1, 0, 2, 2], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0, 1, 0, 1, 2, 2]],
)
def test_groups_that_only_the_device_sees_to_be_broken_are_nan(group: list[int]) -> None:
    case = groups_of(2, 3)._replace(group=torch.tensor(group))
    got = confidence.span_rewards(*case, group_size=2).reward
    whole = torch.tensor([group.count(g) == 2 and group[i ^ 1] == g for i, g in enumerate(group)])
    assert got[~whole].isnan().all()
    assert not got[whole].isnan().any()


def test_a_group_that_only_the_device_sees_to_be_too_large_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    case = groups_of(2, 36)
    group = torch.where(torch.arange(72) < 70, 5, 3)
    case = case._replace(group=group, strict=torch.zeros(72, dtype=torch.bool))
    logits, rows = torch.randn(len(case.logp), 20), torch.arange(len(case.logp))
    y = torch.randint(0, 20, rows.shape)
    monkeypatch.setattr(confidence, "on_host", lambda *_: False)
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, 7, **how))
    logp, got = confidence.confidence_rewards(logits, rows, y, None, *case[1:])
    assert got.reward[:70].isnan().all() and not got.reward[70:].isnan().any()
    unseen = slice(64, 70)
    assert got.confidence[unseen].isnan().all() and (got.bin[unseen] == -1).all()
    assert not got.applied[unseen].any()
    assert logp[case.offsets[64] : case.offsets[70]].isnan().all()
    assert not logp[: case.offsets[64]].isnan().any() and not logp[case.offsets[70] :].isnan().any()


class _Counter:
    def __init__(self) -> None:
        self.launches = 0


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Counter]:
    """Counts launches of any Triton kernel, compiled or interpreted."""
    count = _Counter()
    for kernel in {type(token_stats._stats_kernel), type(confidence._group_kernel)}:
        run = kernel.run

        def counted(self, *args, _run=run, **kwargs):  # type: ignore[no-untyped-def]
            count.launches += 1
            return _run(self, *args, **kwargs)

        monkeypatch.setattr(kernel, "run", counted)
    yield count


@pytest.mark.parametrize("group_size", [None, 4])
def test_two_launches_from_hidden_states(counter: _Counter, group_size: int | None) -> None:
    """The same rewards as from the log-probabilities that `linear_token_stats` gives alone."""
    case = groups_of(4)
    count = len(case.logp)
    hidden, weight, bias = torch.randn(count + 1, 16), torch.randn(700, 16), torch.randn(700)
    hidden[count] = float("nan")
    rows, y = torch.randperm(count), torch.randint(0, 600, (count,), dtype=torch.int32)
    how = LogitMap(temperature=0.5, softcap=7.0, valid_vocab=600)
    source = confidence.Linear(hidden, weight, bias)
    logp, got = confidence.confidence_rewards(source, rows, y, None, *case[1:], group_size, how)
    assert counter.launches == 2
    alone = _linear_operator.linear_token_stats(
        "triton", hidden, weight, y, bias=bias, rows=rows, how=how, want=("logp",)
    )["logp"]
    assert_exact(logp, alone, name="the same bits as linear_token_stats")
    compare(got, logp, case)


def test_memory_bounds_what_the_splits_leave(counter: _Counter) -> None:
    """The same bits, in a launch or two more."""
    case = groups_of(4)
    count = len(case.logp)
    source = confidence.Linear(torch.randn(count, 16), torch.randn(700, 16))
    rows, y = torch.arange(count), torch.randint(0, 700, (count,))
    enough = 2 * 4 * 3 * count  # two fp32 numbers for each token and split of 256 columns
    runs = {}
    for memory in (enough, enough - 1, 1):
        counter.launches = 0
        runs[memory] = confidence.confidence_rewards(source, rows, y, None, *case[1:], memory=memory)
        assert counter.launches == (2 if memory == enough else 3)
    for logp, got in runs.values():
        assert_exact(logp, runs[enough][0], name="log-probabilities")
        for name in confidence.SpanRewards._fields:
            assert_exact(getattr(got, name), getattr(runs[enough][1], name), name=name)


def test_from_hidden_states_of_no_tokens() -> None:
    none, zero = torch.zeros(0, dtype=torch.long), torch.zeros(2)
    source = confidence.Linear(torch.randn(3, 16), torch.randn(20, 16))
    offsets, group = torch.tensor([0, 0, 0]), torch.tensor([1, 1])
    logp, got = confidence.confidence_rewards(source, none, none, None, offsets, zero, zero > 0, group)
    assert logp.shape == (0,) and got.reward.tolist() == [0, 0]
    with pytest.raises(ValueError, match="hidden has shape"):
        wrong = source._replace(weight=torch.randn(20, 15))
        confidence.confidence_rewards(wrong, none, none, None, offsets, zero, zero > 0, group)


@pytest.mark.parametrize("group_size", [None, 4])
def test_two_launches_from_logits_and_one_from_logp(counter: _Counter, group_size: int | None) -> None:
    case = groups_of(4)
    count = len(case.logp)
    logits, rows, y = torch.randn(count, 50), torch.arange(count), torch.randint(0, 50, (count,))
    logp, _ = confidence.confidence_rewards(logits, rows, y, None, *case[1:], group_size)
    assert counter.launches == 2
    confidence.confidence_rewards(None, rows, y, logp, *case[1:], group_size)
    assert counter.launches == 3


def test_options_reach_both_launches() -> None:
    case = groups_of(3)
    count = len(case.logp)
    logits, rows, y = torch.randn(count, 90) * 3, torch.arange(count), torch.randint(0, 60, (count,))
    how = LogitMap(temperature=0.5, softcap=7.0, valid_vocab=64)
    logp, got = confidence.confidence_rewards(logits, rows, y, None, *case[1:], 3, how, SCRE, IGSR)
    assert_exact(logp, token_stats.token_stats(logits, y, rows=rows, how=how)["logp"], name="logp")
    compare(got, logp, case)


def test_rows_without_a_result_spoil_their_span_only() -> None:
    case = groups_of(2, 2)._replace(
        offsets=torch.tensor([0, 1, 2, 3, 4]),
        score=torch.tensor([1.0, 1.0, 0.5, 0.5]),
        strict=torch.tensor([True, True, False, False]),
    )
    logits = torch.randn(4, 20)
    logits[0] = float("nan")
    y = torch.tensor([0, 0, 20, 3])
    _, got = confidence.confidence_rewards(logits, torch.arange(4), y, None, *case[1:])
    assert got.reward.isnan().tolist() == [True, False, True, False]
    assert got.bin.tolist() == [-1, -1, -1, 5]


def test_inputs_are_not_written() -> None:
    case = groups_of(3)
    before = [t.clone() for t in case]
    confidence.span_rewards(*case)
    for name, was, now in zip(Case._fields, before, case, strict=True):
        assert_exact(now, was, name=name)


def test_wrong_arguments() -> None:
    case = groups_of(2)
    with pytest.raises(TypeError, match="strict is"):
        confidence.span_rewards(*case._replace(strict=case.score))
    with pytest.raises(ValueError, match="neither logits nor logp"):
        confidence.confidence_rewards(None, case.group, case.group, None, *case[1:])
    with pytest.raises(ValueError, match="takes at most 64"):
        confidence.span_rewards(*groups_of(65, 1), group_size=65)


def test_plain_is_the_identity() -> None:
    assert PLAIN.factors == (1.0, 1.0)
