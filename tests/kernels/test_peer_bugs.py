"""Bugs that other kernel libraries had, by number: the smallest case that would show each of them here.

     1  row * stride in 32 bits                        15  more threads than a program may have (process)
     2  rows on a grid axis of 65535 (process)         16  more shared memory than there is (process)
     3  padded columns of the vocabulary counted       17  autotuning runs a kernel more than once (process)
     4  softcap after the mask                         18  a mask multiplied with an infinity
     5  exp(-inf - -inf) in a masked tile              19  the gradient of one output dropped
     6  0 * -inf in the entropy                        20  upstream weights applied after the sum over rows
     7  a maximum that starts at 0                     21  p - 1 cancels where the model is sure
     8  results in the dtype of the logits             22  an upstream gradient of stride 0
     9  ignored rows: no value, or still read          23  two copies of the loss drift apart
    10  a target outside the vocabulary                24  a fallback that nobody is told of (process)
    11  targets that are not aligned                   25  pairs of options that nobody tried
    12  logits or gradients spoilt by backward         26  one program per row (process)
    13  a new variant for every length (process)       27  saved tensors of the size of the logits (process)
    14  scalars in fp64 under a compiler (process)

Those marked (process) are in test_peer_bugs_process.py. What is scored comes as logits, and as hidden states
whose product with an identity matrix are the same logits to the bit.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_core.policy_loss import policy_loss
from raise_kernels import _compiled, reference
from raise_kernels._checks import DIFFERENTIABLE, LogitMap
from tests.budget import (
    assert_at_most,
    assert_exact,
    assert_rank,
    assert_within_error_budget,
    no_better_than,
    sum_slack,
)
from tests.kernels.cases import permuted_peers
from tests.kernels.linear_cases import Case, gradients_of, stats_of

NAN, INF = float("nan"), float("inf")
SUMS = ("logp", "lse", "entropy", "self_certainty", "max_logp")
both_paths = pytest.mark.parametrize("path", ["logits", "hidden"])
both_impls = pytest.mark.parametrize("impl", ["native", "floor", "triton"], indirect=True)


@pytest.fixture
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation; "floor" is native without its C code."""
    if request.param == "floor":
        monkeypatch.setenv(_compiled.SWITCH, "0")
    return "native" if request.param == "floor" else str(request.param)


def run(
    path: str, impl: str, x: Tensor, y: Tensor, *, mask: Tensor | None = None, **options: Any
) -> rc.TokenStats:
    """Statistics of logits x [T, V], whose columns in mask [V] are -inf."""
    if path == "logits":
        masked = x if mask is None else x.masked_fill(mask, -INF)
        return rc.token_stats(masked, y, impl=impl, **options)
    bias = None if mask is None else torch.zeros(len(mask)).masked_fill(mask, -INF)
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return rc.linear_token_stats(x, eye, y, bias=bias, impl=impl, **options)


def judged(
    path: str,
    impl: str,
    x: Tensor,
    y: Tensor,
    *,
    mask: Tensor | None = None,
    want: Any = SUMS,
    **options: Any,
) -> rc.TokenStats:
    """`run`, with each result held to its budget."""
    got = run(path, impl, x, y, mask=mask, want=want, **options)
    how = LogitMap(**options)
    masked = x if mask is None else x.masked_fill(mask, -INF)
    oracle = reference.token_stats(masked.double(), y, how=how, want=want)
    peers = permuted_peers(masked, y, oracle, how, want=want)
    for name in want:
        assert_within_error_budget(
            getattr(got, name), oracle[name], peers[name], name=f"{path} {impl} {name}"
        )
    return got


def huge(rows: int, columns: int) -> Tensor:
    """[rows, columns] whose rows lie 2^31 + 64 elements apart. Virtual memory only: it is never touched."""
    return torch.empty(rows * (2**31 + 64), dtype=torch.bfloat16).as_strided((rows, columns), (2**31 + 64, 1))


@both_impls
@pytest.mark.parametrize("far", ["logits", "hidden", "weight"])
def test_bug_01_offsets_beyond_32_bits(impl: str, far: str) -> None:
    x, y = torch.randn(2, 40).bfloat16(), torch.tensor([1, 0])
    apart = huge(2, 40).copy_(x)
    if far == "logits":
        got, near = (rc.token_stats(z, y, impl=impl).logp for z in (apart, x))
    else:
        pairs = [(apart, x), (x, x)] if far == "hidden" else [(x, apart), (x, x)]
        got, near = (rc.linear_token_stats(h, w, y, impl=impl).logp for h, w in pairs)
    assert got is not None and near is not None
    assert_exact(got, near, name=far)


@both_impls
@both_paths
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 127, 129, 257])
def test_bug_03_padded_columns_are_not_counted(path: str, impl: str, vocab: int) -> None:
    x = torch.randn(4, vocab) - 50.0
    y = torch.randint(0, vocab, (4,))
    x[torch.arange(2), y[:2]] += 45.0
    judged(path, impl, x, y)


@both_impls
@both_paths
def test_bug_04_the_mask_comes_after_the_softcap(path: str, impl: str) -> None:
    x, y = torch.randn(4, 200) * 3, torch.tensor([0, 3, 9, 19])
    few = judged(path, impl, x[:, :20].contiguous(), y, softcap=0.5)
    mask = torch.arange(200) >= 20
    for got in (
        judged(path, impl, x, y, mask=mask, softcap=0.5),
        judged(path, impl, x, y, valid_vocab=20, softcap=0.5),
    ):
        assert few.logp is not None and got.logp is not None
        assert_at_most((got.logp - few.logp).abs(), sum_slack(200), name="what the padding changes")


@both_impls
@both_paths
def test_bug_05_a_masked_tile_makes_no_nan(path: str, impl: str) -> None:
    x, y = torch.randn(3, 300), torch.tensor([295, 299, 296])
    judged(path, impl, x, y, mask=torch.arange(300) < 290)
    nothing = run(path, impl, x, y, mask=torch.ones(300, dtype=torch.bool), want=SUMS)
    assert all(getattr(nothing, name).isnan().all() for name in SUMS)


@both_impls
@both_paths
def test_bug_06_entropy_of_masked_columns(path: str, impl: str) -> None:
    x, y = torch.randn(3, 90).requires_grad_(), torch.tensor([1, 2, 4])
    mask = torch.arange(90) % 3 == 0
    got = run(path, impl, x, y, mask=mask, want=("entropy", "self_certainty", "varentropy"))
    assert got.entropy is not None and got.self_certainty is not None and got.varentropy is not None
    assert got.entropy.isfinite().all() and got.varentropy.isfinite().all()
    (grad,) = torch.autograd.grad((got.entropy + got.self_certainty).sum(), x)
    assert grad.isfinite().all() and (grad[:, mask] == 0).all() and (grad[:, ~mask] != 0).all()


@both_impls
@both_paths
@pytest.mark.parametrize("shift", [1e4, -1e4, -300.0])
def test_bug_07_a_common_offset(path: str, impl: str, shift: float) -> None:
    judged(path, impl, torch.randn(3, 130) + shift, torch.tensor([0, 64, 129]))


@both_impls
@both_paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bug_08_results_are_fp32(path: str, impl: str, dtype: torch.dtype) -> None:
    got = judged(path, impl, torch.randn(5, 100).to(dtype), torch.arange(5))
    assert all(getattr(got, name).dtype == torch.float32 for name in SUMS)


@both_impls
@both_paths
def test_bug_09_an_ignored_row_is_zero_and_not_read(path: str, impl: str) -> None:
    x, y = torch.randn(3, 70), torch.tensor([4, -100, 5])
    x[1] = NAN
    x.requires_grad_()
    got = run(path, impl, x, y, want=SUMS)
    assert all(getattr(got, name)[1] == 0 for name in SUMS)
    assert got.logp is not None
    (grad,) = torch.autograd.grad(got.logp.sum(), x)
    assert (grad[1] == 0).all() and grad.isfinite().all() and (grad[0] != 0).any()


@both_impls
@both_paths
@pytest.mark.parametrize("target", [70, -1, 2**40, -(2**40)])
def test_bug_10_a_target_outside_the_vocabulary_is_nan(path: str, impl: str, target: int) -> None:
    logp = run(path, impl, torch.randn(3, 70), torch.tensor([4, target, 5])).logp
    assert logp is not None and logp.isnan().tolist() == [False, True, False]


@both_impls
@both_paths
def test_bug_11_targets_and_rows_at_any_address(path: str, impl: str) -> None:
    x, y = torch.randn(8, 70), torch.randint(0, 70, (17,))
    for view in (y[1:9], y[1::2], y.int()[3:11]):
        got, aligned = run(path, impl, x, view).logp, run(path, impl, x, view.long().clone()).logp
        assert got is not None and aligned is not None
        assert_exact(got, aligned, name="logp")


@both_impls
@both_paths
def test_bug_12_backward_spoils_nothing_and_may_run_twice(path: str, impl: str) -> None:
    x = torch.randn(3, 70)
    before, leaf = x.clone(), x.requires_grad_()
    logp = run(path, impl, leaf, torch.tensor([1, 2, 3])).logp
    assert logp is not None
    first, again = (torch.autograd.grad(logp.sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert_exact(again, first, name="second backward")
    assert_exact(leaf.detach(), before, name="logits")


@both_impls
@both_paths
def test_bug_18_infinities_that_a_mask_hides(path: str, impl: str) -> None:
    x, y = torch.randn(4, 70), torch.tensor([1, -100, 70, 3])
    x[1], x[2] = INF, -INF
    weight = torch.eye(70).requires_grad_()
    leaf = x.requires_grad_()
    if path == "logits":
        logp = rc.token_stats(leaf, y, impl=impl).logp
    else:
        logp = rc.linear_token_stats(leaf, weight, y, impl=impl).logp
    assert logp is not None and logp.isnan().tolist() == [False, False, True, False]
    logp.backward(torch.ones(4))
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert weight.grad is None or weight.grad.isfinite().all()


def linear_case(bias: bool = False, dtype: torch.dtype = torch.float32) -> Case:
    hidden, weight = torch.randn(5, 33).to(dtype), torch.randn(70, 33).to(dtype)
    offset = torch.randn(70).to(dtype) if bias else None
    return Case(hidden, weight, offset, torch.tensor([1, 69, 3, 8, 8]), None, LogitMap())


def judge_gradient(impl: str, case: Case, up: dict[str, Tensor]) -> None:
    leaves = [x.clone().requires_grad_() for x in case[:3] if x is not None]
    bias = leaves[2] if case.bias is not None else None
    options = {**case.options(), "bias": bias}
    got = rc.linear_token_stats(leaves[0], leaves[1], case.y, **options, want=tuple(up), impl=impl)
    made = torch.autograd.grad([getattr(got, name) for name in up], leaves, list(up.values()))
    oracle, peers = gradients_of(
        case, lambda stats: {n: u.to(stats[n].dtype) for n, u in up.items()}, tuple(up)
    )
    for k, value in enumerate(made):
        want, peer = oracle[k], peers[k]
        assert want is not None and peer is not None
        assert_within_error_budget(value, want, peer, name=f"{impl} gradient of {Case._fields[k]}")


@both_impls
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_bug_19_no_output_loses_its_gradient(impl: str, name: str) -> None:
    judge_gradient(impl, linear_case(bias=True), {name: torch.randn(5)})
    x = torch.randn(3, 70).requires_grad_()
    value = getattr(rc.token_stats(x, torch.tensor([1, 2, 3]), want=(name,), impl=impl), name)
    assert (torch.autograd.grad(value.sum(), x)[0] != 0).all()


@both_impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bug_20_every_token_has_its_own_weight(impl: str, dtype: torch.dtype) -> None:
    judge_gradient(impl, linear_case(dtype=dtype), {"logp": torch.tensor([0.0, 1.0, -3.0, 10.0, 0.5])})


@both_impls
@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bug_21_the_gradient_of_a_sure_token(path: str, impl: str, dtype: torch.dtype) -> None:
    x, y = torch.zeros(2, 70, dtype=dtype), torch.tensor([3, 4])
    x[torch.arange(2), y] = 12.0
    leaf = x.requires_grad_()
    logp = run(path, impl, leaf, y).logp
    assert logp is not None
    (grad,) = torch.autograd.grad(logp.sum(), leaf)
    others = torch.exp(torch.tensor(-12.0, dtype=torch.float64)) * 69
    want = (others / (1 + others)).expand(2)
    peer = no_better_than(want.to(dtype), want, sum_slack(70))
    assert_within_error_budget(grad[torch.arange(2), y], want, peer, name="1 - p")


@both_impls
@both_paths
def test_bug_22_an_expanded_upstream(path: str, impl: str) -> None:
    x, y = torch.randn(4, 70).requires_grad_(), torch.arange(4)
    logp = run(path, impl, x, y).logp
    assert logp is not None
    up = torch.tensor(0.7)
    grads = [
        torch.autograd.grad(logp, x, u, retain_graph=True)[0] for u in (up.expand(4), up.expand(4).clone())
    ]
    assert_exact(grads[0], grads[1], name="gradient")


@both_impls
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_bug_23_one_loss(impl: str, kind: Any, kl: Any) -> None:
    case = linear_case()
    logp = rc.linear_token_stats(case.hidden, case.weight, case.y, impl=impl).logp
    assert logp is not None
    old, ref = logp + torch.tensor([0.5, -0.5, 0.0, 0.1, -0.1]), logp - 0.2
    rest: dict[str, Any] = {
        "kind": kind, "kl": 0.1, "kl_estimator": kl, "logp_ref": ref, "num_tokens": 5, "num_sequences": 2,
        "max_length": 4,
    }  # fmt: skip
    advantage, offsets = torch.tensor([1.0, -2.0]), torch.tensor([0, 3, 5])
    fused = rc.linear_policy_loss(
        case.hidden, case.weight, case.y, old, advantage, offsets, **rest, impl=impl
    )
    two = policy_loss(logp, old, advantage, offsets, **rest)
    assert_exact(fused.loss, two.loss, name="loss")
    assert fused.metrics.keys() == two.metrics.keys()


OPTIONS: dict[str, Any] = {
    "bias": torch.linspace(-2, 2, 70),
    "softcap": 4.0,
    "temperature": 0.6,
    "logit_scale": 1.5,
    "valid_vocab": 66,
    "rows": torch.tensor([4, 0, 0]),
    "y": torch.tensor([5, -100, 69]),
}


@both_impls
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(OPTIONS, 2)))
def test_bug_25_every_pair_of_options(impl: str, one: str, other: str) -> None:
    given = {name: OPTIONS[name] for name in (one, other)}
    bias = given.pop("bias", None)
    if bias is not None:
        bias = bias.masked_fill(torch.arange(70) % 7 == 0, -INF)
    y, rows = given.pop("y", torch.tensor([5, 1, 65])), given.pop("rows", None)
    hidden = torch.randn(5 if rows is not None else 3, 33)
    case = Case(hidden, torch.randn(70, 33), bias, y, rows, LogitMap(**given))
    want = (*SUMS, "varentropy", "rank")
    got = rc.linear_token_stats(hidden, case.weight, y, **case.options(), want=want, impl=impl)
    oracle, peers, tied = stats_of(case, want)
    for name in want[:-1]:
        assert_within_error_budget(getattr(got, name), oracle[name], peers[name], name=name)
    assert got.rank is not None
    assert_rank(got.rank, oracle["rank"], tied, name="rank")
