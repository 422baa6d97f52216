"""Addresses beyond 2^31 elements: rows, columns, targets, weights, gradients.

Most of it costs no memory: views whose rows lie far apart in a mapping of which only the touched pages exist.
One case is real, 4.3 GB of bf16 logits, and is skipped where that much is not free.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_kernels import _compiled
from raise_kernels._checks import DIFFERENTIABLE
from tests.budget import assert_exact
from tests.kernels.cases import judge, judge_gradient

FAR = 2**31 + 64
SUMS = ("logp", "entropy", "self_certainty", "max_logp", "lse")
every_engine = pytest.mark.parametrize("impl", ["native", "floor", "triton"], indirect=True)


@pytest.fixture
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation; "floor" is native without its C code."""
    if request.param == "floor":
        monkeypatch.setenv(_compiled.SWITCH, "0")
    return "native" if request.param == "floor" else str(request.param)


def sparse(path: Path, elements: int, dtype: torch.dtype) -> Tensor:
    """[elements] in a file of zeros that takes no space on disk; a page exists once it is written."""
    with path.open("wb") as file:
        file.truncate(elements * dtype.itemsize)
    return torch.from_file(str(path), shared=False, size=elements, dtype=dtype)


def apart(path: Path, x: Tensor, axis: int) -> Tensor:
    """The numbers of x [N, M], neighbours along `axis` FAR elements from each other."""
    flat = sparse(path, (x.shape[axis] - 1) * FAR + x.shape[1 - axis], x.dtype)
    strides = (FAR, 1) if axis == 0 else (1, FAR)
    return flat.as_strided(x.shape, strides).copy_(x)


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_logits_far_apart(tmp_path: Path, impl: str, dtype: torch.dtype, axis: int) -> None:
    near = (torch.randn(3, 70) if axis == 0 else torch.randn(5, 3)).to(dtype)
    far = apart(tmp_path / "logits", near, axis)
    y = torch.arange(len(near)) % near.shape[1]
    up = {name: torch.randn(len(y)) for name in DIFFERENTIABLE}
    got, grad = judge(impl, far, y, want=SUMS), judge_gradient(impl, far, y, up)
    if axis == 0:
        for name, value in judge(impl, near, y, want=SUMS).items():
            assert_exact(got[name], value, name=name)
        assert_exact(grad.contiguous(), judge_gradient(impl, near, y, up), name="gradient")


@every_engine
@pytest.mark.parametrize("which", ["hidden rows", "hidden columns", "weight rows", "weight columns"])
def test_hidden_states_and_weights_far_apart(tmp_path: Path, impl: str, which: str) -> None:
    name, direction = which.split()
    depth, vocab = (3, 70) if direction == "columns" else (33, 3)
    given = {"hidden": torch.randn(3, depth).bfloat16(), "weight": torch.randn(vocab, depth).bfloat16()}
    y, results = torch.tensor([0, 2, 1]), []
    for far in (True, False):
        x = dict(given)
        if far:
            x[name] = apart(tmp_path / "far", x[name], 0 if direction == "rows" else 1)
        leaves = {k: v.requires_grad_() for k, v in x.items()}
        stats = rc.linear_token_stats(leaves["hidden"], leaves["weight"], y, want=DIFFERENTIABLE, impl=impl)
        values = [getattr(stats, n) for n in DIFFERENTIABLE]
        grads = torch.autograd.grad(torch.stack(values).sum(), list(leaves.values()))
        results.append([*(v.detach() for v in values), *(g.contiguous() for g in grads)])
    for k, (one, other) in enumerate(zip(*results, strict=True)):
        assert_exact(one, other, name=f"{which}, result {k}")


@every_engine
def test_rows_beyond_32_bits_of_elements(tmp_path: Path, impl: str) -> None:
    """N * V above 2^31 with adjacent rows: only those that `rows` names are read."""
    vocab = 4096
    count = 2**31 // vocab + 8
    x = torch.randn(3, vocab).bfloat16()
    logits = sparse(tmp_path / "logits", count * vocab, torch.bfloat16).view(count, vocab)
    rows, y = torch.tensor([count - 1, 0, 2**31 // vocab]), torch.tensor([4095, 0, 17])
    logits[rows] = x
    far = rc.token_stats(logits, y, rows=rows, want=SUMS, impl=impl)
    near = rc.token_stats(x, y, want=SUMS, impl=impl)
    for name in SUMS:
        assert_exact(getattr(far, name), getattr(near, name), name=name)


def free_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.slow
def test_all_of_more_than_two_to_the_31_logits() -> None:
    """Every row is read, and a gradient of the same size would not fit beside it: forward only."""
    vocab, count = 151_936, 2**31 // 151_936 + 2
    if free_bytes() < 8 << 30:
        pytest.skip("needs 8 GB of free memory")
    some = torch.randn(64, vocab).bfloat16()
    logits = torch.empty(count, vocab, dtype=torch.bfloat16)
    for start in range(0, count, 64):
        logits[start : start + 64] = some[: min(64, count - start)]
    assert logits.numel() > 2**31
    y = torch.arange(count) * 11 % vocab
    got = rc.token_stats(logits, y, impl="native").logp
    picked = torch.tensor([0, 1, count // 2, count - 2, count - 1])
    alone = rc.token_stats(some[picked % 64], y[picked], impl="native").logp
    assert got is not None and alone is not None and got.isfinite().all()
    assert_exact(got[picked], alone, name="rows at both ends and in the middle")
