"""inplace_gradient: the same bits in the logits' own memory, and a refusal where that would be wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from raise_kernels import native
from raise_kernels._checks import DIFFERENTIABLE, PLAIN, LogitMap
from raise_kernels._layout import block_rows
from tests.budget import assert_exact
from tests.kernels.cases import IGNORED, rows_of_logits

fast_impl = pytest.mark.parametrize("impl", ["native", "triton"])
Up = dict[str, Tensor]


def both(
    logits: Tensor,
    y: Tensor,
    up: Up,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient out of place and in place, and the logits that held the latter."""
    made = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1
        out = rc.token_stats(
            x, y, rows=rows, want=tuple(up), inplace_gradient=inplace, impl=impl,
            temperature=how.temperature, logit_scale=how.logit_scale, softcap=how.softcap,
            valid_vocab=how.valid_vocab,
        )  # fmt: skip
        values = [getattr(out, name) for name in up]
        before = x.detach().clone()
        (grad,) = torch.autograd.grad(values, x, list(up.values()))
        if not inplace:
            assert_exact(x.detach(), before, name="logits unwritten")
        made.append(grad)
    return made[0], made[1], x


@fast_impl
@given(data=st.data(), case=rows_of_logits(largest=200))
def test_the_same_bits_in_the_memory_of_the_logits(
    impl: str, data: st.DataObject, case: tuple[Tensor, Tensor, LogitMap]
) -> None:
    logits, y, how = case
    logits = logits.contiguous()
    names = data.draw(st.sets(st.sampled_from(DIFFERENTIABLE), min_size=1))
    rows = None
    if data.draw(st.booleans()):
        y = y.reshape(-1)
        rows = torch.randint(-1, len(y) + 1, y.shape)
    plain, inplace, x = both(logits, y, {n: torch.randn(y.shape) for n in names}, rows, how, impl)
    assert_exact(inplace, plain, name="gradient")
    assert inplace.data_ptr() == x.data_ptr()
    assert inplace.dtype == logits.dtype and inplace.shape == logits.shape


@pytest.mark.parametrize("named", [False, True])
def test_more_rows_than_the_cpu_takes_at_a_time(named: bool) -> None:
    vocab = 9
    count = 2 * native.IN_PLACE * block_rows(vocab) + 5
    logits, rows = torch.randn(count, vocab), torch.randint(0, count, (count,)) if named else None
    y = torch.randint(0, vocab, (count,))
    plain, inplace, _ = both(logits, y, {"logp": torch.randn(count), "entropy": torch.randn(count)}, rows)
    assert_exact(inplace, plain, name="gradient")


@fast_impl
def test_it_flows_on_through_the_model(impl: str) -> None:
    hidden, head = torch.randn(5, 4), torch.randn(30, 4, requires_grad=True)
    y = torch.tensor([1, 2, 3, 4, IGNORED])
    grads = []
    for inplace in (False, True):
        logits = torch.nn.functional.linear(hidden, head)
        out = rc.token_stats(logits.view(1, 5, 30), y[None], inplace_gradient=inplace, impl=impl)
        assert out.logp is not None
        grads.append(torch.autograd.grad(out.logp.sum(), head)[0])
    assert_exact(grads[1], grads[0], name="gradient of the head")


@fast_impl
def test_without_a_gradient_the_flag_changes_nothing(impl: str) -> None:
    logits, y = torch.randn(3, 20), torch.tensor([1, 2, 3])
    before = logits.clone()
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            rc.token_stats(logits, y, inplace_gradient=True, impl=impl)
    with torch.no_grad():
        rc.token_stats(logits.clone().requires_grad_(), y, inplace_gradient=True, impl=impl)
    assert_exact(logits, before, name="logits")


@fast_impl
def test_a_second_backward_pass_and_changed_logits_are_refused(impl: str) -> None:
    leaf, y = torch.randn(3, 20, requires_grad=True), torch.tensor([1, 2, 3])

    def logp(x: Tensor) -> Tensor:
        out = rc.token_stats(x, y, inplace_gradient=True, impl=impl).logp
        assert out is not None
        return out.sum()

    loss = logp(leaf * 1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="over the logits already"):
        loss.backward()
    x = leaf * 1
    loss = logp(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="written to after it read them"):
        loss.backward()
    x = leaf * 1
    with pytest.raises(RuntimeError, match="written to after it read them"):
        (logp(x) + logp(x)).backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logp(leaf * 1), leaf, create_graph=True)


def test_whatever_else_saved_the_logits_is_told() -> None:
    leaf, y = torch.randn(3, 20, requires_grad=True), torch.tensor([1, 2, 3])
    x = leaf.exp()  # saves its result
    out = rc.token_stats(x, y, inplace_gradient=True).logp
    assert out is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@fast_impl
def test_logits_that_cannot_hold_their_gradient(impl: str) -> None:
    leaf, y = torch.randn(4, 20, requires_grad=True), torch.tensor([1, 2, 3, 4])
    for x in (leaf, leaf.view(2, 2, 20)):
        with pytest.raises(ValueError, match="leaf tensor"):
            rc.token_stats(x, y.view(x.shape[:-1]), inplace_gradient=True, impl=impl)
    with pytest.raises(ValueError, match=r"contiguous logits.*rows="):
        rc.token_stats((leaf * 1)[:, 1:], y, inplace_gradient=True, impl=impl)
    with pytest.raises(Exception, match="cannot be compiled"):
        compiled = torch.compile(
            lambda x: rc.token_stats(x * 1, y, inplace_gradient=True).logp, fullgraph=True, backend="eager"
        )
        compiled(leaf)
