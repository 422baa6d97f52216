"""confidence_rewards and igsr as PyTorch operators: opcheck, compiled graphs, export, the same bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_core.ops import reward_operator
from tests.budget import assert_exact

every_impl = pytest.mark.parametrize("impl", ["reference", "native", "triton"])
sources = pytest.mark.parametrize("source", ["logits", "hidden", "logp"])
OFFSETS, GROUP = torch.tensor([0, 2, 2, 5, 6]), torch.tensor([3, 3, 1, 1])
SCORE, STRICT = torch.tensor([0.4, 0.5, 0.45, 0.41]), torch.tensor([True, False, False, False])
OPTIONS = (0.7, 1.0, None, 30, 0.1, 1.0, 1, False, 0.1, 1e-6, 0.05, None, "balanced")


def given(source: str) -> dict[str, Tensor]:
    if source == "hidden":
        return {"hidden": torch.randn(8, 5), "weight": torch.randn(40, 5), "bias": torch.randn(40)}
    return {"logits": torch.randn(2, 4, 40)} if source == "logits" else {"logp": -torch.rand(6)}


def spans() -> rc.Spans:
    rows, targets = torch.tensor([7, 0, 3, 3, 1, 2]), torch.tensor([1, 2, 29, 4, 5, 6])
    return rc.Spans(rows, targets, OFFSETS, GROUP, torch.arange(4))


@every_impl
@sources
@pytest.mark.parametrize("group_size", [None, 2])
def test_opcheck(impl: str, source: str, group_size: int | None) -> None:
    x, where = given(source), spans()
    tensors = [x.get(name) for name in ("logits", "hidden", "weight", "bias", "logp")]
    indices = (where.rows, where.targets, OFFSETS, GROUP, SCORE, STRICT)
    torch.library.opcheck(
        torch.ops.raise_core.confidence_rewards, (*tensors, *indices, *OPTIONS, group_size, 1 << 20, impl)
    )


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_igsr_opcheck(impl: str, dtype: torch.dtype) -> None:
    arguments = (-torch.rand(6).to(dtype), OFFSETS, SCORE, GROUP, 0.1, 1e-6, 0.05, None, "paper", impl)
    torch.library.opcheck(torch.ops.raise_core.igsr, arguments)
    got = reward_operator.igsr(*arguments)
    want = rc.igsr(arguments[0], OFFSETS, SCORE, GROUP, impl=impl)
    assert_exact(got, want, name="igsr")


@every_impl
@sources
def test_compiled_without_a_graph_break(impl: str, source: str) -> None:
    """Rewards, their parts and metrics, from spans and tensors that are arguments of the graph."""
    torch._dynamo.reset()

    def rewards(where: rc.Spans, score: Tensor, strict: Tensor, x: dict[str, Tensor]) -> Any:
        got = rc.confidence_rewards(where, score, strict, group_size=2, variant="balanced", impl=impl, **x)
        return got.reward * 2, got.confidence, got.parts, got.metrics()

    compiled = torch.compile(rewards, fullgraph=True, backend="aot_eager")
    for k in range(2):
        arguments = (spans(), SCORE * (1 + k), STRICT, given(source))
        want, got = rewards(*arguments), compiled(*arguments)
        assert_exact(got[0], want[0], name="reward")
        assert_exact(got[1], want[1], name="confidence")
        for mine, theirs in zip(got[2:], want[2:], strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert_exact(mine[name], theirs[name], name=name)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_igsr_compiled_and_differentiated_around(impl: str) -> None:
    """A reward is a constant of the loss it weighs: no gradient comes through it."""
    torch._dynamo.reset()

    def loss(logp: Tensor, score: Tensor) -> Tensor:
        reward = rc.igsr(logp * 2, OFFSETS, score, GROUP, impl=impl)
        return (reward * rc.span_logp(logp, OFFSETS, impl=impl)).sum()

    logp = -torch.rand(6)
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logp.clone().requires_grad_()
        results.append(torch.autograd.grad(run(leaf, SCORE), leaf)[0])
    assert_exact(results[1], results[0], name="gradient")
    assert not rc.igsr(logp.requires_grad_(), OFFSETS, SCORE, GROUP, impl=impl).requires_grad


@sources
def test_exported(source: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: dict[str, Tensor], rows: Tensor, targets: Tensor, score: Tensor) -> Tensor:
            where = SimpleNamespace(rows=rows, targets=targets, offsets=OFFSETS, group=GROUP)
            return rc.confidence_rewards(where, score, STRICT, **x).reward

    where = spans()
    arguments = (given(source), where.rows, where.targets, SCORE)
    program = torch.export.export(Model(), arguments)
    assert "torch.ops.raise_core.confidence_rewards" in str(program)
    assert_exact(program.module()(*arguments), Model()(*arguments), name="exported")


def test_a_compiled_graph_refuses_split_groups_when_it_runs() -> None:
    torch._dynamo.reset()

    def rewards(where: rc.Spans, x: Tensor) -> Tensor:
        return rc.confidence_rewards(where, SCORE, STRICT, logits=x, group_size=2).reward

    compiled = torch.compile(rewards, fullgraph=True, backend="aot_eager")
    split = rc.Spans(**(vars(spans()) | {"group": torch.tensor([3, 1, 3, 1])}))
    for run in (rewards, compiled):
        with pytest.raises(ValueError, match="a group is split or incomplete"):
            run(split, torch.randn(8, 40))


def test_what_came_before_the_operator_is_not_written() -> None:
    where, x = spans(), given("hidden")
    before = [t.clone() for t in (*vars(where).values(), *x.values(), SCORE, STRICT)]
    rc.confidence_rewards(where, SCORE, STRICT, **x)
    for was, now in zip(before, (*vars(where).values(), *x.values(), SCORE, STRICT), strict=True):
        assert_exact(now, was, name="input")
