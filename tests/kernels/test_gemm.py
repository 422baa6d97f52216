"""`_gemm.matmul` against fp64, in all its ways: two forms of the compiled kernel, and PyTorch on pieces."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from raise_kernels import _compiled, _gemm
from tests.budget import assert_exact, assert_within_error_budget

LOW = [torch.bfloat16, torch.float16]
COMPILED = ["avx512_bf16", "avx512"]
WAYS = [*COMPILED, "torch"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL | None]:
    """The library of this machine, and one compiled for a processor without the bf16 instruction."""
    whole, compiler = _compiled.library("gemm"), _compiled.find_compiler()
    if whole is None or compiler is None:
        return {"torch": None}
    level = whole.raise_gemm_level()
    less = without_bf16(compiler, tmp_path_factory.mktemp("less")) if level else None
    named = {"avx512_bf16": whole if level == 2 else None, "avx512": less, "torch": None}
    return {name: one for name, one in named.items() if one is not None or name == "torch"}


def without_bf16(compiler: list[str], folder: Path) -> ctypes.CDLL:
    for name in ("gemm.c", "threads.h"):
        shutil.copy(_compiled.SOURCES / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compiled, "SOURCES", folder)
        return _compiled.load([*compiler, "-mno-avx512bf16"], None, "gemm")


@pytest.fixture(params=WAYS)
def way(
    request: pytest.FixtureRequest, libraries: dict[str, ctypes.CDLL | None], monkeypatch: pytest.MonkeyPatch
) -> str:
    if request.param not in libraries:
        pytest.skip(f"no {request.param} on this machine")
    monkeypatch.setattr(_compiled, "library", lambda _: libraries[request.param])
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return _gemm.matmul(a, b, out=torch.full((len(a), b.shape[1]), NAN, dtype=wide))


def peer(a: Tensor, b: Tensor, start: Tensor | float = 0.0) -> Tensor:
    """fp32 sums in the order of k and against it: of each element the less exact one.

    And none is expected to be better than one rounding of the sum of magnitudes, which luck may bring.
    """
    magnitude = a.double().abs() @ b.double().abs() + abs(start)
    oracle = a.double() @ b.double() + start
    worst = (oracle + torch.finfo(torch.float32).eps / 2 * magnitude).float()
    for order in (range(a.shape[1]), reversed(range(a.shape[1]))):
        total = torch.zeros(len(a), b.shape[1]) + start
        for k in order:
            total = total + a[:, k : k + 1].float() * b[k : k + 1].float()
        worst = torch.where((total - oracle).abs() > (worst - oracle).abs(), total, worst)
    return worst


def laid_out(rows: int, columns: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Random numbers with adjacent rows, adjacent columns, neither, or one row repeated."""
    if layout == "columns":
        return laid_out(columns, rows, dtype, "rows").T
    if layout == "strided":
        return torch.randn(3 * rows, 2 * columns + 3).to(dtype)[::3, 1 : 2 * columns + 1 : 2]
    if layout == "repeated":
        return torch.randn(1, columns).to(dtype).expand(rows, columns)
    return torch.randn(rows, columns + 5).to(dtype)[:, 2 : columns + 2]


layouts = st.sampled_from(["rows", "columns", "strided", "repeated"])
sizes = st.integers(1, 70)


@given(
    m=sizes, n=sizes, k=sizes, seed=st.integers(0, 99), of_a=layouts, of_b=layouts,
    dtype=st.sampled_from([*LOW, torch.float32]), accumulate=st.booleans(), transposed=st.booleans(),
)  # fmt: skip
@pytest.mark.parametrize("name", WAYS)
def test_any_shape_and_strides(
    libraries, name, m, n, k, seed, of_a, of_b, dtype, accumulate, transposed
) -> None:
    if name not in libraries:
        pytest.skip(f"no {name} on this machine")
    torch.manual_seed(seed)
    a, b = laid_out(m, k, dtype, of_a), laid_out(k, n, dtype, of_b)
    before = torch.randn(m, n)
    around = torch.full((n + 2, m + 3) if transposed else (m + 2, n + 3), 7.0)
    out = around[1:-1, 1:-2].T if transposed else around[1:-1, 1:-2]
    out.copy_(before if accumulate else torch.full((m, n), NAN))
    kept = a.clone(), b.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compiled, "library", lambda _: libraries[name])
        assert _gemm.matmul(a, b, out=out, accumulate=accumulate) is out
    start = before if accumulate else torch.zeros(m, n)
    oracle = start.double() + a.double() @ b.double()
    assert_within_error_budget(out, oracle, peer(a, b, start), name=name)
    assert_exact(a, kept[0], name="a")
    assert_exact(b, kept[1], name="b")
    out.fill_(7.0)
    assert_exact(around, torch.full_like(around, 7.0), name="what lies around out")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("m", "n", "k"), [(530, 1300, 70), (20, 90, 2100), (3, 5, 4097)])
def test_more_than_one_tile_and_block(way: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    for transposed in (False, True):
        a = torch.randn(m, k).to(dtype)
        b = torch.randn(n, k).to(dtype).T if transposed else torch.randn(k, n).to(dtype)
        assert_within_error_budget(
            product(a, b), a.double() @ b.double(), peer(a, b), name=f"{way} {transposed}"
        )


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library: operands that are widened in several pieces along every axis."""
    monkeypatch.setattr(_compiled, "library", lambda _: None)
    monkeypatch.setattr(_gemm, "PIECE", 12)
    monkeypatch.setattr(_gemm, "DEPTH", 4)
    for accumulate in (False, True):
        a, b, before = torch.randn(8, 11).bfloat16(), torch.randn(7, 11).bfloat16().T, torch.randn(8, 7)
        out = before.clone()
        _gemm.matmul(a, b, out=out, accumulate=accumulate)
        start = before * accumulate
        oracle = start.double() + a.double() @ b.double()
        assert_within_error_budget(out, oracle, peer(a, b, start), name="pieces")


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_nothing_to_multiply(way: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    out = product(a, b)
    assert_exact(out, torch.zeros_like(out), name="zeros")
    before = torch.randn(m, n, dtype=out.dtype)
    assert_exact(_gemm.matmul(a, b, out=before.clone(), accumulate=True), before, name="nothing added")


def test_fp64_is_pytorch(way: str) -> None:
    a, b = torch.randn(9, 20, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    assert _gemm.kind(a) == "torch"
    assert_exact(product(a, b), a @ b, name="fp64")


def test_kind(way: str) -> None:
    low = {dtype: _gemm.kind(torch.zeros(1, 1, dtype=dtype)) for dtype in LOW}
    single = _gemm.kind(torch.zeros(1, 1))
    if way == "torch":
        assert (set(low.values()), single) == ({"widened"}, "torch")
    else:
        assert (low[torch.bfloat16], low[torch.float16], single) == (way, "avx512", "avx512")
    assert _gemm.kind(torch.zeros(1, 1, dtype=torch.bfloat16, device="meta")) == "widened"


def test_the_switch_turns_the_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, _compiled.SWITCH, "0")
    assert _gemm.kind(torch.zeros(1, 1, dtype=torch.bfloat16)) == "widened"


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_numbers_stay_in_their_row_and_column(way: str, dtype: torch.dtype, bad: float) -> None:
    for m, n, k, i, j in [(19, 101, 33, 5, 60), (8, 48, 2, 7, 47), (1, 1, 1, 0, 0), (17, 49, 1101, 16, 48)]:
        for at in (0, k - 1):
            a, b = torch.randn(m, k).to(dtype), torch.rand(k, n).to(dtype) + 0.5
            clean = product(a, b)
            spoiled = a.clone()
            spoiled[i, at] = bad
            out = product(spoiled, b)
            assert_exact(out[i], torch.full((n,), bad), name="its row")
            others = torch.arange(m) != i
            assert_exact(out[others], clean[others], name="other rows")

            a = a.abs() + 0.5
            clean = product(a, b)
            b[at, j] = bad
            out = product(a, b)
            assert_exact(out[:, j], torch.full((m,), bad), name="its column")
            others = torch.arange(n) != j
            assert_exact(out[:, others], clean[:, others], name="other columns")


def test_infinity_times_zero_and_opposite_infinities(way: str) -> None:
    a = torch.tensor([[INF, 1.0, 0.0], [INF, -INF, 1.0], [1.0, 1.0, 1.0]]).bfloat16()
    b = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]).bfloat16()
    want = torch.tensor([[NAN, INF], [NAN, NAN], [2.0, 3.0]])
    assert_exact(product(a, b), want, name=way)


@pytest.mark.parametrize("way", COMPILED, indirect=True)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("k", [1, 129, 1500])
def test_bits_of_a_row_and_of_a_column(way: str, dtype: torch.dtype, k: int) -> None:
    """Alone or in any batch, in any order, and whichever operand is transposed."""
    a, b = torch.randn(533, k).to(dtype), torch.randn(k, 203).to(dtype)
    whole = product(a, b)
    for rows in (slice(0, 1), slice(532, 533), slice(3, 12), slice(100, 250)):
        assert_exact(product(a[rows], b), whole[rows], name=f"rows {rows}")
    for columns in (slice(0, 1), slice(202, 203), slice(47, 49), slice(5, 150)):
        assert_exact(product(a, b[:, columns]), whole[:, columns], name=f"columns {columns}")
    order = torch.randperm(len(a))
    assert_exact(product(a[order], b), whole[order], name="order")
    assert_exact(product(b.T, a.T), whole.T, name="transposed")
    copies = a.T.contiguous().T, b.T.contiguous().T
    assert_exact(product(*copies), whole, name="other strides")


@pytest.mark.parametrize("way", COMPILED, indirect=True)
@pytest.mark.parametrize(("m", "n"), [(600, 1400), (1400, 600), (3, 5000), (5000, 3)])
def test_bits_do_not_depend_on_the_threads(
    way: str, threads: None, monkeypatch: pytest.MonkeyPatch, m: int, n: int
) -> None:
    monkeypatch.setattr(_gemm, "ALONE", 0)
    a, b = torch.randn(m, 300).bfloat16(), torch.randn(300, n).bfloat16()
    torch.set_num_threads(1)
    one = product(a, b)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert_exact(product(a, b), one, name=f"{count} threads")


# PyTorch's own threads do not survive a fork: the child runs no PyTorch operation that may want them.
FORK = """
import os, signal, torch
from raise_kernels import _gemm
_gemm.ALONE = 0
torch.set_num_threads(2)
a, b = torch.randn(100, 30).bfloat16(), torch.randn(30, 3000).bfloat16()
outs = [torch.zeros(100, 3000) for _ in range(2)]
_gemm.matmul(a, b, out=outs[0])
if os.fork() == 0:
    signal.alarm(20)
    _gemm.matmul(a, b, out=outs[1])
    os._exit(outs[0].numpy().tobytes() != outs[1].numpy().tobytes())
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_forked_process_starts_its_own_threads(libraries: dict[str, ctypes.CDLL | None]) -> None:
    if len(libraries) == 1:
        pytest.skip("no compiled kernel on this machine")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("0", "")


@pytest.mark.parametrize(
    ("a", "b", "out", "error", "words"),
    [
        ("2 3 bf16", "3 4 fp16", "2 4 fp32", TypeError, "give both as one of bf16"),
        ("2 3 int", "3 4 int", "2 4 fp32", TypeError, "give both as one of bf16"),
        ("2 3 bf16", "3 4 bf16", "2 4 bf16", TypeError, "give torch.float32"),
        ("2 3 fp64", "3 4 fp64", "2 4 fp32", TypeError, "give torch.float64"),
        ("2 3 bf16", "4 3 bf16", "2 3 fp32", ValueError, r"give \[M, K\] and \[K, N\]"),
        ("3 bf16", "3 4 bf16", "4 fp32", ValueError, r"give \[M, K\] and \[K, N\]"),
        ("2 3 bf16", "3 4 bf16", "4 2 fp32", ValueError, r"give \(2, 4\)"),
        ("2 3 bf16", "3 4 bf16", "2 4 fp32 strided", ValueError, "adjacent rows or adjacent columns"),
        ("2 3 bf16 meta", "3 4 bf16", "2 4 fp32", ValueError, "move them together"),
    ],
)
def test_refused(a: str, b: str, out: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _gemm.matmul(described(a), described(b), out=described(out))


def described(text: str) -> Tensor:
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    words = text.split()
    shape = [int(word) for word in words if word.isdigit()]
    dtype = next((names[word] for word in words if word in names), torch.int64)
    if "strided" in words:
        return torch.zeros(*(2 * size for size in shape), dtype=dtype)[::2, ::2]
    return torch.zeros(shape, dtype=dtype, device="meta" if "meta" in words else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [1, 700, _gemm.AT_ONCE, _gemm.AT_ONCE + 1])
def test_a_16_bit_result_is_rounded_once(way: str, dtype: torch.dtype, depth: int) -> None:
    """In one call of the kernel, or by way of fp32."""
    a, b = torch.randn(37, depth).to(dtype), torch.randn(depth, 50).to(dtype)
    wide = product(a, b)
    for start in (None, torch.randn(37, 50).to(dtype)):
        spare = torch.full((37, 60), NAN, dtype=dtype)
        out = spare[:, 5:55]
        if start is not None:
            out.copy_(start)
        assert _gemm.matmul_rounded(a, b, out=out, accumulate=start is not None) is out
        if start is None or dtype != torch.float32:
            assert_exact(out, (wide if start is None else start + wide).to(dtype), name="rounded once")
        assert spare[:, :5].isnan().all() and spare[:, 55:].isnan().all()


@pytest.mark.parametrize("dtype", LOW)
def test_halves_on_a_gpu_are_summed_in_fp32_on_its_tensor_cores(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is here: what would be called of its library, on tensors without values."""
    called: list[tuple[str, torch.dtype, object, bool]] = []
    for name in ("mm", "addmm"):
        real = getattr(torch, name)

        def spy(*args: Tensor, name: str = name, real: Callable[..., Tensor] = real, **kw: object) -> Tensor:
            called.append((name, args[-1].dtype, kw.get("out_dtype"), "out" in kw))
            return real(*args, **kw)

        monkeypatch.setattr(torch, name, spy)
    with FakeTensorMode():
        a, b = (torch.empty(4, 4, device="cuda", dtype=dtype) for _ in range(2))
        for out_dtype, accumulate in ((dtype, False), (torch.float32, False), (torch.float32, True)):
            out = torch.empty(4, 4, device="cuda", dtype=out_dtype)
            _gemm.matmul_rounded(a, b, out=out, accumulate=accumulate)
        assert _gemm.kind(a) == "out_dtype"
    # Only what is added to a result has a tensor of its own.
    assert called == [("mm", dtype, None, True), *(("mm", dtype, torch.float32, x) for x in (True, False))]
