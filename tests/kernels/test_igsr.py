"""IGSR: hand-computed groups, the properties that DESIGN.md promises, and float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raise_kernels import confidence, reference
from raise_kernels import igsr as triton_igsr
from raise_kernels._checks import IGSR, Igsr
from tests.budget import (
    HALF_ULP,
    assert_at_most,
    assert_exact,
    assert_within_error_budget,
    no_better_than,
    undecided,
)
from tests.kernels.spans import Case, cases

IMPLS = {"reference": reference.igsr, "triton": triton_igsr.igsr}
every_impl = pytest.mark.parametrize("impl", list(IMPLS))
options = st.builds(
    Igsr,
    tau=st.sampled_from([0.05, 0.1, 0.25, 0.5]),
    penalty=st.sampled_from([0.0, 0.05, 0.3]),
    min_bonus=st.sampled_from([None, 0.0, 0.03]),
    variant=st.sampled_from(["paper", "balanced"]),
)


def one_token_each(p: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(p, dtype=torch.float64).log(), torch.arange(len(p) + 1)


@every_impl
def test_by_hand(impl: str) -> None:
    # Bins of 0.1: {0.42, 0.48} with median 0.45, {0.72, 0.75, 0.78} with 0.75; zero and empty stay 0.
    delta = 1e-6
    logp, offsets = one_token_each([0.9, 0.1, 0.9, 0.5, 0.1, 0.7])
    offsets = torch.cat([offsets, offsets[-1:]])
    score = torch.tensor([0.42, 0.48, 0.72, 0.75, 0.78, 0.0, 0.9], dtype=torch.float64)
    e = [-math.log(p + delta) for p in (0.9, 0.5, 0.1)]
    middle = 0.5 + ((e[0] + e[2]) / 2 - e[1]) / (e[2] - e[0])
    low, high = 0.30 - 0.05 * 2 / 3, 0.25 - 0.05 * 3 / 4
    paper = [
        math.sqrt(0.45 * (0.45 + low)),
        0.45,
        math.sqrt(0.75 * (0.75 + high)),
        math.sqrt(0.75 * (0.75 + middle * 0.25 - 0.05 * 3 / 4)),
        0.75,
        0.0,
        0.0,
    ]
    balanced = [
        math.sqrt(0.45 * (0.45 + 0.1)),
        math.sqrt(0.45 * (0.45 - 0.1)),
        0.75,
        math.sqrt(0.75 * (0.75 + (middle - 1) * 0.1)),
        math.sqrt(0.75 * (0.75 - 0.1)),
        0.0,
        0.0,
    ]
    for variant, want in (("paper", paper), ("balanced", balanced)):
        how = Igsr(variant=variant, delta=delta)
        arguments = (offsets, score.float(), torch.zeros(7, dtype=torch.long), how)
        got = IMPLS[impl](logp.float(), *arguments)
        peer = reference.igsr(logp.float(), *arguments)
        assert_within_error_budget(
            got, torch.tensor(want, dtype=torch.float64), peer + HALF_ULP, name=variant
        )


@every_impl
def test_bins_do_not_depend_on_how_a_tenth_is_rounded(impl: str) -> None:
    score = (torch.arange(1, 11) / 10).float()
    logp, offsets = one_token_each([0.5] * 10)
    how = Igsr(variant="balanced", penalty=0.0)
    got = IMPLS[impl](logp.float(), offsets, score, torch.zeros(10, dtype=torch.long), how)
    want = reference.igsr_parts(logp, offsets, score.double(), torch.zeros(10, dtype=torch.long), how)
    assert want.bin.tolist() == list(range(1, 11))
    assert_exact(got[:-1], score[:-1], name="a bin of one below the top keeps its score")


@every_impl
@given(case=cases(), how=options)
def test_random_groups(impl: str, case: Case, how: Igsr) -> None:
    arguments = (case.offsets, case.score, case.group, how)
    got = IMPLS[impl](case.logp, *arguments)
    oracle = reference.igsr_parts(case.logp.double(), *arguments)
    peer = reference.igsr_parts(case.logp, *arguments)
    # A bonus within rounding of its threshold may fall on either side.
    edge = undecided(oracle.bonus, how.threshold) & (how.variant == "paper")
    slack = no_better_than(peer.reward, oracle.reward, HALF_ULP)
    assert_within_error_budget(got[~edge], oracle.reward[~edge], slack[~edge], name=f"igsr {impl}")


@every_impl
@given(case=cases(odd=False), how=options)
def test_a_reward_stays_between_its_bin_and_the_next(impl: str, case: Case, how: Igsr) -> None:
    got = IMPLS[impl](case.logp, case.offsets, case.score, case.group, how)
    bins = reference.igsr_parts(case.logp, case.offsets, case.score, case.group, how).bin
    assert (got[bins < 0] == 0).all()
    for g in case.group.unique():
        levels = bins[(case.group == g) & (bins >= 0)].unique()
        medians = [case.score[(case.group == g) & (bins == k)].double().quantile(0.5) for k in levels]
        for i, k in enumerate(levels):
            inside = got[(case.group == g) & (bins == k)]
            above = medians[i + 1] if i + 1 < len(levels) else torch.tensor(1.0, dtype=torch.float64)
            below = (
                medians[i] if how.variant == "paper" else (medians[i] * medians[i - 1] if i else 0.0) ** 0.5
            )
            assert_at_most(inside, (medians[i] * above).sqrt().item(), name="at most the next bin")
            assert_at_most(-inside, -float(below), name="at least its own bin")


@every_impl
@given(case=cases(odd=False), how=options)
def test_more_confidence_never_pays_less_inside_a_bin(impl: str, case: Case, how: Igsr) -> None:
    got = IMPLS[impl](case.logp, case.offsets, case.score, case.group, how)
    parts = reference.igsr_parts(case.logp, case.offsets, case.score, case.group, how)
    for g in case.group.unique():
        for k in parts.bin[(case.group == g) & (parts.bin >= 0)].unique():
            inside = (case.group == g) & (parts.bin == k)
            rising = got[inside][parts.nll[inside].argsort(descending=True)]
            assert_at_most(rising[:-1] - rising[1:], 0.0, name="monotone") if len(rising) > 1 else None


@every_impl
@given(data=st.data(), case=cases(), how=options)
def test_reordering_the_group_reorders_the_rewards(
    impl: str, data: st.DataObject, case: Case, how: Igsr
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(case.score)))), dtype=torch.long)
    lengths = (case.offsets[1:] - case.offsets[:-1])[order]
    pieces = [case.logp[case.offsets[k] : case.offsets[k + 1]] for k in order]
    logp = torch.cat(pieces) if pieces else case.logp
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    got = IMPLS[impl](case.logp, case.offsets, case.score, case.group, how)
    moved = IMPLS[impl](logp, offsets, case.score[order], case.group[order], how)
    assert_exact(moved, got[order], name="permuted")


@every_impl
@pytest.mark.parametrize("variant", ["paper", "balanced"])
@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_row_without_a_confidence_leaves_its_bin_alone(impl: str, variant: str, wrong: float) -> None:
    logp = torch.tensor([-0.1, -2.0, wrong, -0.5])
    score, group = torch.tensor([0.41, 0.45, 0.43, 0.44]), torch.zeros(4, dtype=torch.long)
    how = Igsr(variant=variant, penalty=0.0, min_bonus=0.0)
    got = IMPLS[impl](logp, torch.arange(5), score, group, how)
    others = torch.tensor([0, 1, 3])
    alone = IMPLS[impl](logp[others], torch.arange(4), score[others], group[others], how)
    assert got[2].isnan()
    assert_exact(got[others], alone, name="the others")


def test_a_group_near_one_has_no_headroom_in_the_paper_form() -> None:
    logp, offsets = one_token_each([0.9, 0.5, 0.1])
    arguments = (offsets, torch.full((3,), 0.97), torch.zeros(3, dtype=torch.long))
    assert len(reference.igsr(logp, *arguments).unique()) == 1
    assert len(reference.igsr(logp, *arguments, Igsr(variant="balanced")).unique()) == 3


@pytest.mark.parametrize("size", [1, 31, 33, 63, 64])
def test_large_groups(size: int) -> None:
    logp, offsets = -torch.rand(size), torch.arange(size + 1)
    arguments = (offsets, torch.rand(size), torch.zeros(size, dtype=torch.long))
    got = triton_igsr.igsr(logp, *arguments)
    oracle = reference.igsr(logp.double(), *arguments)
    assert_within_error_budget(got, oracle, reference.igsr(logp, *arguments) + HALF_ULP, name=f"G={size}")


def test_a_group_too_large_is_refused() -> None:
    size = confidence.MAX_GROUP + 1
    with pytest.raises(ValueError, match=f"{size} spans.*reference"):
        triton_igsr.igsr(
            torch.zeros(size), torch.arange(size + 1), torch.ones(size), torch.zeros(size).long()
        )


@pytest.mark.parametrize(
    "option",
    [{"tau": 0.0}, {"tau": 0.51}, {"tau": float("nan")}, {"delta": 0.0}, {"delta": 1.0}, {"penalty": -0.1}]
    + [{"min_bonus": -0.1}, {"variant": "fair"}],
)
def test_wrong_options(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        Igsr(**option)


@every_impl
def test_wrong_arguments(impl: str) -> None:
    logp, offsets, group = torch.zeros(3), torch.arange(4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="score has shape"):
        IMPLS[impl](logp, offsets, torch.zeros(2), group, IGSR)
    with pytest.raises(TypeError, match="group is"):
        IMPLS[impl](logp, offsets, torch.zeros(3), group.float(), IGSR)
