"""linear_policy_loss: the loss, metrics and gradients of policy_loss of linear_token_stats, tile by tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from tests.budget import HALF_ULP, assert_exact, assert_within_error_budget

IMPLS = ["reference", "native", "triton"]
every_impl = pytest.mark.parametrize("impl", IMPLS)
VOCAB, SIZE = 90, 12
ONE_ROW = 1  # bytes of scratch: a tile of one row
Batch = dict[str, Any]


def batch(dtype: torch.dtype = torch.float32) -> Batch:
    """Four completions, one of them empty, of 13 tokens on rows of hidden states that stand apart."""
    hidden, weight, bias = torch.randn(4, 6, SIZE), torch.randn(VOCAB, SIZE) / 2, torch.randn(VOCAB)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": bias.to(dtype),
        "targets": torch.randint(0, 80, (13,)),
        "rows": torch.tensor([0, 1, 2, 3, 7, 8, 9, 9, 18, 19, 20, 21, 22]),
        "logp_old": -4.4 + 0.5 * torch.randn(13),
        "logp_ref": -4.4 + 0.5 * torch.randn(13),
        "advantage": torch.tensor([1.0, -0.5, 0.3, -1.2]),
        "offsets": torch.tensor([0, 4, 4, 8, 13]),
        "temperature": 3.0,
        "softcap": 20.0,
        "valid_vocab": 80,
    }


def options(kind: str, kl: float = 0.1) -> dict[str, Any]:
    return {"kind": kind, "num_tokens": 13, "num_sequences": 4, "max_length": 6, "kl": kl, "eps_high": 0.3}


def in_two_steps(b: Batch, **kw: Any) -> rc.PolicyLoss:
    """The same by the reference: statistics, then the loss."""
    names = ("bias", "rows", "temperature", "softcap", "valid_vocab")
    stats = rc.linear_token_stats(
        b["hidden"], b["weight"], b["targets"], **{n: b[n] for n in names}, impl="reference"
    )
    assert stats.logp is not None
    old = stats.logp.detach() if b["logp_old"] is None else b["logp_old"]
    return rc.policy_loss(stats.logp, old, b["advantage"], b["offsets"], logp_ref=b["logp_ref"], **kw)


def with_gradients(run: Any, b: Batch, **kw: Any) -> tuple[rc.PolicyLoss, list[Tensor]]:
    leaves = {n: b[n].detach().clone().requires_grad_() for n in ("hidden", "weight", "bias")}
    result = run({**b, **leaves}, **kw)
    (result.loss * 0.5).backward()
    return result, [leaf.grad for leaf in leaves.values()]


def fused(b: Batch, **kw: Any) -> rc.PolicyLoss:
    return rc.linear_policy_loss(**b, **kw)


def widened(b: Batch) -> Batch:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in b.items()}


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo"])
@pytest.mark.parametrize("memory", [ONE_ROW, None])
def test_loss_metrics_and_gradients(impl: str, dtype: torch.dtype, kind: str, memory: int | None) -> None:
    b = batch(dtype)
    kw = options(kind)
    oracle, exact = with_gradients(in_two_steps, widened(b), **kw)
    peer, rounded = with_gradients(in_two_steps, b, **kw)
    got, made = with_gradients(fused, b, impl=impl, memory=memory, accumulate_fp32=True, **kw)
    half_ulp = torch.finfo(torch.float32).eps / 2
    assert_within_error_budget(
        got.loss.detach(), oracle.loss.detach(), peer.loss.detach() + half_ulp, name="loss"
    )
    assert got.metrics.keys() == oracle.metrics.keys()
    for name, value in got.metrics.items():
        other = peer.metrics[name] + 2 * half_ulp * oracle.metrics[name].float().abs().clamp(min=1)
        assert_within_error_budget(value, oracle.metrics[name], other, name=name)
    assert got.logp is not None and not got.logp.requires_grad
    for name, grad, want, other in zip(("hidden", "weight", "bias"), made, exact, rounded, strict=True):
        assert grad.dtype == dtype
        # dz is rounded to the dtype of the operands, and the gradient once more by the factor from above
        shifted = other + torch.finfo(dtype).eps / 2 * want.abs().max().to(dtype)
        further = torch.where((other - want).abs() > (shifted - want).abs(), other, shifted)
        assert_within_error_budget(grad, want, further, name=f"{impl} gradient of {name}")


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_a_16_bit_weight_gradient_rounds_once_a_tile_or_once_in_all(impl: str) -> None:
    b = batch(torch.bfloat16)
    kw = {**options("dapo"), "impl": impl}
    _, exact = with_gradients(in_two_steps, widened(b), **options("dapo"))
    whole = with_gradients(fused, b, **kw)[1][1]
    wide = with_gradients(fused, b, memory=ONE_ROW, accumulate_fp32=True, **kw)[1][1]
    narrow = with_gradients(fused, b, memory=ONE_ROW, **kw)[1][1]
    far = [(x.double() - exact[1]).abs().max() for x in (whole, wide, narrow)]
    assert far[1] <= 2 * far[0] and far[2] <= 13 * far[0]
    assert not torch.equal(narrow, wide)


@every_impl
def test_the_own_log_probabilities_are_the_old_ones_on_policy(impl: str) -> None:
    b = {**batch(), "logp_old": None}
    got, made = with_gradients(fused, b, impl=impl, **options("grpo"))
    want, expected = with_gradients(in_two_steps, b, **options("grpo"))
    assert got.metrics["ratio_mean"] == 1 and got.metrics["clip_high"] == 0
    eps = torch.finfo(torch.float32).eps
    for grad, other in zip(made, expected, strict=True):
        assert_within_error_budget(grad, other.double(), other + eps * other.abs().max(), name="gradient")
    assert want.metrics["ratio_max"] == got.metrics["ratio_max"] == 1


@every_impl
def test_without_a_gradient_to_make(impl: str) -> None:
    b = batch()
    with_one, _ = with_gradients(fused, b, impl=impl, **options("grpo"))
    for got in (fused(b, impl=impl, **options("grpo")),):
        assert not got.loss.requires_grad
        spare = torch.finfo(torch.float32).eps * with_one.loss.detach().abs().clamp(min=1)
        oracle = with_one.loss.detach().double()
        assert_within_error_budget(got.loss, oracle, with_one.loss.detach() + spare, name="loss")


@every_impl
@pytest.mark.parametrize(("b", "length"), [(3, 3), (2, 5), (5, 2)])
def test_a_batch_of_rows_is_its_tokens_one_after_another(impl: str, b: int, length: int) -> None:
    """[B, L] hidden states and targets: the bits of [B * L], with a gradient and without."""
    count = b * length
    hidden, weight = torch.randn(b, length, SIZE), torch.randn(VOCAB, SIZE) / 2
    targets = torch.randint(0, VOCAB, (b, length))
    kw: dict[str, Any] = {"num_tokens": count, "num_sequences": b, "impl": impl}
    given = (-4.4 + torch.randn(count), torch.linspace(-1, 1, b), torch.arange(b + 1) * length)
    flat = rc.linear_policy_loss(hidden.view(count, SIZE), weight, targets.view(-1), *given, **kw)
    assert flat.logp is not None
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    made = rc.linear_policy_loss(h, w, targets, *given, **kw)
    with torch.no_grad():
        without = rc.linear_policy_loss(h, w, targets, *given, **kw)
    for name, got in (("gradient", made), ("no_grad", without)):
        assert got.logp is not None and got.logp.shape == (count,)
        assert_exact(got.metrics["ratio_max"], flat.metrics["ratio_max"], name=f"{name}: ratio_max")
        assert_within_error_budget(
            got.loss.detach(), flat.loss.double(), flat.loss + HALF_ULP, name=f"{name}: loss"
        )
    made.loss.backward()
    far, wide = hidden.view(count, SIZE).clone().requires_grad_(), weight.clone().requires_grad_()
    rc.linear_policy_loss(far, wide, targets.view(-1), *given, **kw).loss.backward()
    assert far.grad is not None and h.grad is not None and w.grad is not None and wide.grad is not None
    assert_exact(h.grad.view(count, SIZE), far.grad, name="gradient of hidden")
    assert_exact(w.grad, wide.grad, name="gradient of weight")


@every_impl
def test_a_token_without_a_result_makes_the_loss_nan_and_no_gradient(impl: str) -> None:
    b = batch()
    b["targets"][3], b["rows"][5] = -100, 99
    clean = batch()
    keep = torch.tensor([0, 1, 2, 4, 6, 7, 8, 9, 10, 11, 12])
    got, made = with_gradients(fused, b, impl=impl, **options("dapo"))
    assert got.loss.isnan() and got.logp is not None
    assert got.logp.isnan().nonzero()[:, 0].tolist() == [3, 5]
    for name in ("targets", "rows", "logp_old", "logp_ref"):
        clean[name] = b[name][keep]
    for name in ("hidden", "weight", "bias"):
        clean[name] = b[name]
    clean["offsets"] = torch.tensor([0, 3, 3, 6, 11])
    _, expected = with_gradients(fused, clean, impl=impl, **options("dapo"))
    eps = torch.finfo(torch.float32).eps
    for grad, other in zip(made, expected, strict=True):
        assert_within_error_budget(grad, other.double(), other + eps * other.abs().max(), name="gradient")


@every_impl
def test_no_tokens(impl: str) -> None:
    b = batch()
    for name in ("targets", "rows", "logp_old", "logp_ref"):
        b[name] = b[name][:0]
    b["offsets"] = torch.zeros(5, dtype=torch.long)
    got, made = with_gradients(fused, b, impl=impl, **options("grpo"))
    assert got.loss == 0 and got.metrics["ratio_max"] == 0
    assert all((g == 0).all() for g in made)


def test_differentiated_twice_is_refused() -> None:
    b = batch()
    b["weight"].requires_grad_()
    loss = fused(b, **options("grpo")).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def test_only_what_needs_a_gradient_gets_one_and_inputs_are_unwritten() -> None:
    b = batch()
    b["weight"].requires_grad_()
    before = {n: x.detach().clone() for n, x in b.items() if isinstance(x, Tensor)}
    fused(b, memory=ONE_ROW, **options("grpo")).loss.backward()
    assert b["weight"].grad is not None and b["hidden"].grad is None
    for name, kept in before.items():
        assert_exact(b[name].detach(), kept, name=name)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"logp_old": torch.zeros(3)}, "logp_old"),
        ({"advantage": torch.zeros(3)}, "advantage"),
        ({"kl": 0.1, "logp_ref": None}, "kl"),
        ({"memory": 0}, "memory is 0"),
        ({"weight": torch.zeros(5, 3)}, "hidden has shape"),
        ({"kind": "bnpo"}, "kind"),
        ({"kind": "sapo", "dual_clip": 3.0}, "dual_clip: got 3.0 with kind 'sapo'"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rc.linear_policy_loss(**{**batch(), **options("grpo"), **change})


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("memory", [ONE_ROW, None])
def test_a_nan_hidden_state_reaches_no_gradient(impl: str, memory: int | None) -> None:
    b = batch()
    b["hidden"][0, 2, 3] = float("nan")
    got, made = with_gradients(fused, b, impl=impl, memory=memory, **options("dapo"))
    assert got.loss.isnan() and got.logp is not None and got.logp.isnan().sum() == 1
    assert all(g.isfinite().all() for g in made)
    assert (made[0][0, 2] == 0).all() and (made[1] != 0).any()


# The compiler reads .grad of a non-leaf tensor itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_a_compiled_graph_ends_before_it_and_goes_on_after_it(impl: str) -> None:
    """Two graphs around one call, with the bits of the uncompiled code."""
    torch._dynamo.reset()
    y, old, advantage = torch.randint(0, 30, (6,)), -torch.rand(6), torch.tensor([1.0, -1.0])

    def loss(h: Tensor, w: Tensor) -> Tensor:
        made = rc.linear_policy_loss(
            h * 2, w, y, old, advantage, torch.tensor([0, 2, 6]), num_tokens=6, num_sequences=2, impl=impl
        )
        assert made.logp is not None
        return made.loss * 3 + made.logp.mean()

    graphs: list[object] = []

    def kept(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    inputs, results = (torch.randn(6, 8), torch.randn(30, 8)), []
    for run in (loss, torch.compile(loss, backend=kept)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = run(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert len(graphs) == 2
    for name, was, now in zip(("loss", "hidden", "weight"), *results, strict=True):
        assert_exact(now, was, name=name)
