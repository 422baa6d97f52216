"""Several candidates for each row, from logits and from hidden states, against one token at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import raise_core as rc
from raise_kernels import candidates as operator
from raise_kernels import reference, token_stats, token_stats_backward
from raise_kernels._checks import PLAIN, LogitMap
from tests.budget import assert_exact, assert_within_error_budget
from tests.kernels.cases import DTYPES, IGNORED, folded, rows_of_logits

INF, NAN = float("inf"), float("nan")
HALF_ULP = torch.finfo(torch.float32).eps / 2
fast_impl = pytest.mark.parametrize("impl", ["native", "triton"])
every_impl = pytest.mark.parametrize("impl", ["reference", "native", "triton"])


def options(how: LogitMap) -> dict[str, object]:
    names = ("temperature", "logit_scale", "softcap", "valid_vocab", "ignore_index")
    return {name: getattr(how, name) for name in names}


def judge(
    impl: str, logits: Tensor, ids: Tensor, rows: Tensor | None = None, how: LogitMap = PLAIN
) -> tuple[Tensor, Tensor]:
    """Values and gradient within their budgets of float64."""
    up = torch.randn(ids.shape)

    def run(x: Tensor, way: LogitMap, impl: str) -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone().requires_grad_()
        out = rc.candidate_logp(ids, logits=leaf, rows=rows, impl=impl, **options(way))
        return out.detach(), torch.autograd.grad(out, leaf, up.to(out.dtype))[0]

    oracle, wanted = run(logits.double(), how, "reference")
    got, grad = run(logits, how, impl)
    columns = how.columns(logits.shape[-1])
    floor = HALF_ULP * (1 + float(up.abs().sum(-1).max())) * how.factors[0] * how.factors[1]
    peer, near = (oracle + HALF_ULP).float(), (wanted + floor).to(logits.dtype)
    for k in range(3):
        value, slope = run(logits[..., :columns].float(), folded(how, k), "reference")
        whole = torch.zeros_like(wanted)
        whole[..., :columns] = slope.double()
        peer = torch.where((value - oracle).abs() > (peer - oracle).abs(), value, peer)
        near = torch.where((whole - wanted).abs() > (near - wanted).abs(), whole.to(near.dtype), near)
    assert_within_error_budget(got, oracle, peer, name="log-probabilities")
    assert_within_error_budget(grad, wanted, near, name="gradient")
    return got, grad


@fast_impl
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(impl: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(2, 3, 2500) * 5).to(dtype)
    ids = torch.randint(0, 2500, (2, 3, 5))
    logits.view(6, -1)[0, ids[0, 0, 1]] += 40
    got, _ = judge(impl, logits, ids)
    assert (got <= 0).all()


@fast_impl
@given(case=rows_of_logits(largest=100), count=st.integers(1, 3))
def test_random_rows(impl: str, case: tuple[Tensor, Tensor, LogitMap], count: int) -> None:
    logits, y, how = case
    ids = torch.randint(-1, logits.shape[-1] + 1, (*y.shape, count))
    ids[..., 0] = y
    before = logits.clone(), ids.clone()
    judge(impl, logits, ids, how=how)
    assert_exact(logits.clone(), before[0], name="logits unwritten")
    assert_exact(ids, before[1], name="candidates unwritten")


@fast_impl
def test_the_same_bits_as_one_token_at_a_time(impl: str) -> None:
    logits, ids = torch.randn(4, 700) * 4, torch.randint(0, 700, (4, 3))
    got = rc.candidate_logp(ids, logits=logits, impl=impl)
    for k in range(3):
        one = rc.token_stats(logits, ids[:, k], want=("logp",), impl=impl).logp
        assert one is not None
        if impl == "triton":
            assert_exact(got[:, k], one, name=f"candidate {k}")
        oracle = rc.token_stats(logits.double(), ids[:, k], impl="reference").logp
        assert oracle is not None
        assert_within_error_budget(got[:, k], oracle, one + HALF_ULP, name=f"candidate {k}")


@fast_impl
def test_rows_may_repeat_and_candidates_too(impl: str) -> None:
    logits = torch.randn(3, 4, 70)
    rows = torch.tensor([5, 2, 5, 11, 99, -1], dtype=torch.int32)
    ids = torch.tensor([[1, 1, 3], [2, 4, IGNORED], [1, 5, 6], [IGNORED] * 3, [1, 2, IGNORED], [1, 2, 3]])
    got, grad = judge(impl, logits, ids, rows)
    assert got[3].tolist() == [0, 0, 0] and got[1, 2] == 0 and got[4, 2] == 0
    assert got[4, :2].isnan().all() and got[5].isnan().all()
    assert (grad.view(12, 70) != 0).any(1).nonzero()[:, 0].tolist() == [2, 5]


@every_impl
def test_rows_and_candidates_without_a_result(impl: str) -> None:
    logits = torch.randn(5, 50)
    logits[0], logits[1, 3], logits[2, 3], logits[3, 7] = -INF, NAN, INF, -INF
    ids = torch.tensor([[1, 2], [1, 2], [1, 2], [7, 1], [50, 1]])
    leaf = logits.clone().requires_grad_()
    got = rc.candidate_logp(ids, logits=leaf, impl=impl)
    assert got[:3].isnan().all()
    assert got[3, 0] == -INF and got[3, 1].isfinite()
    assert got[4, 0].isnan() and got[4, 1].isfinite()
    (grad,) = torch.autograd.grad(got, leaf, torch.ones_like(got))
    assert (grad[:3] == 0).all() and grad[3, 7] == 0 and not grad.isnan().any()


@fast_impl
def test_ignore_index_may_be_a_token(impl: str) -> None:
    logits, ids = torch.randn(2, 9), torch.tensor([[0, 3], [0, 0]])
    got, _ = judge(impl, logits, ids, how=LogitMap(ignore_index=0))
    assert (got[:, 0] == 0).all() and got[1, 1] == 0 and got[0, 1] < 0


@fast_impl
def test_a_row_alone_equals_the_row_in_any_batch(impl: str) -> None:
    logits, ids, up = torch.randn(5, 3000), torch.randint(0, 3000, (5, 4)), torch.randn(5, 4)

    def run(k: slice) -> tuple[Tensor, Tensor]:
        leaf = logits[k].clone().requires_grad_()
        out = rc.candidate_logp(ids[k], logits=leaf, impl=impl)
        return out.detach(), torch.autograd.grad(out, leaf, up[k])[0]

    whole, alone = run(slice(None)), run(slice(3, 4))
    assert_exact(alone[0], whole[0][3:4], name="value")
    assert_exact(alone[1], whole[1][3:4], name="gradient")


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("how", [PLAIN, LogitMap(temperature=0.5, softcap=2.0, valid_vocab=9)])
def test_finite_differences(impl: str, how: LogitMap) -> None:
    ids, rows = torch.tensor([[0, 8], [3, 3], [IGNORED, 1]]), torch.tensor([0, 2, 0])
    given = {"rows": rows, "impl": impl, **options(how)}
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: rc.candidate_logp(ids, logits=x, **given), logits)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda h, w, b: rc.candidate_logp(ids, hidden=h, weight=w, bias=b, **given), (hidden, weight, bias)
    )


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@every_impl
@pytest.mark.parametrize("biased", [False, True])
def test_from_hidden_states(impl: str, biased: bool) -> None:
    hidden, weight = torch.randn(2, 3, 16), torch.randn(90, 16)
    bias = torch.randn(90) if biased else None
    if impl != "reference":  # whose matrix product spreads a NaN over the gradient of the weight
        hidden[0, 1, 0] = NAN
    ids = torch.randint(0, 60, (5, 3))
    ids[0], ids[2, 1], ids[3, 0] = IGNORED, IGNORED, 64
    rows = torch.tensor([0, 1, 2, 5, 6])
    how = LogitMap(temperature=0.7, softcap=9.0, valid_vocab=64)
    up = torch.randn(5, 3)

    def run(impl: str, dtype: torch.dtype, *, stored: bool) -> list[Tensor]:
        """Values and gradients; from stored logits without the row that is NaN, whose gradient is 0."""
        given = torch.where(hidden.isnan().any(-1, keepdim=True), 0.0, hidden) if stored else hidden
        leaves = [x.detach().to(dtype).requires_grad_() for x in (given, weight, bias) if x is not None]
        h, w, b = (*leaves, None)[:3]
        source = {"hidden": h, "weight": w, "bias": b}
        if stored:
            source = {"logits": h @ w.T if b is None else h @ w.T + b}
        out = rc.candidate_logp(ids, rows=rows, impl=impl, **source, **options(how))
        lost = (hidden.isnan().any() & (rows == 1))[:, None] & stored
        grads = torch.autograd.grad(out, leaves, up.masked_fill(lost, 0.0).to(out.dtype))
        return [torch.where(lost, NAN, out.detach()), *grads]

    oracle, peer = (run("reference", dtype, stored=True) for dtype in (torch.float64, torch.float32))
    floor = HALF_ULP * (1 + float(up.abs().sum()))
    for k, (a, b, c) in enumerate(zip(run(impl, torch.float32, stored=False), oracle, peer, strict=True)):
        near = torch.where((c - b).abs() > floor, c, (b + floor).float())
        assert_within_error_budget(a, b, near, name=f"result {k}")


# torch.library.opcheck reads .grad of a non-leaf tensor itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@fast_impl
def test_opcheck(impl: str) -> None:
    logits = torch.randn(6, 40, requires_grad=True)
    arguments = (
        logits,
        torch.randint(0, 30, (3, 2)),
        torch.tensor([2, 0, 5]),
        0.7,
        1.0,
        None,
        30,
        -100,
        impl,
    )
    torch.library.opcheck(torch.ops.raise_kernels.candidate_logp, arguments)
    _, norm = torch.ops.raise_kernels.candidate_logp(*arguments)
    back = (torch.randn(3, 2), norm.detach(), logits.detach(), *arguments[1:])
    torch.library.opcheck(torch.ops.raise_kernels.candidate_logp_backward, back)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("source", ["logits", "hidden"])
def test_compiled_without_a_graph_break(impl: str, source: str) -> None:
    def loss(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        given = {"logits": x @ weight.T} if source == "logits" else {"hidden": x, "weight": weight}
        return torch.log_softmax(rc.candidate_logp(ids, impl=impl, **given), -1)[..., 0].sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, vocab in ((2, 70), (4, 50)):
        x, weight, ids = torch.randn(rows, 3, 8), torch.randn(vocab, 8), torch.randint(0, vocab, (rows, 3, 4))
        results = []
        for function in (loss, compiled):
            leaf = x.clone().requires_grad_()
            value = function(leaf, weight, ids)
            value.backward()
            results.append((value.detach(), leaf.grad))
        assert_exact(results[1][0], results[0][0], name="value")
        assert_exact(results[1][1], results[0][1], name="gradient")


def test_triton_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    kernel = type(token_stats._stats_kernel)
    monkeypatch.setattr(kernel, "run", lambda self, *_, **__: seen.append(self.fn.__name__))
    for module in (token_stats, token_stats_backward):
        monkeypatch.setattr(module, "alignment", lambda *_: 1)  # a fake tensor has no address
    with FakeTensorMode():
        logits, ids = torch.randn(4, 6, 50), torch.zeros(5, 3, dtype=torch.long)
        rows = torch.zeros(5, dtype=torch.long)
        rest = (1.0, 1.0, None, None, -100, "triton")
        logp, norm = operator._forward._init_fn(logits, ids, rows, *rest)
        grad = operator._backward._init_fn(logp, norm, logits, ids, rows, *rest)
    assert seen == ["_stats_kernel", "_merge_kernel", "_grad_kernel"]
    assert logp.shape == (5, 3) and grad.shape == logits.shape


@every_impl
def test_no_rows(impl: str) -> None:
    got = rc.candidate_logp(torch.zeros(0, 3, dtype=torch.long), logits=torch.randn(0, 9), impl=impl)
    assert got.shape == (0, 3)
    none = torch.tensor([[0, IGNORED]])
    if impl != "reference":
        got = rc.candidate_logp(none, logits=torch.randn(0, 9), rows=torch.tensor([0]), impl=impl)
        assert got[0, 0].isnan() and got[0, 1] == 0


def test_the_meaning_is_that_of_token_stats() -> None:
    logits, ids = torch.randn(2, 9, dtype=torch.float64), torch.tensor([[1, 2, 3], [4, 5, 6]])
    want = torch.log_softmax(logits, -1).gather(1, ids)
    got = reference.candidate_logp(logits, ids)
    assert_within_error_budget(got, want, want.float().double(), name="by hand")


@every_impl
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"candidates": torch.zeros(4, 2)}, TypeError, "candidates is torch.float32"),
        ({"candidates": torch.zeros(4, 0, dtype=torch.long)}, ValueError, "K at least 1"),
        ({"candidates": torch.zeros(3, 2, dtype=torch.long)}, ValueError, "targets has shape"),
        ({"rows": torch.zeros(3, dtype=torch.long)}, ValueError, "rows has shape"),
        ({"hidden": torch.zeros(4, 2)}, ValueError, "go together"),
        ({"hidden": torch.zeros(4, 2), "weight": torch.zeros(9, 2)}, ValueError, "either logits"),
        ({"logits": None}, ValueError, "either logits"),
        ({"bias": torch.zeros(9)}, ValueError, "bias goes with"),
        ({"temperature": -1.0}, ValueError, "temperature is -1"),
    ],
)
def test_wrong_arguments(impl: str, change: dict[str, object], error: type[Exception], match: str) -> None:
    arguments = {"candidates": torch.zeros(4, 2, dtype=torch.long), "logits": torch.zeros(4, 9)} | change
    with pytest.raises(error, match=match):
        rc.candidate_logp(arguments.pop("candidates"), impl=impl, **arguments)
