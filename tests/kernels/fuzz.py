"""What the fuzz tests share: engines, how many examples each is given, and what is drawn beside a case."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from raise_kernels import _compiled
from raise_kernels._checks import LogitMap
from tests.kernels.cases import some_targets

ENGINES = {
    "reference": "reference",
    "native": "native",
    "floor": "native",
    "compiled": "native",
    "triton": "triton",
}
SHORT = 20  # examples of a test
ROWS = {"reference": 250, "floor": 400, "compiled": 400, "triton": 250}  # of a long run
MOST = 6  # rows in the interpreter, which takes as long for a shard or a candidate as for all columns
COUNT: dict[tuple[str, str], int] = {}
memories = st.sampled_from([None, 1, 5000])
Test = Callable[..., None]


def fuzzed(long: Mapping[str, int], **strategies: Any) -> Callable[[Test], Test]:
    """The test of one path, once for each engine of `long`, which says how many examples a long run has."""

    def decorate(test: Test) -> Test:
        @pytest.mark.parametrize("engine", list(long))
        def run_examples(engine: str) -> None:
            count = long[engine] if os.environ.get("RAISE_FUZZ") == "long" else SHORT
            # Numbers come from a seed: shrinking would take minutes and make no case easier to read.
            phases = (Phase.explicit, Phase.reuse, Phase.generate)
            examples = given(**strategies)(test)
            settings(max_examples=count, phases=phases)(examples)(engine=engine)

        run_examples.__name__ = test.__name__
        return run_examples

    return decorate


@pytest.fixture(autouse=True, scope="module")
def report_count(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print how many examples a file ran."""
    COUNT.clear()
    yield
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        counted = ", ".join(f"{engine} {path} {count}" for (engine, path), count in COUNT.items())
        print(f"\n{sum(COUNT.values())} random examples: {counted}")


@contextmanager
def running(engine: str, path: str, *inputs: Tensor | None) -> Iterator[str]:
    """The implementation of an engine for one example, which is counted and must not write its inputs."""
    if engine == "compiled" and _compiled.library("token_stats") is None:
        pytest.skip("no C compiler here")
    stored = [x.untyped_storage() for x in inputs if x is not None]
    before = [bytes(s) for s in stored]
    torch.manual_seed(0)  # of the peers' orders
    COUNT[engine, path] = COUNT.get((engine, path), 0) + 1
    with pytest.MonkeyPatch.context() as patch:
        if engine == "floor":
            patch.setenv(_compiled.SWITCH, "0")
        yield ENGINES[engine]
    assert [bytes(s) for s in stored] == before, "an input was written"


def generator(data: st.DataObject) -> torch.Generator:
    """Random numbers from a drawn seed."""
    return torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))


def wanted(data: st.DataObject, names: tuple[str, ...]) -> tuple[str, ...]:
    """Some of the names, in any order."""
    return tuple(data.draw(st.permutations(sorted(data.draw(st.sets(st.sampled_from(names), min_size=1))))))


def some_rows(data: st.DataObject, logits: Tensor, y: Tensor, how: LogitMap) -> tuple[Tensor, dict[str, Any]]:
    """Targets as they are, or of named rows, repeated and outside ones among them."""
    if not data.draw(st.booleans()):
        return y, {}
    g = generator(data)
    total, count = logits.shape[:-1].numel(), data.draw(st.integers(0, 9))
    rows = torch.randint(0, total, (count,), generator=g)
    rows[torch.rand(count, generator=g) < 0.1] = data.draw(st.sampled_from([-1, total, 2**40]))
    return some_targets(data.draw, g, how.columns(logits.shape[-1]), (count,)), {"rows": rows}


def upstream(data: st.DataObject, names: tuple[str, ...], y: Tensor) -> dict[str, Tensor]:
    """Gradients from above, one of them expanded now and then."""
    g = generator(data)
    up = {name: torch.randn(y.shape, generator=g) for name in names}
    if data.draw(st.booleans()):
        up[names[0]] = torch.randn((), generator=g).expand(y.shape)
    return up


def plain_rows(engine: str, x: Tensor) -> Tensor:
    """Logits for an engine: autograd, which is the reference's, adds rows up in their dtype, 16 bits too."""
    return x.float() if engine == "reference" else x


def fewer(engine: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x and targets y; in the interpreter the first of some leading axes."""
    while engine == "triton" and y.numel() > MOST and y.shape == x.shape[:-1]:
        x, y = x[0], y[0]
    return x, y
