"""linear_policy_loss of every kind: fp64 against policy_loss, cut completions, tokens without a result."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_core.policy_kinds import KINDS
from tests.budget import assert_equal_but_for_roundings

VOCAB, SIZE, TOKENS = 20, 5, 11
ONE_ROW = 1  # bytes of scratch: a tile of one row
IMPLS = ["reference", "native"]
Batch = dict[str, Any]


def batch(seed: int = 0) -> Batch:
    """Four completions of 3, 0, 5 and 3 tokens in fp64, ratios on both sides of every clip."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    b = {
        "hidden": randn(TOKENS, SIZE),
        "weight": randn(VOCAB, SIZE) / 2,
        "bias": randn(VOCAB),
        "targets": torch.randint(0, VOCAB, (TOKENS,), generator=g),
        "advantage": torch.tensor([1.0, -0.5, 0.3, -1.2], dtype=torch.float64),
        "offsets": torch.tensor([0, 3, 3, 8, 11]),
    }
    logp = rc.linear_token_stats(
        b["hidden"], b["weight"], b["targets"], bias=b["bias"], impl="reference"
    ).logp
    assert logp is not None
    shift = torch.tensor([0.0, 0.0, 0.2, 0.9])[torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3, 3, 3])]
    return b | {"logp_old": logp - shift + randn(TOKENS) / 2, "logp_ref": logp + randn(TOKENS) / 2}


def options(kind: str, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "num_tokens": TOKENS, "num_sequences": 4, "max_length": 6, "kl": 0.1} | more


def in_two_steps(b: Batch, **kw: Any) -> rc.PolicyLoss:
    """The same by the definition: statistics, then the loss."""
    stats = rc.linear_token_stats(b["hidden"], b["weight"], b["targets"], bias=b["bias"], impl="reference")
    assert stats.logp is not None
    return rc.policy_loss(
        stats.logp, b["logp_old"], b["advantage"], b["offsets"], logp_ref=b["logp_ref"], **kw
    )


def fused(b: Batch, **kw: Any) -> rc.PolicyLoss:
    return rc.linear_policy_loss(**b, **kw)


def with_gradients(run: Any, b: Batch, **kw: Any) -> tuple[rc.PolicyLoss, list[Tensor]]:
    leaves = {n: b[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
    result = run(b | leaves, **kw)
    (result.loss * 0.5).backward()
    return result, [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


def same(got: tuple[rc.PolicyLoss, list[Tensor]], want: tuple[rc.PolicyLoss, list[Tensor]]) -> None:
    assert got[0].metrics.keys() == want[0].metrics.keys()
    for name, value in (want[0].metrics | {"loss": want[0].loss.detach()}).items():
        own = got[0].loss.detach() if name == "loss" else got[0].metrics[name]
        assert_equal_but_for_roundings(own, value, name=name)
    assert len(got[1]) == 3
    for name, grad, other in zip(("hidden", "weight", "bias"), got[1], want[1], strict=True):
        assert_equal_but_for_roundings(grad, other, name=f"gradient of {name}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [ONE_ROW, 700, None])
@pytest.mark.parametrize("known", [True, False])
def test_fp64_is_the_definition(impl: str, kind: str, memory: int | None, known: bool) -> None:
    """Loss, metrics and gradients, on-policy too; a completion may lie in several tiles."""
    b = batch() if known else batch() | {"logp_old": None}
    same(
        with_gradients(fused, b, impl=impl, memory=memory, **options(kind)),
        with_gradients(in_two_steps, b, **options(kind)),
    )


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("memory", [ONE_ROW, None])
def test_dual_clip(kind: str, memory: int | None) -> None:
    b, kw = batch(), options(kind, dual_clip=1.5)
    got = with_gradients(fused, b, memory=memory, **kw)
    same(got, with_gradients(in_two_steps, b, **kw))
    assert got[0].metrics["clip_dual"] > 0


class _Again(torch.autograd.Function):
    """linear_policy_loss, made anew for each backward pass: gradcheck asks for several."""

    @staticmethod
    def forward(ctx: Any, b: Batch, kw: dict[str, Any], *leaves: Tensor) -> Tensor:
        names = ("hidden", "weight", "bias")
        with torch.enable_grad():
            own = [x.detach().requires_grad_() for x in leaves]
            loss = fused(b | dict(zip(names, own, strict=True)), **kw).loss
            ctx.save_for_backward(*torch.autograd.grad(loss, own))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return None, None, *(upstream * g for g in ctx.saved_tensors)


# What cispo holds constant moves with logp: its gradient is not the slope of its value.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cispo"])
def test_gradcheck(kind: str) -> None:
    b = batch(seed=1)
    leaves = [b[n].requires_grad_() for n in ("hidden", "weight", "bias")]
    kw = options(kind, memory=ONE_ROW)
    assert torch.autograd.gradcheck(lambda *x: _Again.apply(b, kw, *x), leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
@pytest.mark.parametrize("known", [True, False])
def test_one_pass_more_for_gspo_off_policy_and_for_nothing_else(
    kind: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package's attribute of that name is the function.
    module = import_module("raise_core.linear_policy_loss")
    passes, real = [], module.run_linear_stats
    monkeypatch.setattr(module, "run_linear_stats", lambda *a: passes.append(1) or real(*a))
    with_gradients(fused, batch() if known else batch() | {"logp_old": None}, **options(kind))
    assert len(passes) == (kind == "gspo" and known)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_gradient_to_make(impl: str) -> None:
    b, kw = batch(), options("gspo")
    got = fused(b, impl=impl, **kw)
    assert not got.loss.requires_grad
    assert_equal_but_for_roundings(got.loss, in_two_steps(b, **kw).loss, name="loss")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("memory", [ONE_ROW, None])
def test_a_token_without_a_result_costs_gspo_its_completion(impl: str, memory: int | None) -> None:
    """NaN loss; the gradient is that of the completions without such a token."""
    b = batch()
    b["targets"][4] = -100
    got, made = with_gradients(fused, b, impl=impl, memory=memory, **options("gspo"))
    assert got.loss.isnan() and got.logp is not None and got.logp.isnan().nonzero()[:, 0].tolist() == [4]
    keep = torch.tensor([0, 1, 2, 8, 9, 10])
    clean = batch() | {n: batch()[n][keep] for n in ("hidden", "targets", "logp_old", "logp_ref")}
    clean["offsets"] = torch.tensor([0, 3, 3, 3, 6])
    _, expected = with_gradients(fused, clean, impl=impl, **options("gspo"))
    assert (made[0][3:8] == 0).all()
    for name, grad, want in zip(
        ("hidden", "weight", "bias"), (made[0][keep], *made[1:]), expected, strict=True
    ):
        assert_equal_but_for_roundings(grad, want, name=name)
