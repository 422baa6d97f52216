"""A tree's attention from calls that are merged by log-sum-exp, against dense attention under its mask."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention as sdpa

from raise_core.scoring import flash_tree
from raise_core.scoring.flash_tree import CpuFlash, GpuFlash, plan
from raise_core.scoring.tree_attention import Layout, attend, dense_mask
from tests.budget import assert_equal_but_for_roundings, assert_exact, assert_within_bound, attention_bounds

Draw = Any
NAMES = ("out", "dq", "dk", "dv")


@st.composite
def layouts(draw: Draw) -> Layout:
    """One to three prompts with up to five nodes after each, in depth-first order; or one cached prompt."""
    lengths, parents = list[int](), list[int]()
    for _ in range(draw(st.integers(1, 3))):
        line = [len(lengths)]
        lengths.append(draw(st.integers(2, 9)))
        parents.append(-1)
        for _ in range(draw(st.integers(0, 5))):
            line = line[: draw(st.integers(1, len(line)))]
            parents.append(line[-1])
            line.append(len(lengths))
            lengths.append(draw(st.integers(1, 5)))
    one = parents.count(-1) == 1 and len(lengths) > 1
    return Layout(tuple(lengths), tuple(parents), int(one and draw(st.booleans())))


def inputs(layout: Layout, gqa: bool, seed: int) -> list[Tensor]:
    """Query, key, value and the upstream gradient, fp64."""
    source = torch.Generator().manual_seed(seed)
    shapes = [
        (1, 4, layout.queries, 8),
        *[(1, 2 if gqa else 4, layout.keys, 8)] * 2,
        (1, 4, layout.queries, 8),
    ]
    return [torch.randn(shape, dtype=torch.float64, generator=source) for shape in shapes]


def run(call: Any, layout: Layout, given: list[Tensor], dtype: torch.dtype, gqa: bool) -> list[Tensor]:
    """Output and gradients of one way of attending."""
    leaves = [x.to(dtype).requires_grad_() for x in given[:3]]
    out = call(layout, *leaves, scale=0.7, enable_gqa=gqa)
    return [out, *torch.autograd.grad(out, leaves, given[3].to(dtype))]


def dense(layout: Layout, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """What it means."""
    return sdpa(q, k, v, attn_mask=dense_mask(layout, q.dtype, "cpu"), **options)


@given(
    layouts(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 9),
)
def test_merged_calls_are_dense_attention(layout: Layout, gqa: bool, dtype: torch.dtype, seed: int) -> None:
    """Values and gradients of any tree."""
    given = [x.to(dtype).double() for x in inputs(layout, gqa, seed)]
    got, oracle = run(attend, layout, given, dtype, gqa), run(dense, layout, given, torch.float64, gqa)
    for what, g, o, bound in zip(NAMES, got, oracle, bounds(layout, given, gqa, dtype), strict=True):
        assert_within_bound(g, o, bound, name=f"{layout} {dtype} {what}")


def bounds(layout: Layout, given: list[Tensor], gqa: bool, dtype: torch.dtype) -> list[Tensor]:
    """Of the output and the three gradients; heads that share a key add up theirs."""
    q, k, v, grad = given
    if gqa:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    mask = dense_mask(layout, torch.float64, "cpu")
    out, *found = attention_bounds(q, k, v, grad, mask, 0.7, dtype)
    return [out, found[0], *(x.unflatten(1, (2, 2)).sum(2) if gqa else x for x in found[1:])]


@given(layouts(), st.booleans())
def test_merging_is_exact_in_fp64(layout: Layout, gqa: bool) -> None:
    given = inputs(layout, gqa, 0)
    got, want = (run(call, layout, given, torch.float64, gqa) for call in (attend, dense))
    for what, g, w in zip(NAMES, got, want, strict=True):
        assert_equal_but_for_roundings(g, w, name=what)


def test_each_key_is_read_by_one_call_for_all_that_follow_it() -> None:
    """The plan: queries of all descendants are one run of rows."""
    calls = plan((5, 3, 2, 1, 4, 2), (-1, 0, 1, 0, -1, 4), 0)
    assert calls.lengths == (5, 3, 2, 1, 4, 2)
    assert calls.across == (
        (slice(5, 11), slice(0, 5)),
        (slice(8, 10), slice(5, 8)),
        (slice(15, 17), slice(11, 15)),
    )
    cached = plan((5, 3, 1), (-1, 0, 0), 1)
    assert (cached.lengths, cached.cached, cached.across) == ((3, 1), 5, ((slice(0, 4), slice(0, 5)),))
    assert plan((5,), (-1,), 0).across == ()


@pytest.mark.parametrize(
    ("lengths", "parents", "cached"),
    [((7, 6, 3, 4), (-1, -1, 0, 1), 0), ((2, 1, 1, 1), (-1, 0, 0, 1), 0), ((3, 2, 1), (-1, 0, 0), 2)],
    ids=["an earlier prompt", "a cousin", "two cached"],
)
def test_other_orders_are_refused(lengths: Any, parents: Any, cached: int) -> None:
    """Descendants must be one run of rows: anything else would attend to the wrong keys."""
    with pytest.raises(ValueError, match=r"depth-first order|wanted none or one prompt"):
        plan(lengths, parents, cached)


def test_any_strides() -> None:
    """Queries, keys and values whose columns are not adjacent."""
    layout = Layout((5, 3, 3), (-1, 0, 0))
    given = inputs(layout, False, 2)
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in given]
    for what, g, w in zip(
        NAMES,
        run(attend, layout, apart, torch.float64, False),
        run(dense, layout, given, torch.float64, False),
        strict=True,
    ):
        assert_equal_but_for_roundings(g, w, name=what)


def test_dropout_and_mixed_dtypes_go_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((5, 3), (-1, 0))
    used: list[Any] = []
    monkeypatch.setattr(flash_tree.CpuFlash, "forward", lambda *args: used.append(args) or _unreachable())
    q = torch.ones(1, 2, 8, 8)
    attend(layout, q, q, q, dropout_p=0.5)
    assert not used
    with pytest.raises(AssertionError, match="merged"):
        attend(layout, q, q, q)
    assert flash_tree.flash_for(q, q, q.double(), gqa=False) is None
    assert flash_tree.flash_for(q, q, q[..., :4], gqa=False) is None


def _unreachable() -> Any:
    raise AssertionError("merged calls ran")


def test_autocast_is_that_of_scaled_dot_product_attention() -> None:
    layout = Layout((5, 3, 2), (-1, 0, 0))
    q, k, v, _ = (x.float() for x in inputs(layout, False, 1))
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(layout, q, k, v)
    half = [x.bfloat16() for x in (q, k, v)]
    assert_exact(got, attend(layout, *half), name="under autocast")


def test_a_second_derivative_is_refused() -> None:
    layout = Layout((3, 2), (-1, 0))
    q = torch.randn(1, 1, 5, 8, requires_grad=True)
    (g,) = torch.autograd.grad(attend(layout, q, q, q).pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_the_gpu_calls_fit_their_operators() -> None:
    """Shapes and arguments of the GPU's kernels, forward and backward, on tensors without values."""
    flash_tree._offsets.cache_clear()
    with FakeTensorMode():
        q = torch.empty(8, 4, 16, dtype=torch.bfloat16, device="cuda")
        for k, lengths in ((q.new_empty(8, 2, 16), [3, 3, 2]), (q.new_empty(5, 2, 16), None)):
            out, lse, kept = GpuFlash().forward(q, k, k, lengths, 0.25)
            assert out.shape == q.shape and lse.shape == (8, 4) and lse.dtype == torch.float32
            dq, dk, dv = GpuFlash().backward(out, q, k, k, out, lse, lengths, 0.25, kept)
            assert dq.shape == q.shape and dk.shape == dv.shape == k.shape
    flash_tree._offsets.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gqa", [False, True])
def test_the_gpu_is_dense_attention_too(gqa: bool) -> None:
    layout = Layout((300, 70, 33, 70), (-1, 0, 0, 2))
    given = [x.bfloat16().double() for x in inputs(layout, gqa, 3)]
    oracle = run(dense, layout, given, torch.float64, gqa)

    def on_gpu(call: Any) -> list[Tensor]:
        moved = [x.cuda() for x in given]
        return [x.cpu() for x in run(call, layout, moved, torch.bfloat16, gqa)]

    for what, g, o, bound in zip(
        NAMES, on_gpu(attend), oracle, bounds(layout, given, gqa, torch.bfloat16), strict=True
    ):
        assert_within_bound(g, o, bound, name=what)


def test_the_cpu_takes_neighbours_of_one_length_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight completions of one length are one causal call, not eight."""
    batches = list[int]()
    whole = flash_tree._batch
    monkeypatch.setattr(flash_tree, "_batch", lambda x, n: batches.append(n) or whole(x, n))
    q = torch.randn(8 * 3 + 5, 2, 8)
    CpuFlash().forward(q, q, q, [5, *[3] * 8], 1.0)
    assert batches == [1, 1, 1, 8, 8, 8]
