"""The compiled CPU code and the PyTorch code it replaces: both meet the same tests; when which one runs."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raise_kernels import _compiled, native, native_compiled
from raise_kernels._checks import DIFFERENTIABLE, LogitMap
from raise_kernels._layout import block_rows
from tests.budget import assert_exact, assert_within_error_budget
from tests.kernels import test_gradients as gradients
from tests.kernels import test_token_stats as stats
from tests.kernels.cases import DTYPES, IGNORED, gradient, judge, names_of

INF, NAN = float("inf"), float("nan")
C_NAMES = tuple(n for n in names_of("native") if n in native_compiled.FIELDS)
PATTERNS = torch.arange(-(2**15), 2**15).to(torch.int16)  # every 16-bit float, to be viewed as one


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_compiled.SWITCH, raising=False)
    if _compiled.library("token_stats") is None:
        pytest.skip("no C compiler here")


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_compiled.SWITCH, "0")


@pytest.fixture(params=["compiled", "blocked"])
def engine(request: pytest.FixtureRequest) -> str:
    """Both codes in turn; the name that `engine_name` is to give."""
    request.getfixturevalue(request.param)
    return {"compiled": "compiled C", "blocked": "blocked torch"}[request.param]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what was compiled, before the test and after it."""
    _compiled._load_once.cache_clear()
    yield
    _compiled._load_once.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_engine_is_named(engine: str) -> None:
    for dtype in DTYPES:
        assert native.engine_name(torch.zeros(2, 5, dtype=dtype)) == engine
        assert native.engine_name(torch.zeros(9, 2, 5, dtype=dtype)[::2, :, :4]) == engine
    for other in (torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 9)[:, ::2], torch.zeros(5, 2).T):
        assert native.engine_name(other) == "blocked torch"


# What other files show for the engine that runs here by default, once more for each engine by name.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 64, 65, 2048, 2049, 17000])
def test_within_budget(engine: str, dtype: torch.dtype, vocab: int) -> None:
    stats.test_within_budget("native", dtype, vocab)


@pytest.mark.parametrize("shift", [1e4, -60.0])
def test_special_rows(engine: str, shift: float) -> None:
    stats.test_peaked_shifted_and_negative_logits("native", shift, 300.0)
    stats.test_rows_without_a_result("native")
    stats.test_rows_selects_and_may_repeat("native")
    stats.test_the_vocabulary_mask_comes_after_the_softcap("native", 5.0)
    stats.test_a_masked_value_of_the_dtype_is_as_good_as_infinity_for_logp("native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(engine: str, dtype: torch.dtype) -> None:
    how = LogitMap(temperature=0.7, softcap=20.0)
    stats.test_a_row_alone_equals_the_row_in_any_batch("native", dtype, how)
    stats.test_a_row_of_a_small_vocabulary_equals_the_row_in_several_blocks(513, how)
    gradients.test_gradient_of_rows_in_any_order_has_the_same_bits(block_rows(500) + 3, 500, dtype)


def test_any_subset_of_names_gives_the_same_bits(engine: str) -> None:
    stats.test_any_subset_of_names_gives_the_same_bits("native")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(engine: str, dtype: torch.dtype) -> None:
    gradients.test_each_output_alone_and_together("native", dtype, DIFFERENTIABLE)


def test_gradient_of_special_rows(engine: str) -> None:
    gradients.test_repeated_rows_add_up_and_others_are_zero("native")
    gradients.test_rows_without_a_result_have_no_gradient("native")
    gradients.test_masked_columns_have_no_gradient("native")
    gradients.test_upstream_of_stride_zero("native")


# Of the compiled code alone.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [LogitMap(), LogitMap(temperature=0.7, softcap=20.0, valid_vocab=16990)])
def test_bits_do_not_depend_on_threads(
    compiled: None, threads: None, dtype: torch.dtype, how: LogitMap
) -> None:
    vocab = 17001
    logits = (torch.randn(3, 7, vocab) * 4).to(dtype)
    rows = torch.tensor([20, 3, 3, 9, 0, 11, 3, 17, -1, 21])
    y = torch.randint(0, 16990, (len(rows),))
    y[4] = IGNORED
    up = {name: torch.randn(len(rows)) for name in DIFFERENTIABLE}
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        got = native.token_stats(logits, y, rows=rows, how=how, want=C_NAMES)
        results.append((got, gradient(native.token_stats, logits, y, up, rows=rows, how=how)))
    for got, grad in results[1:]:
        for name in C_NAMES:
            assert_exact(got[name], results[0][0][name], name=name)
        assert_exact(grad, results[0][1], name="gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_float_is_widened_exactly(compiled: None, dtype: torch.dtype) -> None:
    x = PATTERNS.view(dtype)[:, None]
    y = torch.zeros(len(x), dtype=torch.long)
    top = native.stats_forward(x, y, None, LogitMap(), ("top",), 1)["top"]
    wide = x[:, 0].float()
    assert_exact(top, wide.masked_fill(wide == INF, NAN), name="top of one column")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_rounded_as_pytorch_rounds(compiled: None, dtype: torch.dtype) -> None:
    """With one column, the gradient of lse is the upstream gradient itself."""
    halfway = PATTERNS.view(torch.float16).float() * (1 + 2.0**-11)
    up = torch.cat([halfway, PATTERNS.int().mul(2**16).add(2**15).view(torch.float32), torch.randn(5000)])
    up = up[up.isfinite()]
    x = torch.randn(len(up), 1).to(dtype)
    grad = gradient(native.token_stats, x, torch.zeros(len(up), dtype=torch.long), {"lse": up})
    assert_exact(grad[:, 0].abs(), up.to(dtype).abs(), name="gradient of lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [LogitMap(), LogitMap(softcap=9.0, logit_scale=0.5)])
def test_whole_blocks_that_are_masked(compiled: None, dtype: torch.dtype, how: LogitMap) -> None:
    logits = (torch.randn(4, 9000) * 3 - 200).to(dtype)
    logits[0, :5000] = -INF
    logits[1, 2048:4096] = -INF
    logits[2, 100:] = -INF
    logits[3, :8999] = -INF
    judge("native", logits, torch.tensor([5000, 0, 99, 8999]), how=how)


def test_nan_in_an_otherwise_masked_block_is_seen(compiled: None) -> None:
    logits = torch.full((2, 5000), -INF)
    logits[:, 4999] = 1.0
    logits[0, 17] = NAN
    got = native.token_stats(logits, torch.tensor([4999, 4999]), want=C_NAMES)
    assert all(value[0].isnan() and not value[1].isnan() for value in got.values())


@pytest.mark.parametrize("p", [1e-9, 1e-5, 0.3])
def test_a_sure_token_keeps_its_digits(compiled: None, p: float) -> None:
    """1 - p of the other column, far below the distance of floats near 1, decides logp and entropy."""
    logits = torch.full((1, 3000), -INF)
    logits[0, 7], logits[0, 2999] = 0.0, torch.tensor(p).log()
    (x,) = logits[0, 2999:]
    oracle, peer = (-torch.log1p(value.exp())[None] for value in (x.double(), x))
    got = native.token_stats(logits, torch.tensor([7]))["logp"]
    assert_within_error_budget(got, oracle, peer, name="logp")


# The compiler and what it leaves behind.


def test_a_compiler_that_fails_is_announced_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text('#!/bin/sh\ncase "$*" in *--version*) exit 0;; esac\necho no such target >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(_compiled.SWITCH, raising=False)
    with pytest.warns(RuntimeWarning, match=r"(?s)broken-cc.*slower.*RAISE_COMPILED=0.*no such target"):
        assert native.engine_name(torch.zeros(1, 2)) == "blocked torch"
    judge("native", torch.randn(3, 50), torch.tensor([1, 2, 3]))  # a second warning would be an error
    assert list((tmp_path / "raise_kernels").iterdir()) == []


def test_without_a_compiler_nothing_is_said(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv(_compiled.SWITCH, raising=False)
    assert _compiled.library("token_stats") is None


def test_a_named_compiler_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "sh -m64")
    assert _compiled.find_compiler() == ["sh", "-m64"]


def test_the_cache_folder_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    folder = _compiled.cache_folder()
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    assert _compiled.cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert _compiled.cache_folder() is None


def test_compiled_once_loaded_from_then_on(
    compiled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = _compiled.find_compiler()
    assert compiler is not None
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    for folder in (sources, cache):
        folder.mkdir()
    (sources / "one.h").write_text("#define ONE 1\n")
    (sources / "one.c").write_text('#include "one.h"\nint one(void) { return ONE; }\n')
    monkeypatch.setattr(_compiled, "SOURCES", sources)
    monkeypatch.setitem(_compiled.OPTIMISE, "one", "-O1")
    loaded = []

    def load() -> None:
        loaded.append(_compiled.load(compiler, cache, "one"))

    both = [threading.Thread(target=load) for _ in range(2)]  # as two processes would
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [found.one() for found in loaded] == [1, 1]
    (kept,) = cache.iterdir()
    build = _compiled._build
    monkeypatch.setattr(_compiled, "_build", None)
    assert _compiled.load(compiler, cache, "one")._name == str(kept)
    monkeypatch.setattr(_compiled, "_build", build)
    (sources / "one.h").write_text("#define ONE 3\n")
    assert _compiled.load(compiler, cache, "one").one() == 3
    monkeypatch.setattr(_compiled, "FLAGS", (*_compiled.FLAGS, "-g"))
    _compiled.load(compiler, cache, "one")
    assert len(list(cache.iterdir())) == 3


def test_what_follows_is_compiled_at_the_same_time(
    compiled: None, fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _compiled.library("gemm") is not None
    for thread in threading.enumerate():
        if thread.daemon and thread is not threading.current_thread():
            thread.join(timeout=60)
    assert {path.name.split("-")[0] for path in (tmp_path / "raise_kernels").iterdir()} == {
        "gemm",
        "token_stats",
    }


def test_a_compiler_that_does_not_know_its_processor(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second set of options gives correct results too, without a folder to keep them in."""
    compiler = _compiled.find_compiler()
    assert compiler is not None
    monkeypatch.setattr(_compiled, "TUNING", (("-march=no-such-processor",), ()))
    plain = _compiled.load(compiler, None, "token_stats")
    monkeypatch.setattr(_compiled, "library", lambda _: plain)
    for dtype in DTYPES:
        stats.test_within_budget("native", dtype, 2500)
        gradients.test_each_output_alone_and_together("native", dtype, DIFFERENTIABLE)


def test_the_sources_give_no_warning(compiled: None) -> None:
    compiler = _compiled.find_compiler()
    assert compiler is not None
    sources = map(str, _compiled.SOURCES.glob("*.c"))
    command = [*compiler, *_compiled.FLAGS, "-O0", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
