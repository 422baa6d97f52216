"""Candidates from hidden states: tiles of any size, sums in fp32, no scratch of [T, K, D]."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from raise_kernels import linear_candidates
from tests.budget import assert_exact, assert_within_error_budget
from tests.kernels.cases import DTYPES, IGNORED

NAN = float("nan")
HALF_ULP = torch.finfo(torch.float32).eps / 2
fast_impl = pytest.mark.parametrize("impl", ["native", "triton"])


def run(
    ids: Tensor, rows: Tensor | None, up: Tensor, inputs: tuple[Tensor, Tensor, Tensor], **options: object
) -> list[Tensor]:
    """Values, then gradients of hidden, weight and bias."""
    h, w, b = (x.detach().clone().requires_grad_() for x in inputs)
    out = rc.candidate_logp(ids, hidden=h, weight=w, bias=b, rows=rows, **options)
    return [out.detach(), *torch.autograd.grad(out, (h, w, b), up.to(out.dtype))]


def inputs_of(count: int, depth: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.randn(count, depth), torch.randn(vocab, depth), torch.randn(vocab)
    hidden, weight, bias = (x.to(dtype) for x in made)
    return hidden, weight, bias


@fast_impl
@pytest.mark.parametrize("dtype", DTYPES)
@given(memory=st.sampled_from([1, 500, 4000]), seed=st.integers(0, 2**31))
def test_tiles_change_no_bit(impl: str, dtype: torch.dtype, memory: int, seed: int) -> None:
    """Of the candidates' part; the normaliser is asked for with the memory that holds all of it."""
    torch.manual_seed(seed)
    hidden, weight, bias = inputs_of(6, 12, 30, dtype)
    chosen, n = torch.randint(-1, 8, (9, 4)), torch.randint(0, 6, (9,))
    up = torch.randn(9, 4)

    def all_of(memory: int) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = torch.ops.raise_kernels.candidate_logits(*leaves, chosen, n, memory, impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, up)]

    assert linear_candidates._at_once(memory, hidden) < 36 < linear_candidates._at_once(1 << 20, hidden)
    for name, a, b in zip(
        ("value", "hidden", "weight", "bias"), all_of(memory), all_of(1 << 20), strict=True
    ):
        assert_exact(a, b, name=name)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@fast_impl
@pytest.mark.parametrize("memory", [1, None])
def test_any_memory_within_budget(impl: str, memory: int | None) -> None:
    inputs = inputs_of(7, 16, 300, torch.float32)
    inputs[0][3] = NAN
    ids, rows = torch.randint(0, 300, (5, 3)), torch.tensor([6, 0, 3, 2, 0])
    ids[1, 1], ids[4, 0] = IGNORED, 300
    up = torch.randn(5, 3)
    got = run(ids, rows, up, inputs, memory=memory, impl=impl)
    assert got[0][2].isnan().all() and got[0][4, 0].isnan() and got[0][1, 1] == 0
    # Their slope is 0, so that the oracle needs no row with a NaN, which its product would spread.
    clean = (torch.where(inputs[0].isnan(), 0.0, inputs[0]), *inputs[1:])
    up[2] = 0
    wide = tuple(x.double() for x in clean)
    oracle, peer = (run(ids, rows, up, x, impl="reference") for x in (wide, clean))
    floor = HALF_ULP * (1 + float(up.abs().sum()))
    for k, (a, b, c) in enumerate(zip(got, oracle, peer, strict=True)):
        b, c = (x.clone() for x in (b, c))
        if k == 0:
            b[2], c[2] = NAN, NAN
        near = torch.where((c - b).abs() <= floor, (b + floor).float(), c)
        assert_within_error_budget(a, b, near, name=f"result {k}")


@fast_impl
def test_the_weights_gradient_is_rounded_once(impl: str) -> None:
    """512 rows with the same four options: in bf16 a running sum stops growing at 256 times its terms."""
    hidden, weight = torch.ones(512, 8, dtype=torch.bfloat16), torch.zeros(5, 8, dtype=torch.bfloat16)
    weight.requires_grad_()
    chosen = torch.arange(4).expand(512, 4).contiguous()
    out = torch.ops.raise_kernels.candidate_logits(
        hidden, weight, None, chosen, torch.arange(512), 1 << 20, impl
    )
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert grad.tolist() == [[512.0] * 8] * 4 + [[0.0] * 8]


def test_scratch_is_bounded() -> None:
    hidden, weight, bias = inputs_of(256, 64, 50, torch.float32)
    ids = torch.randint(0, 50, (256, 40))
    limit, gathered = 1 << 19, 256 * 40 * 64 * 4

    def peak_of(memory: int) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            run(ids, None, torch.ones(256, 40), (hidden, weight, bias), memory=memory)
        peak = now = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return peak

    assert peak_of(limit) < 3 * limit < gathered
    assert gathered < peak_of(1 << 30)


# torch.library.opcheck reads .grad of a non-leaf tensor itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@fast_impl
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(impl: str, biased: bool) -> None:
    hidden, weight, bias = (x.requires_grad_() for x in inputs_of(6, 8, 40, torch.float32))
    chosen = torch.tensor([[3, 4], [-1, 39], [3, 3]])
    rest = (chosen, torch.tensor([2, 0, 5]), 1 << 20, impl)
    arguments = (hidden, weight, bias if biased else None, *rest)
    torch.library.opcheck(torch.ops.raise_kernels.candidate_logits, arguments)
    tensors = (hidden.detach(), weight.detach(), bias.detach() if biased else None, *rest[:2])
    back = (torch.randn(3, 2), *tensors, [True, True, biased], *rest[2:])
    torch.library.opcheck(torch.ops.raise_kernels.candidate_logits_backward, back)


@fast_impl
def test_no_rows(impl: str) -> None:
    ids, none = torch.tensor([[0, IGNORED]]), torch.zeros(0, 4)
    got = rc.candidate_logp(ids, hidden=none, weight=torch.randn(9, 4), rows=torch.tensor([0]), impl=impl)
    assert got[0, 0].isnan() and got[0, 1] == 0


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"memory": 0}, ValueError, "memory is 0; give at least 1, or None"),
        ({"memory": 0.5}, TypeError, "memory is 0.5; give a whole number"),
        ({"hidden": [[0.0]]}, TypeError, "hidden is a list; give a tensor"),
        ({"weight": torch.zeros(9, 3)}, ValueError, "hidden has shape"),
    ],
)
def test_wrong_arguments(impl: str, change: dict[str, object], error: type[Exception], match: str) -> None:
    given = {"hidden": torch.zeros(4, 2), "weight": torch.zeros(9, 2)} | change
    with pytest.raises(error, match=match):
        rc.candidate_logp(torch.zeros(4, 2, dtype=torch.long), impl=impl, **given)
