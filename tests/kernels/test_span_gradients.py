"""Gradients of SCRE and of span log-probabilities: finite differences in fp64, and float64 autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from raise_kernels import _span_operator, reference, scre, span_logp
from raise_kernels._checks import Scre
from tests.budget import (
    HALF_ULP,
    assert_exact,
    assert_within_error_budget,
    close_to,
    no_better_than,
    rounding,
)
from tests.kernels.spans import Case, cases

INF, NAN = math.inf, math.nan
Op = Callable[[Tensor, Tensor, Scre], Tensor]
OPS: dict[str, tuple[Op, Op]] = {
    "scre": (reference.scre, scre.scre),
    "span_logp": (reference.span_logp, span_logp.span_logp),
}
every_op = pytest.mark.parametrize("op", list(OPS))
every_way = pytest.mark.parametrize(
    "how",
    [
        Scre(),
        Scre(eta=0.0, lam=0.0),
        Scre(eta=0.0, normalize=True),
        Scre(eta=2.0, lam=5.0, first_index=0),
        Scre(eta=300.0, normalize=True),
        Scre(eta=300.0, lam=3.0),
    ],
)
OFFSETS = torch.tensor([0, 1, 1, 4, 9, 9])


def gradient(run: Op, logp: Tensor, offsets: Tensor, how: Scre, up: Tensor) -> Tensor:
    leaf = logp.detach().clone().requires_grad_()
    out = run(leaf, offsets, how)
    return torch.autograd.grad(out, leaf, up.to(out.dtype))[0]


@every_op
@every_way
def test_finite_differences(op: str, how: Scre) -> None:
    logp = -torch.rand(9, dtype=torch.float64) * 3
    torch.autograd.gradcheck(lambda x: OPS[op][0](x, OFFSETS, how), logp.requires_grad_())


@every_op
@every_way
@given(case=cases())
def test_within_budget(op: str, how: Scre, case: Case) -> None:
    up = torch.randn(len(case.offsets) - 1)
    before = case.logp.clone(), case.offsets.clone(), up.clone()
    plain, fast = OPS[op]
    got = gradient(fast, case.logp, case.offsets, how, up)
    oracle = gradient(plain, case.logp.double(), case.offsets, how, up.double())
    peer = gradient(plain, case.logp, case.offsets, how, up)
    # Weights, probabilities and upstream gradients are rounded once each, where they are near 1.
    floor = HALF_ULP * (1 + how.lam) * float(up.abs().max()) if len(up) else 0.0
    peer = no_better_than(peer, oracle, floor)
    assert_within_error_budget(got, oracle, peer, name=f"gradient of {op}")
    for was, now in zip(before, (case.logp, case.offsets, up), strict=True):
        assert_exact(now, was, name="unwritten")


@every_op
@pytest.mark.parametrize("impl", [0, 1])
@pytest.mark.parametrize("how", [Scre(), Scre(eta=400.0), Scre(eta=0.0, normalize=True)])
def test_spans_without_a_result_have_no_gradient(op: str, impl: int, how: Scre) -> None:
    logp = torch.tensor([-0.5, NAN, -0.1, INF, -0.2, -INF, -0.3, -0.4, -1.0, -INF])
    offsets = torch.tensor([0, 3, 5, 7, 7, 9, 10])
    run = OPS[op][impl]
    out = run(logp, offsets, how)
    assert out[:2].isnan().all() and not out[2:].isnan().any()
    nothing = 0.0 if op == "scre" else -INF
    assert out[2] == nothing and out[5] == nothing and out[3] == 0
    grad = gradient(run, logp, offsets, how, torch.ones(6))
    assert (grad[:5] == 0).all() and grad[5] == 0 and grad[9] == 0
    assert grad[7] != 0 or how.eta == 400.0
    assert not grad.isnan().any()


def test_weights_that_underflow_leave_the_penalty_of_the_variance() -> None:
    logp = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    how = Scre(eta=800.0, lam=2.0)
    p, mean = logp.exp(), 0.375
    want = math.exp(-2.0 * (0.125**2)) * -2.0 * p * (p - mean)
    for run in OPS["scre"]:
        got = gradient(run, logp.float(), torch.tensor([0, 2]), how, torch.ones(1))
        assert_within_error_budget(got, want, close_to(want), name="by hand")


def test_normalized_weights_that_would_all_underflow_are_not_lost() -> None:
    logp = torch.tensor([-0.5, -3.0])
    for run in OPS["span_logp"]:
        assert run(logp, torch.tensor([0, 2]), Scre(eta=300.0, normalize=True)) == logp[0]


@every_op
def test_a_span_alone_has_the_gradient_it_has_in_any_batch(op: str) -> None:
    lengths = torch.randint(0, 30, (50,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    logp, up = -torch.rand(int(offsets[-1])) * 3, torch.randn(50)
    run = OPS[op][1]
    whole_out, whole = run(logp, offsets, Scre()), gradient(run, logp, offsets, Scre(), up)
    for k in (0, 7, 49):
        part = slice(int(offsets[k]), int(offsets[k + 1]))
        bounds = torch.tensor([0, int(lengths[k])])
        assert_exact(run(logp[part], bounds, Scre()), whole_out[k : k + 1], name="value")
        assert_exact(gradient(run, logp[part], bounds, Scre(), up[k : k + 1]), whole[part], name="gradient")


@every_op
@pytest.mark.parametrize("impl", [0, 1])
def test_bounds_that_only_the_device_sees_not_to_fit(
    op: str, impl: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, logp = OPS[op][impl], -torch.rand(8)
    offsets = torch.tensor([0, 2, 9, 4, 8, -1, 8])
    fitting = run(logp[:2], torch.tensor([0, 2]), Scre())
    monkeypatch.setattr("raise_kernels._checks.on_host", lambda *_: False)
    out = run(logp, offsets, Scre())
    # The fourth comes after a fall: its tokens are the second's too, in what owns a token once.
    assert out.isnan().tolist() == [False, True, True, impl == 0, True, True]
    assert_exact(out[:1], fitting, name="the span that fits")
    grad = gradient(run, logp, offsets, Scre(), torch.ones(6))
    assert (grad[:2] != 0).all() and (grad[2:] == 0).all()


BAD = [[0, 2, 9], [-1, 2, 8], [0, 5, 3, 8], [0, 2, 4], [1, 2, 8], [0, 0, -4, 8], [9, 9, 9]]


@every_op
@pytest.mark.parametrize("bad", BAD)
def test_the_reference_keeps_bad_bounds_apart(
    op: str, bad: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A span is what it is alone, or NaN where its bounds leave [0, T] or fall, and touches no other."""
    logp, plain = -torch.rand(8), OPS[op][0]
    monkeypatch.setattr("raise_kernels._checks.on_host", lambda *_: False)
    offsets = torch.tensor(bad)
    how = Scre(eta=300.0, normalize=True)
    out = plain(logp, offsets, how)
    grad = gradient(plain, logp, offsets, how, torch.ones(len(out)))
    assert not grad.isnan().any()
    for s, (first, end) in enumerate(pairwise(bad)):
        fits = 0 <= first <= end <= 8
        if not fits or bad == sorted(bad):
            assert out[s].isnan() != fits
        if not out[s].isnan():
            alone = plain(logp[first:end], torch.tensor([0, end - first]), how)
            assert_exact(out[s : s + 1], alone, name="alone")


@every_op
@pytest.mark.parametrize("impl", ["auto", "native", "triton", "reference"])
def test_a_compiled_graph_refuses_bad_bounds_when_it_runs(op: str, impl: str) -> None:
    """Its code was traced without values; an operator sees them."""
    torch._dynamo.reset()

    def run(logp: Tensor, offsets: Tensor) -> Tensor:
        return getattr(rc, op)(logp, offsets, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    logp, good = -torch.rand(8), torch.tensor([0, 3, 8])
    assert_exact(compiled(logp, good), run(logp, good), name="good bounds")
    for bad in [bounds for bounds in BAD if len(bounds) == 3]:
        offsets = torch.tensor(bad)
        with pytest.raises(ValueError, match="rise from 0 to 8"):
            run(logp, offsets)
        with pytest.raises(ValueError, match="rise from 0 to 8"):
            compiled(logp, offsets)


@every_op
def test_tokens_without_a_span_are_refused_by_their_shapes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raise_kernels._checks.on_host", lambda *_: False)
    for run in OPS[op]:
        with pytest.raises(ValueError, match="names no span, but logp has 2 tokens"):
            run(torch.zeros(2), torch.tensor([0]), Scre())


@every_op
def test_strides_and_an_expanded_upstream(op: str) -> None:
    run = OPS[op][1]
    wide = torch.full((9, 3), NAN)
    wide[:, 1] = -torch.rand(9)
    leaf = wide.clone().requires_grad_()
    run(leaf[:, 1], OFFSETS, Scre()).sum().backward()
    expected = gradient(run, wide[:, 1], OFFSETS, Scre(), torch.ones(5))
    assert leaf.grad is not None
    assert_exact(leaf.grad[:, 1], expected, name="strided")
    one = torch.tensor(-0.5, requires_grad=True)
    run(one.expand(9), OFFSETS, Scre()).sum().backward()
    each = gradient(run, torch.full((9,), -0.5), OFFSETS, Scre(), torch.ones(5))
    assert_exact(one.grad, each.sum(), name="expanded logp")


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_gradient_has_the_dtype_of_logp(op: str, dtype: torch.dtype) -> None:
    logp = (-torch.rand(9)).to(dtype)
    grad = gradient(OPS[op][1], logp, OFFSETS, Scre(), torch.ones(5))
    exact = gradient(OPS[op][1], logp.float(), OFFSETS, Scre(), torch.ones(5))
    assert_within_error_budget(grad, exact.double(), exact.to(dtype), name="rounded once")


@every_op
def test_no_spans_and_no_tokens(op: str) -> None:
    for offsets in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        leaf = torch.zeros(0, requires_grad=True)
        out = OPS[op][1](leaf, offsets, Scre())
        assert out.tolist() == [0.0] * (len(offsets) - 1)
        assert torch.autograd.grad(out.sum(), leaf)[0].shape == (0,)


# torch.library.opcheck reads .grad of a non-leaf tensor itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@every_op
def test_opcheck(op: str) -> None:
    logp = (-torch.rand(9)).requires_grad_()
    options = (0.1, 1.0, 1, False)
    library = torch.ops.raise_kernels
    torch.library.opcheck(getattr(library, op), (logp, OFFSETS, *options))
    out = getattr(library, op)(logp, OFFSETS, *options).detach()
    arguments = (torch.randn(5), out, logp.detach(), OFFSETS, *options)
    torch.library.opcheck(getattr(library, f"{op}_backward"), arguments)
    torch.library.opcheck(library.seen_offsets, (OFFSETS, 9))


def loss(logp: Tensor, offsets: Tensor, impl: str) -> Tensor:
    reward = rc.scre(logp * 2, offsets, impl=impl)
    likely = rc.span_logp(logp, offsets, reduce="decay", impl=impl).exp()
    return (reward - likely + rc.span_logp(logp, offsets, impl=impl)).sum()


@pytest.mark.parametrize("impl", ["native", "triton", "reference"])
def test_compiled_without_a_graph_break(impl: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([1, 0, 3], [2, 2, 0, 5]):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        logp = -torch.rand(int(offsets[-1]))
        results = []
        for function in (loss, compiled):
            leaf = logp.clone().requires_grad_()
            value = function(leaf, offsets, impl)
            value.backward()
            results.append((value.detach(), leaf.grad))
        assert_exact(results[1][0], results[0][0], name="value")
        assert_exact(results[1][1], results[0][1], name="gradient")


@every_op
def test_what_the_caller_does_to_a_result_does_not_reach_the_gradient(op: str) -> None:
    logp = (-torch.rand(9)).requires_grad_()
    grads = []
    for spoil in (False, True):
        out = OPS[op][1](logp, OFFSETS, Scre())
        if spoil:
            out.detach().fill_(NAN)
        grads.append(torch.autograd.grad(out.sum(), logp)[0])
    assert_exact(grads[1], grads[0], name="gradient")


@given(data=st.data(), case=cases(odd=False))
def test_span_logp_says_what_it_says(data: st.DataObject, case: Case) -> None:
    impl = data.draw(st.sampled_from(["reference", "native", "triton"]))
    logp = case.logp.double()
    spans = [logp[a:b] for a, b in zip(case.offsets[:-1], case.offsets[1:], strict=True)]
    eta = data.draw(st.sampled_from([0.0, 0.3, 5.0]))
    j = torch.arange(1.0, 20.0, dtype=torch.float64)
    decayed = [(torch.exp(-eta * j[: len(s)]) * s).sum() for s in spans]
    weights = [torch.exp(-eta * j[: len(s)]).sum() if len(s) else 1.0 for s in spans]
    ways = {
        "sum": ({}, [s.sum() for s in spans]),
        "mean": ({}, [s.sum() / max(len(s), 1) for s in spans]),
        "decay": ({"eta": eta}, decayed),
        "decay, from 0": ({"eta": eta, "first_index": 0}, [d * math.exp(eta) for d in decayed]),
        "decay, normalized": (
            {"eta": eta, "normalize": True},
            [d / w for d, w in zip(decayed, weights, strict=True)],
        ),
    }
    for name, (options, values) in ways.items():
        reduce = name.partition(",")[0]
        got = rc.span_logp(case.logp, case.offsets, reduce=reduce, impl=impl, **options)
        want = torch.tensor([float(v) for v in values], dtype=torch.float64)
        peer = rc.span_logp(case.logp, case.offsets, reduce=reduce, impl="reference", **options)
        # A span has up to four terms to round, and its weights.
        peer = no_better_than(peer, want, 4 * rounding(want, torch.float32))
        assert_within_error_budget(got, want, peer, name=name)


def test_wrong_arguments() -> None:
    logp, offsets = torch.zeros(3), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="reduce is 'max'"):
        rc.span_logp(logp, offsets, reduce="max")
    with pytest.raises(ValueError, match="eta is -1"):
        rc.span_logp(logp, offsets, eta=-1.0)
    for impl in ("reference", "triton"):
        with pytest.raises(ValueError, match="rise from 0 to 3"):
            rc.span_logp(logp, torch.tensor([0, 2]), impl=impl)


def test_every_operator_has_a_module() -> None:
    assert set(_span_operator.NAMES) == set(OPS)
