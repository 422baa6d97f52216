"""Gradients of token_stats: finite differences in fp64, and float64 autograd for every implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raise_kernels import _compiled, native
from raise_kernels._checks import DIFFERENTIABLE, PLAIN, LogitMap
from tests.budget import assert_exact
from tests.kernels.cases import DTYPES, IGNORED, IMPLS, gradient, judge_gradient

fast_impl = pytest.mark.parametrize("impl", ["native", "triton"])
INF = float("inf")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize(
    "how", [PLAIN, LogitMap(temperature=0.5, logit_scale=0.3, softcap=2.0, valid_vocab=9)]
)
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_finite_differences(impl: str, name: str, how: LogitMap) -> None:
    logits = torch.randn(4, 11, dtype=torch.float64) * 2
    logits[0, 2:5] = -INF
    y, rows = torch.tensor([0, 8, IGNORED, 3, 1]), torch.tensor([0, 2, 1, 2, 3])
    free = logits.isfinite()

    def run(values: Tensor) -> Tensor:
        x = logits.masked_scatter(free, values)
        return IMPLS[impl](x, y, rows=rows, how=how, want=(name,))[name]

    torch.autograd.gradcheck(run, logits[free].clone().requires_grad_())


@fast_impl
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [*((n,) for n in DIFFERENTIABLE), DIFFERENTIABLE])
def test_each_output_alone_and_together(impl: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    logits = (torch.randn(6, 2500) * 4).to(dtype)
    y = torch.randint(0, 2500, (6,))
    logits[0, y[0]] += 40
    judge_gradient(impl, logits, y, {n: torch.randn(6) for n in names})


@pytest.mark.parametrize("engine", ["floor", "compiled", "triton"])
@pytest.mark.parametrize("cap", [0.05, 0.5, 5.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_softcap_that_saturates(
    engine: str, cap: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slope 1 - tanh^2 cancels from a few caps on, and is 0 in fp32 from nine."""
    if engine == "floor":
        monkeypatch.setenv(_compiled.SWITCH, "0")
    how = LogitMap(softcap=cap, temperature=temperature)
    y = torch.randint(0, 300, (6,))
    for caps in (2.0, 4.0, 6.0, 9.0):
        logits = (0.3 * torch.randn(6, 300) + caps) * cap
        for names in (("logp",), DIFFERENTIABLE):
            up = {name: torch.randn(6) for name in names}
            judge_gradient("triton" if engine == "triton" else "native", logits, y, up, how)


@fast_impl
def test_repeated_rows_add_up_and_others_are_zero(impl: str) -> None:
    logits = torch.randn(3, 4, 70)
    rows = torch.tensor([5, 2, 5, 11, 5, 99, -1])
    y = torch.tensor([1, 2, 3, 4, IGNORED, 0, 0])
    grad = judge_gradient(impl, logits, y, {"logp": torch.randn(7), "entropy": torch.randn(7)}, rows=rows)
    touched = (grad.view(12, 70) != 0).any(1)
    assert touched.nonzero()[:, 0].tolist() == [2, 5, 11]


@pytest.mark.parametrize("impl", list(IMPLS))
def test_rows_without_a_result_have_no_gradient(impl: str) -> None:
    logits = torch.randn(6, 50)
    logits[0], logits[1, 3], logits[2, 3] = -INF, float("nan"), INF
    y = torch.tensor([1, 1, 1, 50, IGNORED, 1])
    grad = gradient(IMPLS[impl], logits, y, {n: torch.ones(6) for n in DIFFERENTIABLE})
    assert (grad[:5] == 0).all()
    assert (grad[5] != 0).any()


@fast_impl
def test_masked_columns_have_no_gradient(impl: str) -> None:
    logits = torch.randn(4, 60)
    logits[:, ::3] = -INF
    y = torch.tensor([1, 2, 4, 3])
    how = LogitMap(valid_vocab=50, softcap=3.0)
    grad = judge_gradient(impl, logits, y, {n: torch.randn(4) for n in DIFFERENTIABLE}, how)
    assert (grad[:, ::3] == 0).all() and (grad[:, 50:] == 0).all()


@fast_impl
def test_upstream_of_stride_zero(impl: str) -> None:
    logits, y = torch.randn(2, 3, 40), torch.randint(0, 40, (2, 3))
    leaf = logits.clone().requires_grad_()
    IMPLS[impl](leaf, y)["logp"].sum().backward()
    expected = gradient(IMPLS[impl], logits, y, {"logp": torch.ones(2, 3)})
    assert leaf.grad is not None
    assert_exact(leaf.grad, expected, name="expanded upstream")


@fast_impl
def test_gradient_of_a_row_alone_equals_the_row_in_any_batch(impl: str) -> None:
    logits, y = torch.randn(5, 3000), torch.randint(0, 3000, (5,))
    up = {n: torch.randn(5) for n in DIFFERENTIABLE}
    whole = gradient(IMPLS[impl], logits, y, up)
    alone = gradient(IMPLS[impl], logits[3:4], y[3:4], {n: u[3:4] for n, u in up.items()})
    assert_exact(alone, whole[3:4], name="row 3")


@pytest.mark.parametrize(("count", "vocab"), [(259, 500), (7, native.CALL + 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_rows_in_any_order_has_the_same_bits(count: int, vocab: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(count, vocab) * 3).to(dtype)
    y = torch.randint(0, vocab, (count,))
    up = {"logp": torch.randn(count), "entropy": torch.randn(count)}
    order = torch.randperm(count)
    some = order[: count // 2]
    whole = gradient(native.token_stats, logits, y, up)
    for chosen in (order, some):
        moved = {name: value[chosen] for name, value in up.items()}
        part = gradient(native.token_stats, logits, y[chosen], moved, rows=chosen)
        assert_exact(part[chosen], whole[chosen], name="named rows")
    unnamed = torch.ones(count, dtype=torch.bool).index_fill(0, some, False)
    assert (part[unnamed] == 0).all()


@pytest.mark.parametrize("impl", list(IMPLS))
def test_other_statistics_carry_no_gradient(impl: str) -> None:
    logits = torch.randn(2, 9, requires_grad=True)
    out = IMPLS[impl](logits, torch.tensor([1, 2]), want=("logp", "max_logp", "rank", "varentropy"))
    assert [v.requires_grad for v in out.values()] == [True, False, False, False]


def test_a_second_derivative_is_refused() -> None:
    logits = torch.randn(2, 9, requires_grad=True)
    logp = native.token_stats(logits, torch.tensor([1, 2]))["logp"]
    (grad,) = torch.autograd.grad(logp.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@fast_impl
@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3])])
def test_logits_without_rows(impl: str, rows: Tensor | None) -> None:
    y = torch.zeros(0 if rows is None else 2, dtype=torch.long)
    grad = gradient(IMPLS[impl], torch.randn(0, 5), y, {"logp": torch.ones(len(y))}, rows=rows)
    assert grad.shape == (0, 5)
