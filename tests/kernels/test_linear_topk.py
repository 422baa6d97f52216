"""topk_logp_mean from hidden states in Triton: tiles of rows within memory, and the launches they take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from raise_kernels import token_topk
from raise_kernels._checks import PLAIN, LogitMap
from tests.budget import assert_within_error_budget
from tests.kernels.cases import DTYPES, IGNORED
from tests.kernels.linear_cases import Case, stats_of

NAN = float("nan")
NAME = "topk_logp_mean"


def best(case: Case, **options: object) -> Tensor:
    want = options.pop("want", (NAME,))
    out = rc.linear_token_stats(
        case.hidden, case.weight, case.y, want=want, impl="triton", **case.options(), **options
    )
    assert out.topk_logp_mean is not None
    return out.topk_logp_mean


def inputs_of(count: int, depth: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.randn(count, depth), torch.randn(vocab, depth), torch.randn(vocab)
    hidden, weight, bias = (x.to(dtype) for x in made)
    return hidden, weight, bias


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("dtype", DTYPES)
@given(memory=st.sampled_from([1, 4 * 200 * 2, 1 << 20]), softcap=st.sampled_from([None, 5.0]))
def test_within_budget(dtype: torch.dtype, memory: int, softcap: float | None) -> None:
    """Tiles of one row, of two, of all; a NaN, an ignored row, and rows and targets outside."""
    hidden, weight, bias = inputs_of(7, 9, 230, dtype)
    hidden[3] = NAN
    rows, y = torch.tensor([6, 0, 3, 2, 0, 7]), torch.tensor([5, IGNORED, 1, 200, 199, 4])
    case = Case(hidden, weight, bias, y, rows, LogitMap(temperature=0.7, softcap=softcap, valid_vocab=200))
    got = best(case, memory=memory, want=("logp", NAME))
    oracle, peer, _ = stats_of(case, ("logp", NAME))
    assert_within_error_budget(got, oracle[NAME], peer[NAME], name=NAME)
    assert got.isnan().tolist() == [False, False, True, True, False, True] and got[1] == 0


@pytest.mark.parametrize(("topk", "vocab"), [(1, 90), (400, 5000)])
def test_any_k(topk: int, vocab: int) -> None:
    hidden, weight, _ = inputs_of(2, 8, vocab, torch.float32)
    case = Case(hidden, weight, None, torch.tensor([0, vocab - 1]), None, PLAIN)
    got = best(case, topk=topk)
    want = torch.log_softmax(hidden.double() @ weight.double().T, -1).topk(topk, -1).values.mean(-1)
    near = torch.log_softmax(hidden @ weight.T, -1).topk(topk, -1).values.mean(-1)
    assert_within_error_budget(got, want, near + torch.finfo(torch.float32).eps / 2, name=NAME)


@pytest.mark.parametrize(("memory", "tiles"), [(1, 3), (2 * 50 * 4, 2), (1 << 20, 1)])
def test_launches(monkeypatch: pytest.MonkeyPatch, memory: int, tiles: int) -> None:
    """Two for the normaliser, two for each tile of rows whose logits fit."""
    seen: list[str] = []
    kernel = type(token_topk._select_kernel)
    run = kernel.run

    def counted(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kernel, "run", counted)
    hidden, weight, _ = inputs_of(3, 8, 50, torch.float32)
    best(Case(hidden, weight, None, torch.tensor([1, 2, 3]), None, PLAIN), memory=memory)
    assert seen == ["_linear_kernel", "_merge_kernel", *["_select_kernel", "_finish_kernel"] * tiles]


def test_no_tokens() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert best(Case(torch.randn(0, 8), torch.randn(50, 8), None, none, None, PLAIN)).shape == (0,)
    got = best(Case(torch.randn(0, 8), torch.randn(50, 8), None, none + 1, none, PLAIN))
    assert got.shape == (0,)
    lost = best(
        Case(torch.randn(0, 8), torch.randn(50, 8), None, torch.tensor([1]), torch.tensor([0]), PLAIN)
    )
    assert lost.isnan().all()


def test_more_than_a_program_keeps_is_refused() -> None:
    hidden, weight, _ = inputs_of(1, 4, 9000, torch.float32)
    case = Case(hidden, weight, None, torch.tensor([0]), None, PLAIN)
    with pytest.raises(ValueError, match=r"topk is 3000; with 9000 columns Triton takes at most 2730"):
        best(case, topk=3000)
