"""SCRE against hand-computed values, its limits, and float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raise_kernels import reference
from raise_kernels import scre as triton_scre
from raise_kernels._checks import Scre
from tests.budget import (
    HALF_ULP,
    assert_at_most,
    assert_exact,
    assert_within_error_budget,
    no_better_than,
)
from tests.kernels.spans import Case, cases

IMPLS = {"reference": reference.scre, "triton": triton_scre.scre}
every_impl = pytest.mark.parametrize("impl", list(IMPLS))


def pack(*spans: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and offsets of spans given by their probabilities."""
    offsets = torch.tensor([0, *[len(s) for s in spans]]).cumsum(0)
    return torch.tensor([p for s in spans for p in s], dtype=torch.float64).log(), offsets


def check(impl: str, logp: torch.Tensor, offsets: torch.Tensor, how: Scre, want: list[float]) -> None:
    got = IMPLS[impl](logp.float(), offsets, how)
    peer = reference.scre(logp.float(), offsets, how)
    assert_within_error_budget(got, torch.tensor(want, dtype=torch.float64), peer, name=impl)


@every_impl
def test_by_hand(impl: str) -> None:
    logp, offsets = pack([0.5], [], [0.9, 0.5], [1.0, 1.0, 1.0])
    eta, lam = 0.2, 3.0
    two = 0.9 ** math.exp(-eta) * 0.5 ** math.exp(-2 * eta) * math.exp(-lam * 0.04)
    check(impl, logp, offsets, Scre(eta=eta, lam=lam), [0.5 ** math.exp(-eta), 0.0, two, 1.0])
    from_zero = 0.9 * 0.5 ** math.exp(-eta) * math.exp(-lam * 0.04)
    check(impl, logp, offsets, Scre(eta=eta, lam=lam, first_index=0), [0.5, 0.0, from_zero, 1.0])
    w1, w2 = math.exp(-eta), math.exp(-2 * eta)
    normal = 0.9 ** (w1 / (w1 + w2)) * 0.5 ** (w2 / (w1 + w2)) * math.exp(-lam * 0.04)
    check(impl, logp, offsets, Scre(eta=eta, lam=lam, normalize=True), [0.5, 0.0, normal, 1.0])


@every_impl
def test_eta_zero_is_the_likelihood_of_the_sequence(impl: str) -> None:
    logp, offsets = pack([0.5, 0.25], [0.1] * 5)
    check(impl, logp, offsets, Scre(eta=0.0, lam=0.0), [0.125, 1e-5])


@every_impl
def test_a_token_that_cannot_be_sampled_gives_zero(impl: str) -> None:
    logp, offsets = pack([0.5, 0.0], [0.0], [0.5])
    got = IMPLS[impl](logp.float(), offsets, Scre(eta=200.0))
    assert got[:2].tolist() == [0, 0]
    assert 0 < got[2] <= 1


@every_impl
@given(case=cases(), eta=st.sampled_from([0.0, 0.1, 2.0, 90.0]), normalize=st.booleans())
def test_random_spans(impl: str, case: Case, eta: float, normalize: bool) -> None:
    how = Scre(eta=eta, normalize=normalize, first_index=int(normalize))
    before = case.logp.clone()
    got = IMPLS[impl](case.logp, case.offsets, how)
    oracle = reference.scre(case.logp.double(), case.offsets, how)
    peer = reference.scre(case.logp, case.offsets, how)
    # exp of a rounded exponent: no fp32 result is better than one rounding of 1
    peer = no_better_than(peer, oracle, HALF_ULP)
    assert_within_error_budget(got, oracle, peer, name=f"scre {impl}")
    assert_exact(case.logp, before, name="unwritten")
    fine = ~got.isnan()
    assert (got[fine] >= 0).all()
    assert_at_most(got[fine], 1.0, name="at most 1")
    assert (got[fine & (case.offsets[1:] == case.offsets[:-1])] == 0).all()


@every_impl
def test_a_span_alone_equals_the_span_in_any_batch(impl: str) -> None:
    lengths = torch.randint(0, 40, (50,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    logp = -torch.rand(int(offsets[-1])) * 3
    whole = IMPLS[impl](logp, offsets)
    for k in (0, 7, 49):
        part = logp[offsets[k] : offsets[k + 1]]
        alone = IMPLS[impl](part, torch.tensor([0, len(part)]))
        assert_exact(alone, whole[k : k + 1], name=f"span {k}")


def test_strided_logp() -> None:
    logp, offsets = pack([0.5, 0.25], [0.1] * 5)
    wide = torch.full((7, 3), float("nan"))
    wide[:, 1] = logp
    got = IMPLS["triton"](wide[:, 1], offsets)
    assert_exact(got, IMPLS["triton"](logp.float(), offsets), name="strided")


@every_impl
@pytest.mark.parametrize(
    ("logp", "offsets", "match"),
    [
        (torch.zeros(2, 2), torch.tensor([0, 2]), "logp has shape"),
        (torch.zeros(3), torch.tensor([0, 2]), "rise from 0 to 3"),
        (torch.zeros(3), torch.tensor([0, 2, 1, 3]), "never fall"),
        (torch.zeros(3), torch.tensor([1, 3]), "rise from 0"),
        (torch.zeros(3), torch.zeros(0, dtype=torch.long), "offsets has shape"),
        (torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), "offsets has shape"),
    ],
)
def test_wrong_arguments(impl: str, logp: torch.Tensor, offsets: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        IMPLS[impl](logp, offsets)


@pytest.mark.parametrize("option", [{"eta": -1.0}, {"lam": float("nan")}, {"first_index": 2}])
def test_wrong_options(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        Scre(**option)


def test_reference_gradient() -> None:
    logp, offsets = pack([0.5], [0.9, 0.5, 0.2], [0.3, 0.3])
    torch.autograd.gradcheck(lambda x: reference.scre(x, offsets), logp.requires_grad_())
