"""topk_logp_mean in Triton: exact selection, ties, masks and batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raise_kernels import token_stats, token_topk
from raise_kernels._checks import PLAIN, LogitMap
from tests.budget import assert_exact
from tests.kernels.cases import DTYPES, IGNORED, judge, rows_of_logits

INF, NAN = float("inf"), float("nan")
NAME = ("topk_logp_mean",)


def best(logits: Tensor, y: Tensor, **kw: object) -> Tensor:
    return token_stats.token_stats(logits, y, want=NAME, **kw)["topk_logp_mean"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 19, 20, 21, 4096, 4097, 20001])
def test_within_budget(dtype: torch.dtype, vocab: int) -> None:
    logits = (torch.randn(2, vocab) * 5).to(dtype)
    judge("triton", logits, torch.randint(0, vocab, (2,)), want=(*NAME, "logp", "rank"))


@pytest.mark.parametrize("topk", [1, 64, 400])
def test_any_k(topk: int) -> None:
    logits = torch.randn(2, 9000).half()
    judge("triton", logits, torch.tensor([0, 8999]), want=NAME, topk=topk)


@given(case=rows_of_logits(largest=100), topk=st.sampled_from([1, 3, 20]))
def test_random_rows(case: tuple[Tensor, Tensor, LogitMap], topk: int) -> None:
    logits, y, how = case
    before = logits.clone()
    judge("triton", logits, y, how=how, want=NAME, topk=topk)
    assert_exact(logits.clone(), before, name="logits unwritten")


@given(data=st.data())
def test_the_integers_are_ordered_like_the_numbers(data: st.DataObject) -> None:
    """The k-th of the kernels' integers is the k-th number, for the bits of every dtype and both signs."""
    dtype = data.draw(st.sampled_from(DTYPES))
    width = {2: torch.int16, 4: torch.int32}[torch.empty(0, dtype=dtype).element_size()]
    bits = torch.iinfo(width)
    drawn = data.draw(st.lists(st.integers(bits.min, bits.max), min_size=1, max_size=30))
    x = torch.tensor(drawn, dtype=width).view(dtype)
    # The interpreter widens subnormal bf16 numbers to others.
    x = torch.where((x.abs() > 1e-37) & (x.abs() < 1e4), x, -INF)
    x[0] = data.draw(st.sampled_from([0.0, -0.0, 1.0, -1.0]))
    k = data.draw(st.integers(1, len(x)))
    kept = torch.empty(1, 1, k)
    zero = torch.zeros(1, dtype=torch.long)
    token_topk._select_kernel[(1,)](
        x, zero, zero, kept, 1, len(x), 1, 1, 0, 0, 0, 1, 1, IGNORED, k,
        UNIT=True, ALIGN=1, BITS=token_topk.BITS[dtype], BLOCK=64,
    )  # fmt: skip
    assert kept[0, 0].sort(descending=True).values.tolist() == x.float().topk(k).values.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_masks_and_fewer_columns_than_k(dtype: torch.dtype) -> None:
    logits = torch.full((7, 8200), -INF)
    logits[0] = 1.5  # all equal
    logits[1, :30] = 2.0  # ties across the k-th
    logits[1, 30:40] = 3.0
    logits[2, 8195:] = torch.arange(5.0)  # fewer than k, in the last block
    logits[3, 77] = -4.0  # one
    logits[4, ::2] = 0.0  # +0 and -0 are equal
    logits[4, 1::2] = -0.0
    logits[5, :25] = -1e30  # a mask that is no infinity
    logits[5, 25:30] = 0.0
    y = torch.full((7,), 8199)
    judge("triton", logits.to(dtype), y, want=NAME)
    assert best(logits[6:], y[6:]).isnan().all()
    assert best(logits[3:4], y[3:4]).item() == 0


def test_rows_without_a_result() -> None:
    logits = torch.randn(8, 50)
    logits[0, 3], logits[1, 3], logits[2] = NAN, INF, -INF
    logits[5] = NAN
    y = torch.tensor([1, 1, 1, 50, -1, IGNORED, 4, 4])
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 8, 7], dtype=torch.int32)
    got = judge("triton", logits, y, rows=rows, want=NAME)["topk_logp_mean"]
    assert got.isnan().tolist() == [True, True, True, True, True, False, True, False]
    assert got[5] == 0


@pytest.mark.parametrize("how", [PLAIN, LogitMap(temperature=0.7, softcap=20.0, valid_vocab=8500)])
def test_a_row_alone_equals_the_row_in_any_batch(how: LogitMap) -> None:
    logits = (torch.randn(4, 9001) * 4).bfloat16()
    y = torch.randint(0, 8500, (4,))
    batch = best(logits, y, how=how)
    order = torch.randperm(4)
    assert_exact(best(logits[order], y[order], how=how), batch[order], name="reordered")
    assert_exact(best(logits, y[order], rows=order, how=how), batch[order], name="named")
    assert_exact(best(logits[3:], y[3:], how=how), batch[3:], name="alone")


def test_columns_and_rows_with_strides() -> None:
    logits = torch.randn(9001, 2, 3)
    y = torch.randint(0, 9001, (2, 3))
    turned = logits.movedim(0, -1)
    assert_exact(best(turned, y), best(turned.contiguous(), y), name="strided")


def test_no_rows_and_too_many_of_the_best() -> None:
    assert best(torch.randn(0, 7), torch.zeros(0, dtype=torch.long)).shape == (0,)
    y = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r'topk is 5000; .*takes at most 2048.*impl="reference"'):
        best(torch.zeros(2, 1).expand(-1, 16384), y, topk=5000)
    with pytest.raises(ValueError, match="topk is 0"):
        best(torch.zeros(2, 9), y, topk=0)
