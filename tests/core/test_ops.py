"""The public reward operations: arguments arrive, implementations agree, no gradient is dropped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

import raise_core as rc
from raise_core import ops
from raise_core.spans import Spans
from raise_kernels import reference, reference_engine
from raise_kernels._backward import Normaliser, coefficients
from raise_kernels._checks import STATS, LogitMap
from tests.budget import HALF_ULP, assert_exact, assert_within_error_budget

IMPLS = ["reference", "native", "triton"]
every_impl = pytest.mark.parametrize("impl", IMPLS)


def some_spans() -> tuple[Spans, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two groups of four: spans, logits of the rows, scores, strictness."""
    offsets = torch.tensor([0, 2, 2, 5, 6, 8, 10, 14, 16])
    spans = Spans(
        rows=torch.arange(16) + 2,
        targets=torch.randint(0, 90, (16,)),
        offsets=offsets,
        group=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        owner=torch.arange(8),
    )
    logits = torch.randn(20, 90) * 2
    logits[spans.rows, spans.targets] += 5
    score = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.71, 0.75, 0.52, 0.55])
    return spans, logits, score, torch.tensor([True] * 4 + [False] * 4)


@every_impl
def test_token_stats_has_every_field_and_only_what_is_wanted(impl: str) -> None:
    assert tuple(sorted(f.name for f in fields(ops.TokenStats))) == tuple(sorted(STATS))
    x, y = torch.randn(2, 3, 40), torch.randint(0, 30, (2, 3))
    got = ops.token_stats(
        x, y, temperature=0.5, softcap=9.0, valid_vocab=32, want=("entropy", "logp"), impl=impl
    )
    assert got.lse is None and got.rank is None
    how = LogitMap(temperature=0.5, softcap=9.0, valid_vocab=32)
    for name in ("entropy", "logp"):
        value = getattr(got, name)
        oracle = reference.token_stats(x.double(), y, how=how, want=(name,))[name]
        peer = reference.token_stats(x, y, how=how, want=(name,))[name]
        assert_within_error_budget(value, oracle, peer + HALF_ULP, name=name)


@every_impl
@pytest.mark.parametrize("variant", ["paper", "balanced"])
@pytest.mark.parametrize("group_size", [None, 4])
def test_confidence_rewards(impl: str, variant: str, group_size: int | None) -> None:
    spans, logits, score, strict = some_spans()
    got = ops.confidence_rewards(
        spans, score, strict, logits=logits, group_size=group_size, variant=variant, penalty=0.01, impl=impl
    )
    logp = ops.token_stats(logits, spans.targets, rows=spans.rows, impl=impl).logp
    assert logp is not None
    assert_exact(got.parts["logp"], logp, name="logp")
    scre = ops.scre(logp, spans.offsets, impl=impl)
    assert_exact(got.confidence[:4], scre[:4], name="confidence of strict rows")
    assert_exact(got.reward[:4], score[:4] * scre[:4], name="reward of strict rows")
    assert got.confidence[2] > 0 and got.reward[2] == 0
    assert got.reward[1] == 0 and got.confidence[1] == 0
    tail = ops.igsr(
        logp[6:].contiguous(), spans.offsets[4:] - 6, score[4:], spans.group[4:],
        variant=variant, penalty=0.01, impl=impl,
    )  # fmt: skip
    assert_exact(got.reward[4:], tail, name="reward of open rows")
    assert got.parts["length"].tolist() == [2, 0, 3, 1, 2, 2, 4, 2]


@every_impl
def test_three_sources_agree(impl: str) -> None:
    spans, _, score, strict = some_spans()
    hidden, weight = torch.randn(4, 5, 16), torch.randn(90, 16)
    from_logits = ops.confidence_rewards(spans, score, strict, logits=hidden @ weight.T, impl=impl)
    from_hidden = ops.confidence_rewards(spans, score, strict, hidden=hidden, weight=weight, impl=impl)
    from_logp = ops.confidence_rewards(spans, score, strict, logp=from_logits.parts["logp"], impl=impl)
    assert_exact(from_logp.reward, from_logits.reward, name="from logp")
    logits = (hidden.double() @ weight.double().T).view(20, 90)
    oracle = reference.token_stats(logits, spans.targets, rows=spans.rows)["logp"]
    peer = reference.linear_token_stats(hidden, weight, spans.targets, rows=spans.rows)["logp"]
    assert_within_error_budget(from_hidden.parts["logp"], oracle, peer, name="from hidden")


def test_metrics_by_hand() -> None:
    spans, _, _, _ = some_spans()
    logp = torch.full((16,), -0.1)
    logp[6:8] = -3.0
    # Group 0: a bin of one at score 1 has no headroom. Group 1: of two in a bin the surer one is lifted.
    score = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.55, 0.55, 0.0, 0.0])
    got = ops.confidence_rewards(spans, score, torch.zeros(8, dtype=torch.bool), logp=logp)
    metrics = got.metrics()
    assert got.parts["bin"].tolist() == [10, -1, -1, -1, 5, 5, -1, -1]
    assert metrics["bonus_share"] == torch.tensor(1 / 3)
    assert metrics["no_effect_share"] == 0.5


def test_metrics_without_open_rows_are_nan() -> None:
    spans, logits, score, _ = some_spans()
    got = ops.confidence_rewards(spans, score, torch.ones(8, dtype=torch.bool), logits=logits)
    assert all(v.isnan() for v in got.metrics().values())


@every_impl
def test_gradient_reaches_the_logits(impl: str) -> None:
    x = torch.randn(3, 20, requires_grad=True)
    y = torch.tensor([1, 2, -100])
    logp = ops.token_stats(x, y, impl=impl).logp
    assert logp is not None
    logp.sum().backward()
    expected = torch.nn.functional.one_hot(y[:2], 20) - torch.softmax(x[:2].detach().double(), -1)
    assert x.grad is not None
    peer = torch.nn.functional.one_hot(y[:2], 20) - torch.softmax(x[:2].detach(), -1)
    assert_within_error_budget(x.grad[:2], expected, peer, name="gradient")
    assert (x.grad[2] == 0).all()


STATISTICS = tuple(name for name in STATS if name != "rank")


def under_autocast(impl: str, dtype: torch.dtype) -> dict[str, list[torch.Tensor | None]]:
    """Results of the operations, and their gradients, for the same numbers each time."""
    torch.manual_seed(5)
    spans, logits, score, strict = some_spans()
    hidden, weight, bias = torch.randn(20, 16), torch.randn(90, 16), torch.randn(90)
    x, h, w, b = (t.to(dtype).requires_grad_() for t in (logits, hidden, weight, bias))
    y, rows, choices = spans.targets, spans.rows, torch.randint(0, 90, (16, 3))
    linear = {"bias": b, "rows": rows, "impl": impl}
    shard = {"first_column": 0, "want": STATS, "target_logit": torch.randn(16), "topk": 3, "impl": impl}

    def every(stats: ops.TokenStats, names: tuple[str, ...] = STATISTICS) -> torch.Tensor:
        return torch.stack([getattr(stats, name) for name in names])

    differentiable = {
        "token_stats": lambda: every(ops.token_stats(x, y, rows=rows, want=STATISTICS, impl=impl)),
        "linear_token_stats": lambda: every(ops.linear_token_stats(h, w, y, want=STATISTICS, **linear)),
        "candidates": lambda: ops.candidate_logp(choices, logits=x, rows=rows, impl=impl),
        "linear candidates": lambda: ops.candidate_logp(choices, hidden=h, weight=w, **linear),
        "scre": lambda: ops.scre(x[:, 0] - 9, torch.tensor([0, 5, 20]), impl=impl),
        "span_logp": lambda: ops.span_logp(x[:, 0], torch.tensor([0, 5, 20]), impl=impl),
        "linear_policy_loss": lambda: (
            rc.linear_policy_loss(
                h, w, y, None, torch.ones(1), torch.tensor([0, 16]), num_tokens=16, num_sequences=1, **linear
            ).loss
        ),
    }
    rest = {
        "partial": lambda: ops.partial_token_stats(x, y, rows=rows, **shard).values,
        "linear partial": lambda: ops.partial_linear_token_stats(
            h, w, y, bias=b, rows=rows, **shard
        ).values,
        "rank": lambda: every(ops.linear_token_stats(h, w, y, want=("rank",), **linear), ("rank",)),
        "rewards": lambda: ops.confidence_rewards(
            spans, score, strict, hidden=h, weight=w, bias=b, impl=impl
        ).parts["logp"],
        "loss without a gradient": lambda: rc.linear_policy_loss(
            h.detach(), w.detach(), y, None, torch.ones(1), torch.tensor([0, 16]), num_tokens=16,
            num_sequences=1, rows=rows, impl=impl,
        ).logp,
    }  # fmt: skip
    out: dict[str, list[torch.Tensor | None]] = {}
    for name, run in (differentiable | rest).items():
        value = run()
        assert value is not None
        out[name] = [value.detach()]
        if name in differentiable:
            up = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
            out[name] += torch.autograd.grad(value, (x, h, w, b), up, allow_unused=True)
    return out


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit(impl: str, dtype: torch.dtype) -> None:
    """An operation says itself what its precision is; autocast narrows neither it nor its gradient."""
    outside = under_autocast(impl, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = under_autocast(impl, dtype)
    for name, values in outside.items():
        for k, (want, got) in enumerate(zip(values, inside[name], strict=True)):
            assert (want is None) == (got is None)
            if want is not None and got is not None:
                assert_exact(got, want, name=f"{name} {k}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit_of_a_shard_s_gradient(dtype: torch.dtype) -> None:
    """What each process of `parallel_linear_token_stats` computes of its own, by impl="reference"."""
    h, w, b = torch.randn(5, 8).to(dtype), torch.randn(30, 8).to(dtype), torch.randn(30).to(dtype)
    y, some = torch.arange(5), torch.randn(5)
    engine = reference_engine.LINEAR_ENGINE
    made = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            stats = engine.forward(h, w, b, y, None, LogitMap(), ("top", "max_logp"), 1, 1)
            norm = Normaliser(stats["top"], stats["max_logp"])
            weights = coefficients({"logp": some}, norm, None, None, y >= 0)
            every = engine.backward(h, w, b, y, None, norm, weights, LogitMap(), (True,) * 3, 1)
            made.append([*stats.values(), *every])
    for k, (want, got) in enumerate(zip(*made, strict=True)):
        assert_exact(got, want, name=str(k))


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("name", ["linear_token_stats", "candidate_logp", "from hidden", "scre", "span_logp"])
def test_exported(impl: str, name: str) -> None:
    """A graph of torch.export gives the bits of the call."""
    choices, offsets = torch.randint(0, 30, (5, 3)), torch.tensor([0, 2, 2, 5])
    calls: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]] = {
        "linear_token_stats": lambda h, w: ops.linear_token_stats(h, w, choices[:, 0], impl=impl).logp,
        "candidate_logp": lambda h, w: ops.candidate_logp(choices, logits=h @ w.T, impl=impl),
        "from hidden": lambda h, w: ops.candidate_logp(choices, hidden=h, weight=w, impl=impl),
        "scre": lambda h, w: ops.scre(-h[:, 0].abs(), offsets, impl=impl),
        "span_logp": lambda h, w: ops.span_logp(-h[:, 0].abs(), offsets, impl=impl),
    }

    class Model(torch.nn.Module):
        def forward(self, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
            return calls[name](h, w)

    inputs = torch.randn(5, 8), torch.randn(30, 8)
    exported = torch.export.export(Model(), inputs)
    assert "torch.ops.raise_kernels." in str(exported)
    want = Model()(*inputs)
    assert want is not None
    assert_exact(exported.module()(*inputs), want, name=name)


def test_chosen_impl() -> None:
    x = torch.zeros(1)
    assert ops.chosen_impl(x) == "native"
    assert [ops.chosen_impl(x, impl) for impl in IMPLS] == IMPLS
    with pytest.raises(ValueError, match="impl is 'cuda'"):
        ops.chosen_impl(x, "cuda")
    with pytest.raises(ValueError, match="runs on the CPU"):
        ops.chosen_impl(torch.zeros(1, device="meta"), "native")


def test_a_fallback_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.impl, "_announced", set())
    elsewhere = torch.zeros(1, device="meta")
    with pytest.warns(UserWarning, match="reference implementation on meta"):
        assert ops.chosen_impl(elsewhere) == "reference"
    assert ops.chosen_impl(elsewhere) == "reference"


def test_triton_on_the_cpu_needs_the_interpreter() -> None:
    code = (
        "import torch; from raise_core import ops\n"
        "try: ops.token_stats(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), impl='triton')\n"
        "except ValueError as e: print(e)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"TRITON_INTERPRET": "0"},
    )
    assert "set TRITON_INTERPRET=1" in out.stdout


def test_importing_the_operations_imports_neither_triton_nor_transformers() -> None:
    code = "import sys, raise_core.ops; print([m for m in ('triton', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logp": torch.zeros(16)}, "exactly one of"),
        ({"logits": None}, "exactly one of"),
        ({"weight": torch.zeros(9, 4)}, "go together"),
        ({"logits": None, "hidden": torch.zeros(20, 4)}, "go together"),
        ({"logits": None, "hidden": torch.zeros(20, 4), "weight": torch.zeros(9, 5)}, "hidden has shape"),
        ({"group_size": 3}, "does not divide"),
        ({"group_size": 2}, "split or incomplete"),
        ({"group_size": 8}, "split or incomplete"),
        ({"tau": 0.6}, "tau is 0.6"),
    ],
)
def test_wrong_arguments(change: dict[str, object], match: str) -> None:
    spans, logits, score, strict = some_spans()
    arguments: dict[str, object] = {"logits": logits} | change
    with pytest.raises(ValueError, match=match):
        ops.confidence_rewards(spans, score, strict, **arguments)


@pytest.mark.parametrize("variant", ["paper", "balanced"])
def test_confidence_changes_nothing_where_no_bin_has_two_rewards(variant: str) -> None:
    """One group of three lone rows, one whose two rows of a bin differ in confidence alone."""
    logp = torch.tensor([-0.1, -0.5, -0.9, -0.1, -1.5, -0.3])
    spans = Spans(
        *(torch.tensor(x) for x in ([0] * 6, [0] * 6, list(range(7)), [0] * 3 + [1] * 3, list(range(6))))
    )
    score = torch.tensor([0.15, 0.45, 0.95, 0.5, 0.5, 0.9])
    got = ops.confidence_rewards(spans, score, torch.zeros(6, dtype=torch.bool), logp=logp, variant=variant)
    assert float(got.metrics()["no_effect_share"]) == 0.5
    lifted = (got.parts["bonus"] > 0) & got.parts["is_bonus"]
    assert got.metrics()["bonus_share"] == lifted.float().mean() and lifted.any()
