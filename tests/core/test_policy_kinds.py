"""gspo, cispo, sapo and the dual clip against a token-by-token fp64 loop; where each KL estimator pulls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raise_core.policy_kinds import CLIPPED, KINDS, Objective
from raise_core.policy_loss import policy_loss, policy_step
from tests.budget import (
    assert_as_exact_as_a_double,
    assert_equal_but_for_roundings,
    assert_within_error_budget,
    no_better_than,
    sum_slack,
)

LOW, HIGH = 0.2, 0.3
MAX_LENGTH = 16
# kind, dual_clip, max_ratio
CASES = [
    ("gspo", None, 5.0), ("gspo", 1.1, 5.0), ("cispo", None, 5.0), ("cispo", None, 0.9), ("sapo", None, 5.0),
    ("grpo", 1.5, 5.0), ("dapo", 1.1, 5.0), ("dr_grpo", 3.0, 5.0),
]  # fmt: skip
BY_TOKENS = ("dapo", "cispo")
Batch = dict[str, Tensor]


def step(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """A random step: completions of the given lengths."""
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    logp_old = -torch.rand(tokens, generator=g) * 3
    return {
        "logp": (logp_old + 0.5 * torch.randn(tokens, generator=g)).to(dtype),
        "logp_old": logp_old.to(dtype),
        "advantage": torch.randn(len(lengths), generator=g).to(dtype),
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
    }


def counts(lengths: list[int]) -> dict[str, int]:
    return {"num_tokens": sum(lengths), "num_sequences": len(lengths), "max_length": MAX_LENGTH}


def numbers(kind: str, dual: float | None, bound: float) -> dict[str, Any]:
    return {"kind": kind, "eps_low": LOW, "eps_high": HIGH, "dual_clip": dual, "max_ratio": bound}


def of_a_token(
    kind: str, logp: float, ratio: float, a: float, dual: float | None, bound: float
) -> tuple[float, float]:
    """The loss of a token by the papers, and its slope in log ratio (in logp for cispo)."""
    if kind == "cispo":
        weight = min(ratio, bound)
        return -weight * a * logp, -weight * a
    if kind == "sapo":
        tau = 1.0 if a > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * ratio * a
    loss = -min(ratio * a, min(max(ratio, 1 - LOW), 1 + HIGH) * a)
    free = not (a > 0 and ratio > 1 + HIGH) and not (a < 0 and ratio < 1 - LOW)
    if dual is not None and a < 0 and loss > -dual * a:
        return -dual * a, 0.0
    return loss, -ratio * a if free else 0.0


def loop(b: Batch, kind: str, dual: float | None, bound: float) -> tuple[dict[str, float], list[float]]:
    """Loss with its metrics, and the gradient, one token at a time."""
    bounds, tokens, sequences = b["offsets"].tolist(), len(b["logp"]), len(b["advantage"])
    logps, olds = b["logp"].tolist(), b["logp_old"].tolist()
    loss, slopes, ratios, cuts = 0.0, [], [], {"clip_low": 0, "clip_high": 0, "clip_dual": 0}
    for s, a in enumerate(b["advantage"].tolist()):
        own = range(bounds[s], bounds[s + 1])
        mean = math.exp(sum(logps[t] - olds[t] for t in own) / max(len(own), 1))
        for t in own:
            ratio = mean if kind == "gspo" else math.exp(logps[t] - olds[t])
            norm = {"dr_grpo": sequences * MAX_LENGTH} | dict.fromkeys(BY_TOKENS, tokens)
            share = 1 / norm.get(kind, len(own) * sequences)
            value, slope = of_a_token(kind, logps[t], ratio, a, dual, bound)
            loss, slopes, ratios = loss + share * value, [*slopes, share * slope], [*ratios, ratio]
            if kind == "cispo":
                cuts["clip_high"] += ratio > bound
            elif kind != "sapo":
                cuts["clip_low"] += ratio < 1 - LOW and a < 0
                cuts["clip_high"] += ratio > 1 + HIGH and a > 0
                cuts["clip_dual"] += dual is not None and ratio > dual and a < 0
    found = {name: n / max(tokens, 1) for name, n in cuts.items() if name != "clip_dual" or dual is not None}
    mean_ratio = sum(ratios) / max(tokens, 1)
    return {"loss": loss, "ratio_mean": mean_ratio, "ratio_max": max(ratios, default=0.0)} | found, slopes


def padded(b: Batch, kind: str, dual: float | None, bound: float) -> Tensor:
    """The loss as trainers write it, on padded [S, L] tensors in the dtype of the batch."""
    rows = b["offsets"].diff().tolist()
    logp, old = (
        torch.nn.utils.rnn.pad_sequence(b[k].split(rows), batch_first=True) for k in ("logp", "logp_old")
    )
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=logp.dtype) for n in rows], batch_first=True)
    a, length = b["advantage"][:, None], mask.sum(1, keepdim=True).clamp(min=1)
    ratio = (logp - old).exp()
    if kind == "gspo":
        ratio = (((logp - old) * mask).sum(1, keepdim=True) / length).exp()
    if kind == "cispo":
        losses = -ratio.clamp(max=bound) * a * logp
    elif kind == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05)
        losses = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * a
    else:
        losses = -torch.min(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)
        if dual is not None:
            losses = torch.where(a < 0, torch.min(losses, -dual * a), losses)
    losses = losses * mask
    if kind in BY_TOKENS:
        return losses.sum() / mask.sum().clamp(min=1)
    if kind == "dr_grpo":
        return losses.sum() / (len(rows) * MAX_LENGTH)
    return (losses.sum(1) / length[:, 0]).mean()


@pytest.mark.parametrize(("kind", "dual", "bound"), CASES)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_agrees_with_the_loop(
    kind: Any, dual: float | None, bound: float, lengths: list[int], seed: int
) -> None:
    """Loss, metrics and gradient, in fp64."""
    b = step(lengths, seed)
    oracle, slopes = loop(b, kind, dual, bound)
    leaf = b["logp"].clone().requires_grad_()
    out = policy_loss(**(b | {"logp": leaf}), **numbers(kind, dual, bound), **counts(lengths))
    found = out.metrics | {"loss": out.loss}
    assert found.keys() == oracle.keys()
    for name, want in oracle.items():
        assert_equal_but_for_roundings(found[name], torch.tensor(want, dtype=torch.float64), name=name)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert_equal_but_for_roundings(grad, torch.tensor(slopes, dtype=torch.float64), name="gradient")


@pytest.mark.parametrize(("kind", "dual", "bound"), CASES)
def test_fp32_is_as_exact_as_the_padded_loss(kind: Any, dual: float | None, bound: float) -> None:
    lengths, exact, single, peers = [3, 0, 6, 1, 4], [], [], []
    for seed in range(256):
        b = step(lengths, seed, torch.float32)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in b.items()}
        exact.append(loop(wide, kind, dual, bound)[0]["loss"])
        single.append(policy_loss(**b, **numbers(kind, dual, bound), **counts(lengths)).loss)
        peers.append(padded(b, kind, dual, bound))
    assert single[0].dtype == torch.float32
    wanted = torch.tensor(exact, dtype=torch.float64)
    # One L for all tokens of a completion: each is divided before they are added, with the same rounding.
    floor = sum_slack(max(lengths)) if kind == "gspo" else 0.0
    peer = no_better_than(torch.stack(peers), wanted, floor)
    assert_within_error_budget(torch.stack(single), wanted, peer, name=f"{kind} fp32")


def test_by_hand() -> None:
    """Ratios 2 and 1/2, whose mean in logs is 1; and e^2 and 1, whose mean is e."""
    zeros, offsets, a = torch.zeros(2, dtype=torch.float64), torch.tensor([0, 2]), torch.ones(1).double()
    both = torch.tensor([math.log(2), -math.log(2)], dtype=torch.float64)

    def loss(logp: Tensor, kind: Any, sign: float = 1.0, **options: Any) -> float:
        return policy_loss(
            logp, zeros, sign * a, offsets, kind=kind, num_tokens=2, num_sequences=1, **options
        ).loss.item()

    assert_as_exact_as_a_double(loss(both, "gspo"), -1.0, name="gspo")
    far = torch.tensor([2.0, 0.0], dtype=torch.float64)
    assert_as_exact_as_a_double(loss(far, "gspo"), -1.2, name="gspo clipped")
    assert_as_exact_as_a_double(loss(far, "gspo", -1.0), math.e, name="gspo, A < 0")
    assert_as_exact_as_a_double(loss(far, "gspo", -1.0, dual_clip=2.0), 2.0, name="gspo, dual clip")
    # -(2 log 2 - log 2 / 2) / 2, and with the bound in place of 2
    assert_as_exact_as_a_double(loss(both, "cispo"), -0.75 * math.log(2), name="cispo")
    assert_as_exact_as_a_double(loss(both, "cispo", max_ratio=1.5), -0.5 * math.log(2), name="cispo bound")
    gates = 1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(0.5))
    assert_as_exact_as_a_double(loss(both, "sapo"), -2 * gates, name="sapo")
    assert_as_exact_as_a_double(loss(zeros, "sapo", -1.0), 2 / 1.05, name="sapo, A < 0")
    # ratios 2 and 1/2 with A = -1: 2 by way of the clip's other side, cut to 1.5; 1/2 is clipped to 0.8
    assert_as_exact_as_a_double(loss(both, "dapo", -1.0, dual_clip=1.5), (1.5 + 0.8) / 2, name="dual clip")


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_every_kind_has_the_gradient_of_reinforce(kind: Any) -> None:
    """Without logp_old: -A over the normaliser, the same bits as with the policy's own log-probabilities."""
    lengths = [2, 4]
    b = step(lengths)
    grads = []
    for old in (None, b["logp"]):
        leaf = b["logp"].clone().requires_grad_()
        out = policy_loss(leaf, old, b["advantage"], b["offsets"], kind=kind, **counts(lengths))
        out.loss.backward()
        assert leaf.grad is not None and out.metrics["ratio_mean"] == out.metrics["ratio_max"] == 1
        assert out.metrics["clip_low"] == out.metrics["clip_high"] == 0
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    norm = {"dr_grpo": [32.0] * 6} | dict.fromkeys(BY_TOKENS, [6.0] * 6)
    divisor = torch.tensor(norm.get(kind, [4.0] * 2 + [8.0] * 4), dtype=torch.float64)
    want = -b["advantage"].repeat_interleave(torch.tensor(lengths)) / divisor
    assert_equal_but_for_roundings(grads[0], want, name=kind)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_an_estimator_pulls_towards(estimator: Any) -> None:
    """Its gradient's mean over a policy's tokens: 0, that of KL(policy || ref), that of KL(ref || policy)."""
    g = torch.Generator().manual_seed(0)
    z, ref = torch.randn(2, 7, generator=g, dtype=torch.float64)
    z.requires_grad_()
    logp, logp_ref = z.log_softmax(0), ref.log_softmax(0)
    leaf = logp.detach().requires_grad_()
    out = policy_loss(
        leaf, None, torch.zeros(7), torch.arange(8), kind="dapo", num_tokens=1, num_sequences=1,
        logp_ref=logp_ref, kl=1.0, kl_estimator=estimator,
    )  # fmt: skip
    (slope,) = torch.autograd.grad(out.loss, leaf)
    (mean,) = torch.autograd.grad((logp.detach().exp() * slope * logp).sum(), z, retain_graph=True)
    divergence = {
        "k1": 0.0 * z.sum(),
        "k2": (logp.exp() * (logp - logp_ref)).sum(),
        "k3": (logp_ref.exp() * (logp_ref - logp)).sum(),
    }[estimator]
    assert_equal_but_for_roundings(mean, torch.autograd.grad(divergence, z)[0], name=estimator)


@pytest.mark.parametrize("kind", ["cispo", "sapo"])
def test_a_dual_clip_is_refused_where_the_weight_is_bounded(kind: Any) -> None:
    b = step([3, 2])
    with pytest.raises(
        ValueError, match=f"dual_clip: got 3.0 with kind '{kind}', which bounds .* or kind 'grpo'"
    ):
        policy_loss(**b, kind=kind, dual_clip=3.0, **counts([3, 2]))
    for allowed in CLIPPED:
        assert "clip_dual" in policy_loss(**b, kind=allowed, dual_clip=3.0, **counts([3, 2])).metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dual_clip": 1.0}, "dual_clip: got 1.0, wanted a ratio above 1"),
        ({"dual_clip": math.nan}, "dual_clip: got nan, wanted a ratio above 1"),
        ({"dual_clip": math.inf}, "dual_clip: got inf, wanted a ratio above 1"),
        ({"max_ratio": 0.0}, "max_ratio: got 0.0, wanted a finite number above 0"),
        ({"max_ratio": math.inf}, "max_ratio: got inf, wanted a finite number above 0"),
        ({"tau_pos": -1.0}, "tau_pos: got -1.0, wanted a finite number above 0"),
        ({"tau_neg": math.nan}, "tau_neg: got nan, wanted a finite number above 0"),
    ],
)
def test_refuses(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(**step([3, 2]), **counts([3, 2]), **change)


def test_a_token_of_probability_0_costs_gspo_its_completion_alone() -> None:
    """A log ratio of -inf: a ratio at the clamp, gradient 0; the other completion as without it."""
    b = step([3, 2])
    b["logp"][1] = -math.inf
    leaf = b["logp"].clone().requires_grad_()
    out = policy_loss(**(b | {"logp": leaf}), kind="gspo", **counts([3, 2]))
    out.loss.backward()
    assert out.loss.isfinite() and leaf.grad is not None and leaf.grad[:3].tolist() == [0, 0, 0]
    clean = step([3, 2])["logp"].requires_grad_()
    policy_loss(**(b | {"logp": clean}), kind="gspo", **counts([3, 2])).loss.backward()
    assert clean.grad is not None and torch.equal(leaf.grad[3:], clean.grad[3:]) and clean.grad[3] != 0


class _OnTheDevice(Tensor):
    """A CPU tensor that counts as one whose values the host cannot read for free."""


@pytest.mark.parametrize(("bounds", "lost"), [([0, 2, 3], True), ([0, 2, 9], False)])
def test_bounds_that_only_the_device_knows_are_never_read_beyond(bounds: list[int], lost: bool) -> None:
    offsets = torch.tensor(bounds).as_subclass(_OnTheDevice)
    logp, old, advantage = torch.zeros(4), torch.full((4,), -0.1), torch.ones(2)
    out = policy_loss(logp, old, advantage, offsets, kind="gspo", num_tokens=4, num_sequences=2)
    assert out.loss.isnan() == lost
    how = Objective(
        kind="gspo", eps_low=LOW, eps_high=HIGH, dual_clip=None, max_ratio=5.0, tau_pos=1.0, tau_neg=1.05,
        kl=0.0, kl_estimator="k3", max_length=None,
    )  # fmt: skip
    read = policy_step(how, logp, advantage, offsets, 4, 2, None).bounds
    assert read.tolist() == [min(bound, 4) for bound in bounds]
