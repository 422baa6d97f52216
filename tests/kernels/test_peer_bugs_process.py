"""The bugs of other libraries that no result shows: launches, variants, resources, saved tensors.

Numbers are those of the table in test_peer_bugs.py.
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import raise_core as rc
import raise_kernels
from raise_core.ops import impl as impls
from raise_kernels import aot_table, linear_tiles, scre, token_stats
from tests.budget import assert_exact

SOURCES = sorted(Path(raise_kernels.__file__).parent.glob("*.py"))
both_paths = pytest.mark.parametrize("path", ["logits", "hidden"])
both_impls = pytest.mark.parametrize("impl", ["native", "triton"])


class Launch(NamedTuple):
    """One launch of a Triton kernel, which was recorded instead of run."""

    kernel: str
    grid: tuple[int, ...]
    variant: tuple[Any, ...]  # what makes Triton compile anew


def runtime_names(function: Callable[..., Any]) -> set[str]:
    """Parameters that the decorator of a kernel names in do_not_specialize."""
    tree = ast.parse(inspect.getsource(function))
    keywords = [k for node in ast.walk(tree) if isinstance(node, ast.Call) for k in node.keywords]
    return {name for k in keywords if k.arg == "do_not_specialize" for name in ast.literal_eval(k.value)}


def variant_of(
    function: Callable[..., Any], values: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...]:
    """Triton's key: dtypes, constants, and of integers that it may specialise whether they are 1 or 16 k."""
    key: list[Any] = [function.__name__]
    runtime = runtime_names(function)
    for name, value in inspect.signature(function).bind(*values, **options).arguments.items():
        if name.isupper() and name in options:
            key.append((name, value))
        elif isinstance(value, Tensor):
            key.append((name, value.dtype))
        elif isinstance(value, int) and name not in runtime:
            key.append((name, value == 1, value % 16 == 0))
    return tuple(key)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    seen: list[Launch] = []

    def record(self: Any, *values: Any, grid: Any, warmup: bool, **options: Any) -> None:
        own = {k: v for k, v in options.items() if k not in ("num_warps", "num_stages")}
        seen.append(Launch(self.fn.__name__, tuple(grid), variant_of(self.fn, values, own)))

    for kind in {type(token_stats._stats_kernel), type(scre._scre_kernel)}:
        monkeypatch.setattr(kind, "run", record)
    return seen


def call(path: str, count: int, vocab: int, impl: str = "triton", **options: Any) -> rc.TokenStats:
    y = torch.zeros(count, dtype=torch.long)
    if path == "logits":
        return rc.token_stats(torch.zeros(count, vocab, requires_grad=True), y, impl=impl, **options)
    hidden, weight = torch.zeros(count, 32, requires_grad=True), torch.zeros(vocab, 32, requires_grad=True)
    return rc.linear_token_stats(hidden, weight, y, impl=impl, **options)


@both_paths
def test_bug_02_rows_are_on_the_first_axis_alone(launches: list[Launch], path: str) -> None:
    logp = call(path, 70_000, 8).logp
    assert logp is not None
    logp.sum().backward()
    rc.scre(torch.zeros(70_000), torch.arange(70_001), impl="triton").sum()
    assert len(launches) >= 4
    assert all(len(launch.grid) == 1 for launch in launches)
    assert max(launch.grid[0] for launch in launches if launch.kernel != "_scre_kernel") > 1000


@both_paths
def test_bug_13_lengths_and_temperatures_make_no_new_variant(launches: list[Launch], path: str) -> None:
    variants = []
    for count, temperature, scale in ((1, 1.0, 1.0), (5, 0.7, 2.0), (16, 0.3, 1.0), (64, 2.0, 0.5)):
        launches.clear()
        logp = call(path, count, 48, temperature=temperature, logit_scale=scale, want=("logp",)).logp
        assert logp is not None
        logp.sum().backward()
        variants.append({launch.variant for launch in launches})
    assert len(variants[0]) >= 3
    assert all(v == variants[0] for v in variants)


def test_bug_13_lengths_of_spans_make_no_new_variant(launches: list[Launch]) -> None:
    for tokens in (1, 7, 32):
        rc.scre(torch.zeros(tokens), torch.tensor([0, tokens]), eta=0.1 * tokens, impl="triton")
    assert len(launches) == 3 and len({launch.variant for launch in launches}) == 1


@both_impls
@both_paths
def test_bug_14_scalars_are_the_same_in_a_compiled_graph(path: str, impl: str) -> None:
    """A kernel that the compiler launched itself would get its scalars in fp64."""
    targets = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def score(x: Tensor, y: Tensor, temperature: float) -> Tensor | None:
        if path == "logits":
            return rc.token_stats(x, y, temperature=temperature, impl=impl).logp
        return rc.linear_token_stats(x, x, y, temperature=temperature, impl=impl).logp

    torch._dynamo.reset()
    compiled = torch.compile(score, fullgraph=True, backend=backend)
    x, y = torch.randn(9, 9), torch.arange(9)
    for temperature in (0.7, 0.9, 1.0):
        got, eager = compiled(x, y, temperature), score(x, y, temperature)
        assert got is not None and eager is not None
        assert_exact(got, eager, name=f"temperature {temperature}")
    assert any("raise_kernels" in target for target in targets)
    assert not any("triton_kernel_wrapper" in target for target in targets)


@pytest.mark.parametrize("name", list(aot_table.TARGETS))
def test_bug_15_no_program_has_too_many_threads(name: str) -> None:
    target = aot_table.TARGETS[name]
    variants = list(aot_table.variants(name, False))
    assert len(variants) > 100
    assert all(v.warps * target.gpu.warp_size <= target.max_threads for v in variants)
    if target.gpu.backend == "hip":
        assert all(v.warps <= 16 for v in variants) and target.gpu.warp_size == 64


def test_bug_16_products_fit_the_memory_of_a_compute_unit() -> None:
    """Both operands of every stage but the last, which stays in registers on AMD."""
    assert aot_table.TARGETS["gfx942"].shared_limit == 64 * 1024
    tables = {2: linear_tiles.HALVES["gfx942"], 4: linear_tiles.SINGLES["gfx942"]}
    for item, tiles in tables.items():
        for use, tile in tiles.items():
            stage = (tile.rows + tile.columns) * tile.depth * item
            assert stage * max(tile.stages - 1, 1) <= aot_table.TARGETS["gfx942"].shared_limit, use


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_bug_17_nothing_is_tuned_at_run_time(source: Path) -> None:
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert not names & {"autotune", "heuristics", "Autotuner"}


def test_bug_24_no_silent_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3)
    monkeypatch.setattr(impls, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="which is not installed"):
        rc.token_stats(x, torch.tensor([0, 1]), impl="triton")
    monkeypatch.setattr(impls, "_announced", set())
    with pytest.warns(UserWarning, match="reference implementation on meta"):
        assert rc.chosen_impl(x.to("meta")) == "reference"


def test_bug_24_triton_that_cannot_run_says_so() -> None:
    code = (
        "import torch, raise_core as rc\n"
        "x, y = torch.zeros(2, 3), torch.tensor([0, 1])\n"
        "for call in (lambda: rc.token_stats(x, y, impl='triton'),\n"
        "             lambda: rc.linear_token_stats(x, torch.zeros(5, 3), y, impl='triton')):\n"
        "    try: print('ran', call())\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert [line.count("TRITON_INTERPRET=1") for line in ran.stdout.splitlines()] == [1, 1]


@pytest.mark.parametrize(("path", "least"), [("logits", 10), ("hidden", 100)])
def test_bug_26_one_row_fills_a_gpu_in_two_launches(launches: list[Launch], path: str, least: int) -> None:
    with torch.no_grad():
        call(path, 1, 151_936)
        one = list(launches)
        launches.clear()
        call(path, 3, 151_936)
    assert [launch.kernel for launch in one] == [launch.kernel for launch in launches]
    assert len(one) == 2 and one[0].grid[0] >= least
    rows = 1 if path == "hidden" else 3  # a block of rows is one program
    assert launches[0].grid[0] == rows * one[0].grid[0]


def saved_by(run: Callable[[], Tensor | None]) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        assert run() is not None
    return saved


@both_impls
@both_paths
def test_bug_27_nothing_of_the_size_of_the_logits_is_saved(path: str, impl: str) -> None:
    count, vocab, want = 6, 500, ("logp", "entropy", "self_certainty")
    y = torch.arange(count)
    if path == "logits":
        inputs = [torch.randn(count, vocab, requires_grad=True)]
        saved = saved_by(lambda: rc.token_stats(inputs[0], y, want=want, impl=impl).logp)
    else:
        inputs = [torch.randn(count, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)]
        saved = saved_by(lambda: rc.linear_token_stats(*inputs, y, want=want, impl=impl).logp)
    assert len(saved) > len(inputs)
    known = {x.untyped_storage().data_ptr() for x in inputs}
    own = [x for x in saved if x.untyped_storage().data_ptr() not in known]
    assert sum(x.untyped_storage().nbytes() // x.element_size() for x in own) <= 10 * count


@both_paths
def test_bug_27_a_compiled_graph_holds_one_node(path: str) -> None:
    nodes = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nodes.extend(str(n.target) for n in graph.graph.nodes if "raise_kernels" in str(n.target))
        return graph.forward

    def loss(x: Tensor, y: Tensor) -> Tensor:
        stats = rc.token_stats(x, y) if path == "logits" else rc.linear_token_stats(x, x, y)
        assert stats.logp is not None
        return stats.logp.sum()

    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend=backend)(torch.randn(9, 9), torch.arange(9))
    assert len(nodes) == 1
