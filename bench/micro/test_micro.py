"""Small shapes, many repeats: what a call costs beside its work.

python -m pytest bench/micro --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import raise_core as rc
from bench.linear_cases import eager_logp
from bench.logits_cases import SWITCH

Timer = Callable[[Callable[[], object]], object]
T, V, D, SPANS = 32, 4096, 256, 8
COMPILED = pytest.mark.parametrize("compiled", ["1", "0"], ids=["as it comes", "no C compiler"])


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(T, V, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logp() -> Tensor:
    return -torch.rand(T, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def offsets() -> Tensor:
    return torch.arange(0, T + 1, T // SPANS)


@COMPILED
@pytest.mark.parametrize("want", [("logp",), ("logp", "entropy", "self_certainty")], ids=["logp", "three"])
@pytest.mark.benchmark(group="token_stats")
def test_token_stats(
    benchmark: Timer, logits: Tensor, targets: Tensor, want: tuple[str, ...], compiled: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(SWITCH, compiled)
    benchmark(lambda: rc.token_stats(logits, targets, want=want))


@pytest.mark.benchmark(group="token_stats")
def test_eager_logp(benchmark: Timer, logits: Tensor, targets: Tensor) -> None:
    benchmark(lambda: torch.log_softmax(logits, -1).gather(1, targets[:, None]))


@COMPILED
@pytest.mark.benchmark(group="linear")
def test_linear_token_stats(
    benchmark: Timer, targets: Tensor, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, compiled)
    hidden, weight = torch.randn(T, D), torch.randn(V, D)
    benchmark(lambda: rc.linear_token_stats(hidden, weight, targets))


@pytest.mark.benchmark(group="linear")
def test_eager_linear(benchmark: Timer, targets: Tensor) -> None:
    hidden, weight = torch.randn(T, D), torch.randn(V, D)
    benchmark(lambda: eager_logp(hidden, weight, targets))


@pytest.mark.benchmark(group="rewards")
def test_scre(benchmark: Timer, logp: Tensor, offsets: Tensor) -> None:
    benchmark(lambda: rc.scre(logp, offsets))


@pytest.mark.parametrize("variant", ["paper", "balanced"])
@pytest.mark.benchmark(group="rewards")
def test_igsr(benchmark: Timer, logp: Tensor, offsets: Tensor, variant: str) -> None:
    score, group = torch.linspace(0.1, 0.9, SPANS), torch.zeros(SPANS, dtype=torch.int64)
    benchmark(lambda: rc.igsr(logp, offsets, score, group, variant=variant))


@pytest.mark.benchmark(group="rewards")
def test_policy_loss(benchmark: Timer, logp: Tensor, offsets: Tensor) -> None:
    advantage = torch.linspace(-1, 1, SPANS)
    benchmark(lambda: rc.policy_loss(logp, logp, advantage, offsets, num_tokens=T, num_sequences=SPANS))
