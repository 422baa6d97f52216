"""Step margins and scores against hand-computed values and float64, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import raise_core as rc
from raise_kernels import _step_operator, reference_steps
from raise_kernels._checks import PLAIN, LogitMap
from tests.budget import (
    HALF_ULP,
    assert_exact,
    assert_within_error_budget,
    close_to,
    no_better_than,
    slope_roundings,
)

NAN, INF = math.nan, math.inf
GOOD, BAD = 7, 3


def run(impl: str, *args: Any, **options: Any) -> Tensor:
    if impl == "reference":
        return reference_steps.step_margins(*args, **options)
    return _step_operator.step_margins(impl, *args, **options)


every_impl = pytest.mark.parametrize("impl", ["reference", "native", "triton"])
fast_impl = pytest.mark.parametrize("impl", ["native", "triton"])
every_map = pytest.mark.parametrize(
    "how", [PLAIN, LogitMap(temperature=0.5, logit_scale=0.3), LogitMap(softcap=2.0, temperature=1.5)]
)


def case(dtype: torch.dtype = torch.float32, width: int = 1500) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [4, 6, width], weight [9, width], bias [9], rows [12], some of them twice."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(4, 6, width), torch.randn(9, width) / width**0.5
    rows = torch.tensor([0, 5, 5, 23, 8, 9, 10, 11, 5, 1, 2, 3])
    return hidden.to(dtype), weight.to(dtype), torch.randn(9).to(dtype), rows


@every_impl
def test_by_hand(impl: str) -> None:
    hidden = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]])
    weight = torch.tensor([[9.0, 9.0], [1.0, 0.5], [-1.0, 0.25]])
    bias = torch.tensor([9.0, 0.5, -0.25])
    margins = run(impl, hidden, weight, torch.tensor([1, 0]), 1, 2, bias=bias)
    # good: 3 - 0.5 + 0.5, 1 + 1 + 0.5; bad: -3 - 0.25 - 0.25, -1 + 0.5 - 0.25
    assert margins.tolist() == [3.0 + 3.5, 2.5 + 0.75]
    assert run(impl, hidden, weight, None, 1, 2).tolist() == [2.0 + 0.5, 2.5 + 3.25, 0.0]
    capped = LogitMap(softcap=2.0, logit_scale=0.5, temperature=0.25)
    want = 2.0 / 0.25 * (math.tanh(0.5 * 2.5 / 2) - math.tanh(0.5 * -0.75 / 2))
    got = run(impl, hidden, weight, torch.tensor([0]), 1, 2, bias=bias, how=capped)
    oracle = torch.tensor([want], dtype=torch.float64)
    assert_within_error_budget(got, oracle, close_to(oracle, 4), name=impl)


def test_the_score_is_the_probability_of_good_among_the_two() -> None:
    hidden, weight, bias, rows = case()
    got = rc.step_scores(hidden, weight, rows, GOOD, BAD, bias=bias)
    z = hidden.view(24, -1)[rows].double() @ weight.double().T + bias.double()
    want = torch.softmax(z[:, [GOOD, BAD]], 1)[:, 0]
    assert_within_error_budget(got, want, close_to(want, 4), name="softmax of two")
    assert rc.step_scores(hidden, weight, rows[:0], GOOD, BAD).shape == (0,)
    assert rc.step_scores(torch.zeros(1, 2), torch.eye(2), None, 0, 1).tolist() == [0.5]


@fast_impl
@every_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_against_float64(impl: str, how: LogitMap, dtype: torch.dtype, biased: bool) -> None:
    hidden, weight, bias, rows = case(dtype)
    options = {"bias": bias if biased else None, "how": how}
    wide = options | {"bias": bias.double() if biased else None}
    before = hidden.clone()
    oracle = reference_steps.step_margins(hidden.double(), weight.double(), rows, GOOD, BAD, **wide)
    peer = reference_steps.step_margins(hidden, weight, rows, GOOD, BAD, **options)
    got = run(impl, hidden, weight, rows, GOOD, BAD, **options)
    assert got.dtype == torch.float32
    assert_within_error_budget(got, oracle, no_better_than(peer, oracle, 2 * HALF_ULP), name=impl)
    assert_exact(hidden, before, name="unwritten")


@fast_impl
@given(
    seed=st.integers(0, 2**20),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(0, 9)),
    softcap=st.sampled_from([None, 0.5, 30.0]),
)
def test_any_sizes(impl: str, seed: int, sizes: tuple[int, int, int], softcap: float | None) -> None:
    torch.manual_seed(seed)
    many, width, tags = sizes
    hidden, weight = torch.randn(many, width), torch.randn(9, width)
    rows, how = torch.randint(-1, many + 1, (tags,)), LogitMap(softcap=softcap)
    oracle = reference_steps.step_margins(hidden.double(), weight.double(), rows, GOOD, BAD, how=how)
    peer = reference_steps.step_margins(hidden, weight, rows, GOOD, BAD, how=how)
    got = run(impl, hidden, weight, rows, GOOD, BAD, how=how)
    owed = HALF_ULP * (width + (softcap or 1.0)) * float(hidden.abs().max() * weight.abs().max())
    assert_within_error_budget(got, oracle, no_better_than(peer, oracle, owed), name=impl)


@fast_impl
def test_the_difference_of_the_rows_keeps_what_two_large_logits_lose(impl: str) -> None:
    hidden, weight, _, rows = case()
    weight[[GOOD, BAD]] += 300.0 * hidden.view(24, -1)[5].sign()
    oracle = reference_steps.step_margins(hidden.double(), weight.double(), rows, GOOD, BAD)
    two = reference_steps.step_margins(hidden, weight, rows, GOOD, BAD)
    one = run(impl, hidden, weight, rows, GOOD, BAD)
    assert (one - oracle).abs().max() < (two - oracle).abs().max() / 50


@fast_impl
def test_a_tag_alone_equals_the_tag_in_any_batch(impl: str) -> None:
    hidden, weight, bias, rows = case()
    whole = run(impl, hidden, weight, rows, GOOD, BAD, bias=bias)
    for s in (0, 3, 11):
        alone = run(impl, hidden, weight, rows[s : s + 1], GOOD, BAD, bias=bias)
        assert_exact(alone, whole[s : s + 1], name=f"tag {s}")


@fast_impl
def test_strided_inputs(impl: str) -> None:
    hidden, weight, bias, rows = case()
    want = run(impl, hidden, weight, rows, GOOD, BAD, bias=bias)
    apart = torch.full((*hidden.shape, 2), NAN)
    apart[..., 1] = hidden
    across = weight.T.contiguous().T
    got = run(impl, apart[..., 1], across, rows, GOOD, BAD, bias=bias)
    assert_exact(got, want, name="strided")


@every_map
@every_impl
def test_what_has_no_result_is_nan_and_has_no_gradient(impl: str, how: LogitMap) -> None:
    hidden = torch.randn(5, 8)
    hidden[1, 2], hidden[2, 0] = NAN, INF
    weight = torch.randn(4, 8)
    hidden.requires_grad_()
    weight.requires_grad_()
    rows = torch.tensor([0, 1, 2, -1, 5, 3])
    got = run(impl, hidden, weight, rows, 0, 1, how=how)
    assert got.isnan().tolist() == [False, True, True, True, True, False]
    got.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.ne(0).any(1).tolist() == [True, False, False, True, False]
    assert weight.grad.isfinite().all() and (weight.grad[2:] == 0).all()
    forbidden = torch.tensor([-INF, 0.0, 0.0, 0.0])
    assert run(impl, hidden, weight, rows[:1], 0, 1, bias=forbidden, how=how).isnan().all()
    none = run(impl, torch.zeros(0, 8), weight, torch.tensor([0]), 0, 1)
    assert none.isnan().all()


@every_map
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_finite_differences(impl: str, how: LogitMap) -> None:
    hidden, weight, bias, rows = (x.double() if x.is_floating_point() else x for x in case(width=5))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    torch.autograd.gradcheck(lambda h, w, b: run(impl, h, w, rows, GOOD, BAD, bias=b, how=how), leaves)


def gradients(impl: str, tensors: list[Tensor], rows: Tensor, up: Tensor, how: LogitMap) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = run(impl, leaves[0], leaves[1], rows, GOOD, BAD, bias=leaves[2], how=how)
    return list(torch.autograd.grad(out, leaves, up.to(out.dtype)))


@fast_impl
@every_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_against_float64(impl: str, how: LogitMap, dtype: torch.dtype) -> None:
    *tensors, rows = case(dtype, width=300)
    up = torch.randn(len(rows))
    oracle = gradients("reference", [x.double() for x in tensors], rows, up, how)
    peer = gradients("reference", tensors, rows, up, how)
    got = gradients(impl, tensors, rows, up, how)
    owed = HALF_ULP * (1 + slope_roundings(how.softcap)) * len(rows)
    for name, a, near, exact in zip(("hidden", "weight", "bias"), got, peer, oracle, strict=True):
        assert a.dtype == dtype
        assert_within_error_budget(a, exact, no_better_than(near, exact, owed), name=f"{impl} {name}")
    assert (got[0].view(24, -1)[[4, 6, 22]] == 0).all()


@fast_impl
def test_only_what_is_asked_for_has_a_gradient(impl: str) -> None:
    hidden, weight, _, rows = case(width=20)
    weight.requires_grad_()
    up = torch.ones(()).expand(len(rows))
    (only,) = torch.autograd.grad(run(impl, hidden, weight, rows, GOOD, BAD), weight, up)
    hidden.requires_grad_()
    _, both = torch.autograd.grad(run(impl, hidden, weight, rows, GOOD, BAD), (hidden, weight), up)
    assert_exact(only, both, name="weight")


# torch.library.opcheck reads .grad of a non-leaf tensor itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@fast_impl
@pytest.mark.parametrize("biased", [True, False])
def test_opcheck(impl: str, biased: bool) -> None:
    hidden, weight, bias, rows = case(width=12)
    leaf = hidden.clone().requires_grad_()
    given = bias if biased else None
    torch.library.opcheck(
        torch.ops.raise_kernels.step_margins, (leaf, weight, given, rows, GOOD, BAD, 0.7, 1.0, 3.0, impl)
    )
    margin, slopes = torch.ops.raise_kernels.step_margins(
        hidden, weight, given, rows, GOOD, BAD, 1.0, 1.0, None, impl
    )
    arguments = (torch.ones(12), margin, slopes, hidden, weight, given, rows, GOOD, BAD, False)
    torch.library.opcheck(
        torch.ops.raise_kernels.step_margins_backward, (*arguments, [True, True, biased], impl)
    )


@fast_impl
def test_without_values(impl: str) -> None:
    with FakeTensorMode():
        hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(9, 8)
        got = rc.step_scores(hidden, weight, torch.arange(3), GOOD, BAD, impl=impl)
        assert got.shape == (3,)
        got.sum().backward()


@every_impl
@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"good": 9}, ValueError, "good is 9, weight has 9 rows"),
        ({"bad": -1}, ValueError, "bad is -1"),
        ({"bad": 7}, ValueError, "good and bad are both 7"),
        ({"good": 1.0}, TypeError, "good is 1.0"),
        ({"rows": torch.zeros(2, 2, dtype=torch.long)}, ValueError, "rows has shape"),
        ({"rows": torch.zeros(2)}, TypeError, "rows is torch.float32"),
        ({"hidden": torch.zeros(3, 4)}, ValueError, "hidden has shape"),
        ({"hidden": [1.0]}, TypeError, "hidden is a list"),
        ({"bias": torch.zeros(3)}, ValueError, "bias has shape"),
    ],
)
def test_wrong_arguments(impl: str, changed: dict[str, Any], error: type[Exception], match: str) -> None:
    hidden, weight, bias, rows = case(width=8)
    given = {
        "hidden": hidden,
        "weight": weight,
        "rows": rows,
        "good": GOOD,
        "bad": BAD,
        "bias": bias,
    } | changed
    with pytest.raises(error, match=match):
        rc.step_scores(**given, impl=impl)


def test_triton_has_no_float64() -> None:
    hidden, weight, _, rows = case(torch.float64, width=8)
    with pytest.raises(TypeError, match="hidden is float64"):
        rc.step_scores(hidden, weight, rows, GOOD, BAD, impl="triton")
