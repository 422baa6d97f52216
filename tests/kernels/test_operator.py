"""token_stats as a PyTorch operator: schema, fake tensors, compiled graphs, and no host synchronisation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from raise_core import ops
from raise_core.ops import reward_operator
from raise_kernels import (
    _operator,
    confidence,
    linear_stats,
    native,
    token_stats,
    token_stats_backward,
    token_topk,
)
from raise_kernels._checks import DIFFERENTIABLE
from tests.budget import assert_exact

ENGINES = ["native", "triton"]
PLAIN_OPTIONS = (0.7, 1.0, None, 30, -100)


# torch.library.opcheck reads .grad of a non-leaf tensor itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0, 5])])
def test_opcheck(engine: str, rows: torch.Tensor | None) -> None:
    count = 6 if rows is None else 3
    logits = torch.randn(6, 40, requires_grad=True)
    names = "logp,entropy,top,max_logp,count"
    arguments = (logits, torch.arange(count), rows, *PLAIN_OPTIONS, names, 20, engine)
    torch.library.opcheck(torch.ops.raise_kernels.token_stats, arguments)
    stats = torch.ops.raise_kernels.token_stats(*arguments).detach()
    back = (torch.randn(5, count), stats, logits.detach(), *arguments[1:])
    torch.library.opcheck(torch.ops.raise_kernels.token_stats_backward, back)


def loss(x: torch.Tensor, y: torch.Tensor, impl: str) -> torch.Tensor:
    out = ops.token_stats(x * 2, y, softcap=9.0, want=("logp", "entropy", "rank"), impl=impl)
    assert out.logp is not None and out.entropy is not None and out.rank is not None
    return (out.logp - 0.1 * out.entropy).sum() + out.rank.sum()


@pytest.mark.parametrize("impl", ["auto", "native", "triton"])
def test_compiled_without_a_graph_break(impl: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, vocab in ((2, 70), (4, 50)):
        x, y = torch.randn(rows, 3, vocab), torch.randint(0, vocab, (rows, 3))
        results = []
        for function in (loss, compiled):
            leaf = x.clone().requires_grad_()
            value = function(leaf, y, impl)
            value.backward()
            results.append((value.detach(), leaf.grad))
        assert_exact(results[1][0], results[0][0], name="value")
        assert_exact(results[1][1], results[0][1], name="gradient")


def test_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return ops.token_stats(x, y).logp

    x, y = torch.randn(5, 30), torch.randint(0, 30, (5,))
    program = torch.export.export(Model(), (x, y))
    assert any("raise_kernels.token_stats" in str(node.target) for node in program.graph.nodes)
    assert_exact(program.module()(x, y), Model()(x, y), name="exported")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels that would be launched; nothing is, so that fake tensors suffice."""
    seen: list[str] = []
    for kernel in {type(token_stats._stats_kernel), type(confidence._group_kernel)}:
        monkeypatch.setattr(kernel, "run", lambda self, *_, **__: seen.append(self.fn.__name__))
    for module in (token_stats, token_stats_backward, token_topk, linear_stats):
        monkeypatch.setattr(module, "alignment", lambda *_: 1)  # a fake tensor has no address
    return seen


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize(
    ("source", "before"),
    [("logits", ["_stats_kernel"]), ("logp", []), ("hidden", ["_linear_kernel"])],
)
def test_rewards_read_nothing_back_from_the_device(
    launches: list[str], group_size: int | None, source: str, before: list[str]
) -> None:
    """Everything around the launches runs on tensors without values, where any read of one is an error."""
    with FakeTensorMode():
        spans = SimpleNamespace(  # what Spans.to(device) makes, without its checks on the host
            rows=torch.zeros(9, dtype=torch.long),
            targets=torch.zeros(9, dtype=torch.long),
            offsets=torch.zeros(7, dtype=torch.long),
            group=torch.zeros(6, dtype=torch.long),
            owner=torch.zeros(6, dtype=torch.long),
        )
        given = {
            "logits": {"logits": torch.randn(12, 50)},
            "logp": {"logp": torch.randn(9)},
            "hidden": {"hidden": torch.randn(12, 8), "weight": torch.randn(50, 8)},
        }
        score, strict = torch.rand(6), torch.zeros(6, dtype=torch.bool)
        tensors = [given[source].get(n) for n in ("logits", "hidden", "weight", "bias", "logp")]
        indices = spans.rows, spans.targets, spans.offsets, spans.group
        rest = (1.0, 1.0, None, None, 0.1, 1.0, 1, False, 0.1, 1e-6, 0.05, None, "paper", group_size, None)
        made = reward_operator._rewards._init_fn(*tensors, *indices, score, strict, *rest, "triton")
        seen = list(launches)
        got = ops.confidence_rewards(
            spans, score, strict, group_size=group_size, impl="triton", **given[source]
        )
        metrics = got.metrics()
    assert seen == launches == [*before, "_group_kernel"]
    assert made[0].shape == (5, 6) and made[3].shape == ((0,) if source == "logp" else (9,))
    assert got.reward.shape == (6,) and got.parts["logp"].shape == (9,)
    assert metrics["bonus_share"].shape == ()


@pytest.mark.parametrize("want", [("logp",), ("entropy", "rank"), ("logp", "topk_logp_mean")])
def test_statistics_and_their_gradient_read_nothing_back(launches: list[str], want: tuple[str, ...]) -> None:
    best = ["_select_kernel", "_finish_kernel"] if "topk_logp_mean" in want else []
    with FakeTensorMode():
        logits, y = torch.randn(4, 6, 50), torch.zeros(5, dtype=torch.long)
        rows = torch.zeros(5, dtype=torch.long)
        options = (1.0, 1.0, None, None, -100)
        names = ",".join(dict.fromkeys((*want, "top", "max_logp", "entropy", "count")))
        stats = _operator._forward._init_fn(logits, y, rows, *options, names, 20, "triton")
        grad = _operator._backward._init_fn(stats, stats, logits, y, rows, *options, names, 20, "triton")
    assert launches == ["_stats_kernel", "_merge_kernel", *best, "_grad_kernel"]
    assert grad.shape == logits.shape


def test_what_the_caller_does_to_a_result_does_not_reach_the_gradient() -> None:
    logits = torch.randn(3, 20, requires_grad=True)
    y = torch.tensor([1, 2, 3])
    grads = []
    for spoil in (False, True):
        out = native.token_stats(logits, y, want=("logp", "max_logp"))
        out["max_logp"].mul_(3 if spoil else 1)
        grads.append(torch.autograd.grad(out["logp"].sum(), logits)[0])
    assert_exact(grads[1], grads[0], name="gradient")
    assert not out["max_logp"].requires_grad and "max_logp" not in DIFFERENTIABLE
