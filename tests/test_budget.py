"""The helpers that judge every other test must themselves be able to fail."""

from __future__ import annotations

import pytest
import torch

from tests.budget import (
    assert_as_exact_as_a_double,
    assert_at_most,
    assert_exact,
    assert_rank,
    assert_within_bound,
    assert_within_error_budget,
    less_exact,
    no_better_than,
    rank_slack,
    rounding,
)


def oracle(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_one_rounding_is_allowed_and_two_are_not() -> None:
    one = oracle(1.0)
    ulp = torch.finfo(torch.float32).eps
    peer = one.float()
    assert_within_error_budget(torch.tensor([1.0 + ulp]), one, peer, name="one ulp")
    with pytest.raises(AssertionError, match="two ulps"):
        assert_within_error_budget(torch.tensor([1.0 + 2 * ulp]), one, peer, name="two ulps")


def test_a_bad_peer_widens_the_budget_by_twice_its_error() -> None:
    want = oracle(1.0, 0.0)
    peer = torch.tensor([1.25, 0.0])
    assert_within_error_budget(torch.tensor([1.5, 0.0]), want, peer, name="twice")
    with pytest.raises(AssertionError, match="thrice"):
        assert_within_error_budget(torch.tensor([1.75, 0.0]), want, peer, name="thrice")


def test_a_bound_holds_for_each_element_alone() -> None:
    want, ulp = oracle(1.0, 1.0, 0.0), torch.finfo(torch.float32).eps
    bound = oracle(4 * ulp, 0.0, 0.0)
    near = torch.tensor([1.0 + 5 * ulp, 1.0 + ulp, 1e-39])
    assert_within_bound(near, want, bound, name="within")
    for k, value in enumerate((1.0 + 6 * ulp, 1.0 + 2 * ulp, 2e-38)):
        off = near.clone()
        off[k] = value
        with pytest.raises(AssertionError, match=r"1 of 3; worst at \("):
            assert_within_bound(off, want, bound, name="off")


def test_a_bound_is_finite_and_no_number_meets_nan() -> None:
    want, inf = oracle(1.0, float("nan"), float("inf")), float("inf")
    free = oracle(1e9, inf, inf)
    assert_within_bound(want.float(), want, free, name="same")
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_within_bound(torch.tensor([1.0, 1.0, inf]), want, free, name="a number")
    with pytest.raises(AssertionError, match="the bound is"):
        assert_within_bound(want.float(), want, oracle(inf, inf, inf), name="no bound")


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (float("nan"), 1.0),
        (1.0, float("nan")),
        (float("inf"), float("-inf")),
        (1.0, float("inf")),
        (float("inf"), float("nan")),
    ],
)
def test_nan_and_infinity_must_match(got: float, want: float) -> None:
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_within_error_budget(torch.tensor([got]), oracle(want), torch.tensor([want]), name="x")


def test_equal_nan_and_infinity_pass() -> None:
    same = torch.tensor([float("nan"), float("inf"), float("-inf"), 2.0])
    assert_within_error_budget(same, same.double(), same, name="same")
    assert_exact(same, same.clone(), name="same")


def test_exact_sees_one_bit_sign_of_zero_and_dtype() -> None:
    one = torch.tensor([1.0])
    with pytest.raises(AssertionError, match="bitwise"):
        assert_exact(one.nextafter(torch.tensor(2.0)), one, name="bit")
    with pytest.raises(AssertionError, match="bitwise"):
        assert_exact(torch.tensor([-0.0]), torch.tensor([0.0]), name="zero")
    with pytest.raises(AssertionError, match="dtype"):
        assert_exact(one, one.double(), name="dtype")


def test_at_most_allows_two_ulps() -> None:
    ulp = torch.finfo(torch.float32).eps
    assert_at_most(torch.tensor([1.0 + 2 * ulp]), 1.0, name="two")
    with pytest.raises(AssertionError, match="three"):
        assert_at_most(torch.tensor([1.0 + 3 * ulp]), 1.0, name="three")
    with pytest.raises(AssertionError, match="nan"):
        assert_at_most(torch.tensor([float("nan")]), 1.0, name="nan")


def test_a_lucky_peer_is_not_believed() -> None:
    want = oracle(1.0, 1.0)
    peer = torch.tensor([1.0, 1.5])
    assert no_better_than(peer, want, 0.25).tolist() == [1.25, 1.5]
    assert less_exact(peer, torch.tensor([1.1, 1.1]), want).tolist() == torch.tensor([1.1, 1.5]).tolist()


def test_rounding_costs_half_an_ulp_and_less_of_nothing_than_of_one() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.rand(1000, dtype=torch.float64) * 8 - 4
        assert ((x.to(dtype).double() - x).abs() <= rounding(x, dtype)).all()
        small = x * torch.finfo(dtype).tiny
        assert ((small.to(dtype).double() - small).abs() <= rounding(small, dtype)).all()


def test_a_rank_may_move_by_the_columns_that_rounding_reaches() -> None:
    z = oracle(1.0, 1.0 + 1e-9, 2.0, float("-inf"))[None]
    y = torch.tensor([0])
    slack = rank_slack(z, y, 1.0, 4)
    assert slack.tolist() == [1]
    assert rank_slack(z, torch.tensor([9]), 1.0, 4).tolist() == [0]
    assert_rank(torch.tensor([1.0]), oracle(2.0), slack, name="one off")
    for wrong in (0.0, float("nan")):
        with pytest.raises(AssertionError, match="beyond its ties"):
            assert_rank(torch.tensor([wrong]), oracle(2.0), slack, name="two off")


def test_a_double_may_be_off_by_a_few_roundings() -> None:
    assert_as_exact_as_a_double(0.1 + 0.2, 0.3, name="sum")
    with pytest.raises(AssertionError, match="sum"):
        assert_as_exact_as_a_double(0.3 + 1e-12, 0.3, name="sum")
