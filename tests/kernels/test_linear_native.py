"""linear_token_stats on the CPU: blocks of columns, tiles of rows, and gradients of all three inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raise_kernels import _compiled, _gemm, _linear_operator, linear_native, reference
from raise_kernels._checks import DIFFERENTIABLE, PLAIN, STATS, LogitMap
from tests.budget import assert_exact, assert_within_error_budget
from tests.kernels.cases import DTYPES, IGNORED

INF = float("inf")
Inputs = tuple[Tensor, Tensor, Tensor | None]
MAPS = [PLAIN, LogitMap(temperature=0.7, logit_scale=0.4, softcap=9.0, valid_vocab=190)]


def stats(inputs: Inputs, y: Tensor, **kw: object) -> dict[str, Tensor]:
    hidden, weight, bias = inputs
    return _linear_operator.linear_token_stats("native", hidden, weight, y, bias=bias, **kw)


def inputs_of(count: int, size: int, vocab: int, dtype: torch.dtype, bias: bool = True) -> Inputs:
    made = torch.randn(count, size), torch.randn(vocab, size) / size**0.5 * 3, torch.randn(vocab)
    hidden, weight, offset = (x.to(dtype) for x in made)
    return hidden, weight, offset if bias else None


def worst_peer(inputs: Inputs, y: Tensor, oracle: dict[str, Tensor], **kw: object) -> dict[str, Tensor]:
    """fp32 PyTorch with the terms of each product in three orders: of each element the least exact result."""
    hidden, weight, bias = inputs
    half_ulp = torch.finfo(torch.float32).eps / 2
    worst = {name: (value + half_ulp).float() for name, value in oracle.items()}
    for k in range(3):
        order = torch.arange(hidden.shape[-1]) if k == 0 else torch.randperm(hidden.shape[-1])
        peer = reference.linear_token_stats(
            hidden[..., order].float(), weight[:, order].float(), y, bias=bias, **kw
        )
        for name, value in peer.items():
            further = (value - oracle[name]).abs() > (worst[name] - oracle[name]).abs()
            worst[name] = torch.where(further, value, worst[name])
    return worst


def judge(inputs: Inputs, y: Tensor, **kw: object) -> dict[str, Tensor]:
    """Hold every statistic to the budget of fp32 PyTorch on the same numbers."""
    wide = tuple(None if x is None else x.double() for x in inputs)
    memory = {"memory": kw.pop("memory")} if "memory" in kw else {}
    want = kw.setdefault("want", STATS)
    oracle = reference.linear_token_stats(wide[0], wide[1], y, bias=wide[2], **kw)
    peer = worst_peer(inputs, y, oracle, **kw)
    actual = stats(inputs, y, **kw, **memory)
    for name in want:
        assert_within_error_budget(actual[name], oracle[name], peer[name], name=f"native {name}")
    return actual


@pytest.fixture(params=[64, 8192])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Several blocks of columns, and one."""
    monkeypatch.setattr(linear_native, "COLUMNS", request.param)
    return request.param


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_statistic(columns: int, dtype: torch.dtype, how: LogitMap, bias: bool) -> None:
    inputs = inputs_of(12, 24, 200, dtype, bias)
    y = torch.randint(0, 190, (12,))
    y[3], y[5], y[6], y[7] = IGNORED, 190, -1, 2**40
    how = LogitMap(**{**vars(how), "valid_vocab": 190})
    out = judge(inputs, y, how=how, memory=3 * 8 * columns)
    assert out["logp"][3] == 0 and out["logp"][5:8].isnan().all()


def test_masked_blocks(columns: int) -> None:
    """A bias of -inf masks columns: a whole block, and the target's."""
    hidden, weight, bias = inputs_of(4, 16, 200, torch.float32)
    assert bias is not None
    bias[:70], bias[130] = -INF, -INF
    out = judge((hidden, weight, bias), torch.tensor([130, 1, 80, 199]))
    assert out["logp"][:2].tolist() == [-INF, -INF]
    nothing = stats((hidden, weight, torch.full_like(bias, -INF)), torch.tensor([1, 2, 3, 4]))["logp"]
    assert nothing.isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_a_bad_row_is_nan_alone(columns: int, bad: float) -> None:
    hidden, weight, bias = inputs_of(4, 16, 200, torch.float32)
    y = torch.tensor([130, 1, 80, 199])
    clean = stats((hidden, weight, bias), y, want=STATS)
    hidden[1, 3] = bad
    got = stats((hidden, weight, bias), y, want=STATS)
    for name in STATS:
        assert got[name][1].isnan()
        assert_exact(got[name][[0, 2, 3]], clean[name][[0, 2, 3]], name=name)


def test_rows_repeat_in_any_order_and_strides_do_not_matter(columns: int) -> None:
    wide, weight, bias = inputs_of(30, 16, 200, torch.float32)
    hidden = wide.view(5, 6, 16)[:, :-1]
    rows, y = torch.tensor([7, 24, 7, 99, 0, -1]), torch.tensor([5, 5, 9, 9, 100, 1])
    out = judge((hidden, weight.T.contiguous().T, bias), y, rows=rows)
    assert out["logp"].isnan().tolist() == [False, False, False, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_equals_the_row_in_any_batch(columns: int, dtype: torch.dtype) -> None:
    """Where the compiled product runs; PyTorch's library makes no such promise."""
    hidden, weight, bias = inputs_of(37, 24, 300, dtype)
    if _gemm.kind(hidden) in ("torch", "widened"):
        pytest.skip("the product is PyTorch's here")
    y, order = torch.randint(0, 300, (37,)), torch.randperm(37)
    whole = stats((hidden, weight, bias), y, want=STATS)
    for rows in (torch.tensor([5]), torch.tensor([30, 2]), order):
        part = stats((hidden, weight, bias), y[rows], rows=rows, want=STATS)
        for name in STATS:
            assert_exact(part[name], whole[name][rows], name=f"{name} of rows {rows.tolist()}")


@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    count, size, vocab = draw(st.integers(0, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 300))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    inputs = inputs_of(count, size, vocab, draw(st.sampled_from(DTYPES)), draw(st.booleans()))
    how = LogitMap(
        temperature=draw(st.sampled_from([1.0, 0.3])),
        softcap=draw(st.sampled_from([None, 5.0])),
        valid_vocab=draw(st.none() | st.integers(1, vocab)),
    )
    want = tuple(draw(st.sets(st.sampled_from(STATS), min_size=1)))
    before = [x.clone() for x in inputs if x is not None]
    judge(inputs, torch.randint(0, vocab, (count,)), how=how, want=want, memory=draw(st.integers(1, 10**6)))
    for x, kept in zip([x for x in inputs if x is not None], before, strict=True):
        assert_exact(x, kept, name="input unwritten")


def gradients(run: object, inputs: Inputs, y: Tensor, up: dict[str, Tensor], **kw: object) -> list[Tensor]:
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = run(leaves, y, want=tuple(up), **kw)
    kept = [
        out[name][~out[name].isnan()] * g[~out[name].isnan()].to(out[name].dtype) for name, g in up.items()
    ]
    return list(torch.autograd.grad(sum(v.sum() for v in kept), [x for x in leaves if x is not None]))


def plain_reference(inputs: Inputs, y: Tensor, **kw: object) -> dict[str, Tensor]:
    return reference.linear_token_stats(inputs[0], inputs[1], y, bias=inputs[2], **kw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [*((n,) for n in DIFFERENTIABLE), DIFFERENTIABLE])
@pytest.mark.parametrize("how", MAPS)
def test_gradients(dtype: torch.dtype, names: tuple[str, ...], how: LogitMap) -> None:
    """Several blocks of columns; the peer is autograd in the dtype of the inputs with fp32 logits."""
    inputs = inputs_of(9, 20, 200, dtype)
    rows = torch.tensor([0, 8, 3, 3, 3, 5, 77, 6])
    y = torch.tensor([5, 100, 4, IGNORED, 189, 400, 3, 3])
    up = {name: torch.randn(8) for name in names}
    wide = tuple(None if x is None else x.double() for x in inputs)
    oracle = gradients(plain_reference, wide, y, up, rows=rows, how=how)
    actual = gradients(stats, inputs, y, up, rows=rows, how=how, memory=200 * 64)
    # dz is rounded to the dtype of the operands before the products, in the peer's gradient after them
    worst = [want.to(dtype) + torch.finfo(dtype).eps / 2 * want.abs().max().to(dtype) for want in oracle]
    for k in range(3):
        order = torch.arange(20) if k == 0 else torch.randperm(20)
        moved = (inputs[0][:, order], inputs[1][:, order], inputs[2])
        back = torch.argsort(order)
        for n, peer in enumerate(gradients(plain_reference, moved, y, up, rows=rows, how=how)):
            peer = peer[:, back] if n < 2 else peer
            further = (peer - oracle[n]).abs() > (worst[n] - oracle[n]).abs()
            worst[n] = torch.where(further, peer, worst[n])
    for name, got, want, by in zip(("hidden", "weight", "bias"), actual, oracle, worst, strict=True):
        assert got.dtype == dtype
        assert_within_error_budget(got, want, by, name=f"gradient of {name}")


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_each_input_alone(needed: tuple[int, ...]) -> None:
    inputs, y = inputs_of(5, 8, 90, torch.float32), torch.tensor([1, 2, 3, 4, 89])
    whole = gradients(stats, inputs, y, {"logp": torch.ones(5)})
    leaves = [x.clone().requires_grad_(k in needed) for k, x in enumerate(inputs) if x is not None]
    stats((leaves[0], leaves[1], leaves[2]), y)["logp"].sum().backward()
    for k, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (k in needed)
        if leaf.grad is not None:
            assert_exact(leaf.grad, whole[k], name=f"input {k}")


def test_a_tied_weight_adds_both_of_its_uses() -> None:
    weight = torch.randn(50, 16, requires_grad=True)
    ids, y = torch.tensor([3, 3, 9]), torch.tensor([1, 2, 49])
    out = stats((weight[ids] * 2, weight, None), y)["logp"].sum()
    (got,) = torch.autograd.grad(out, weight)
    twin = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(plain_reference((twin[ids] * 2, twin, None), y)["logp"].sum(), twin)
    (peer,) = torch.autograd.grad(plain_reference((weight[ids] * 2, weight, None), y)["logp"].sum(), weight)
    assert_within_error_budget(got, want, peer + torch.finfo(torch.float32).eps / 2, name="tied weight")


def test_finite_differences() -> None:
    inputs, y = inputs_of(3, 4, 11, torch.float64), torch.tensor([0, 9, 4])
    how = LogitMap(softcap=2.0, valid_vocab=10)
    for name in DIFFERENTIABLE:
        leaves = [x.clone().requires_grad_() for x in inputs if x is not None]

        def run(h: Tensor, w: Tensor, b: Tensor, name: str = name) -> Tensor:
            return stats((h, w, b), y, how=how, want=(name,), memory=1)[name]

        torch.autograd.gradcheck(run, leaves)


def peak_of(run: Callable[[], object]) -> int:
    """Bytes that PyTorch had allocated at one time at most, beyond those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    peak = now = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_scratch_is_bounded() -> None:
    """Beside inputs and results, `memory` and what the statistics of one block take; far below the logits."""
    hidden, weight, _ = inputs_of(64, 32, 40_000, torch.float32, bias=False)
    y, limit, logits = torch.randint(0, 40_000, (64,)), 1 << 20, 64 * 40_000 * 4
    forward = peak_of(lambda: stats((hidden, weight, None), y, memory=limit))
    assert 0 < forward < 2 * limit
    weight.requires_grad_()
    loss = stats((hidden, weight, None), y, memory=limit)["logp"].sum()
    gradient = weight.numel() * 4
    assert gradient <= peak_of(lambda: torch.autograd.grad(loss, weight)) < gradient + 2 * limit
    assert 2 * limit < logits / 4


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_is_allocated_once(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: torch.dtype
) -> None:
    """Allocations summed up, not only their peak: what each block allocates anew leaves holes in the heap."""
    if not compiled:
        monkeypatch.setattr(_compiled, "library", lambda _: None)
    hidden, weight, _ = inputs_of(64, 32, 80_000, dtype, bias=False)
    y, block = torch.randint(0, 80_000, (64,)), 64 * linear_native.COLUMNS * 4
    for want in (("logp",), ("logp", "entropy", "rank")):
        with torch.profiler.profile(profile_memory=True) as profile:
            stats((hidden, weight, None), y, want=want)
        sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        large = [size for size in sizes if size > block / 16]
        assert large and len(large) <= 6
        assert sum(large) <= 8 * block


# torch.library.opcheck reads .grad of a non-leaf tensor itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0, 5])])
def test_opcheck(rows: Tensor | None) -> None:
    count = 6 if rows is None else 3
    hidden, weight, bias = (x.requires_grad_() for x in inputs_of(6, 8, 40, torch.float32) if x is not None)
    options = (0.7, 1.0, None, 30, IGNORED, "logp,entropy,top,max_logp,count", 20, 1 << 20, "native")
    arguments = (hidden, weight, bias, torch.arange(count), rows, *options)
    torch.library.opcheck(torch.ops.raise_kernels.linear_token_stats, arguments)
    made = torch.ops.raise_kernels.linear_token_stats(*arguments).detach()
    inputs = (hidden.detach(), weight.detach(), bias.detach(), *arguments[3:5])
    back = (torch.randn(5, count), made, *inputs, [True, False, True], *options)
    torch.library.opcheck(torch.ops.raise_kernels.linear_token_stats_backward, back)


def test_compiled_without_a_graph_break() -> None:
    torch._dynamo.reset()
    hidden, weight, bias = inputs_of(6, 8, 40, torch.float32)
    y = torch.arange(6)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return stats((h * 2, w, bias), y, want=("logp", "rank"))["logp"].sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        results.append(torch.autograd.grad(run(*leaves), leaves))
    for a, b in zip(*results, strict=True):
        assert_exact(a, b, name="compiled gradient")
