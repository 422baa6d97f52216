"""Policy losses against a token-by-token fp64 loop; micro-batches, gradients, degenerate completions.

The loop of gspo, cispo, sapo and the dual clip is in test_policy_kinds.py.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from raise_core.policy_kinds import KINDS, MAX_LOG_RATIO
from raise_core.policy_loss import pack, policy_loss
from tests.budget import assert_exact, assert_within_error_budget

BY_TOKEN = ("grpo", "dapo", "dr_grpo")
MAX_LENGTH = 16


def step(lengths: list[int], seed: int = 0, spread: float = 0.5) -> dict[str, Tensor]:
    """A random step: completions of the given lengths, fp64."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    logp_old = -torch.rand(tokens, generator=generator, dtype=torch.float64) * 3
    return {
        "logp": logp_old + spread * torch.randn(tokens, generator=generator, dtype=torch.float64),
        "logp_old": logp_old,
        "logp_ref": logp_old + spread * torch.randn(tokens, generator=generator, dtype=torch.float64),
        "advantage": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
    }


def counts(lengths: list[int]) -> dict[str, int]:
    return {"num_tokens": sum(lengths), "num_sequences": len(lengths), "max_length": MAX_LENGTH}


def loop(
    batch: dict[str, Tensor], kind: str, kl: float, estimator: str, low: float, high: float
) -> dict[str, float]:
    """The formulas of the papers, one token at a time."""
    offsets = batch["offsets"].tolist()
    sequences, total, below, above, ratios, divergence = [], 0.0, 0, 0, [], 0.0
    for s, a in enumerate(batch["advantage"].tolist()):
        losses = []
        for t in range(offsets[s], offsets[s + 1]):
            d = float(batch["logp"][t] - batch["logp_ref"][t])
            ratio = math.exp(float(batch["logp"][t] - batch["logp_old"][t]))
            clipped = min(max(ratio, 1 - low), 1 + high)
            penalty = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}[estimator]
            losses.append(-min(ratio * a, clipped * a) + kl * penalty)
            below, above = below + (ratio < 1 - low and a < 0), above + (ratio > 1 + high and a > 0)
            ratios, divergence = [*ratios, ratio], divergence + penalty
        total += sum(losses)
        sequences.append(sum(losses) / len(losses) if losses else 0.0)
    tokens = max(len(ratios), 1)
    return {
        "loss": {
            "grpo": sum(sequences) / len(sequences),
            "dapo": total / tokens,
            "dr_grpo": total / (len(sequences) * MAX_LENGTH),
        }[kind],
        "clip_low": below / tokens,
        "clip_high": above / tokens,
        "ratio_mean": sum(ratios) / tokens,
        "ratio_max": max(ratios, default=0.0),
        "kl": divergence / tokens,
    }


LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=6)


def padded(batch: dict[str, Tensor], kind: str, kl: float, estimator: str, low: float, high: float) -> Tensor:
    """The loss as trainers write it, on padded [S, L] tensors in the dtype of the batch."""
    rows = batch["offsets"].diff().tolist()
    logp, old, ref = (
        torch.nn.utils.rnn.pad_sequence(batch[k].split(rows), batch_first=True)
        for k in ("logp", "logp_old", "logp_ref")
    )
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=logp.dtype) for n in rows], batch_first=True)
    a, ratio, d = batch["advantage"][:, None], (logp - old).exp(), logp - ref
    penalty = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[estimator]
    losses = (-torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a) + kl * penalty) * mask
    if kind == "grpo":
        return (losses.sum(1) / mask.sum(1).clamp(min=1)).mean()
    return losses.sum() / (mask.sum().clamp(min=1) if kind == "dapo" else len(rows) * MAX_LENGTH)


@pytest.mark.parametrize("kind", BY_TOKEN)
@given(
    lengths=LENGTHS,
    seed=st.integers(0, 99),
    kl=st.sampled_from([0.0, 0.04]),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    eps=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, 3.0)]),
)
def test_agrees_with_the_loop(
    kind: str, lengths: list[int], seed: int, kl: float, estimator: str, eps: tuple[float, float]
) -> None:
    """fp64 against the loop; fp32 within the budget of the padded loss over 96 batches."""
    options = {"kl": kl, "kl_estimator": estimator, "eps_low": eps[0], "eps_high": eps[1], **counts(lengths)}
    exact, single, peers = [], [], []
    for batch in (cast(step(lengths, seed + n), torch.float32) for n in range(96)):
        out = policy_loss(**cast(batch, torch.float64), kind=kind, **options)
        oracle = loop(cast(batch, torch.float64), kind, kl, estimator, *eps)
        for name, value in oracle.items():
            wanted = torch.tensor(value, dtype=torch.float64)
            got = out.loss if name == "loss" else out.metrics[name]
            assert got.dtype == torch.float64
            assert_within_error_budget(got.float(), wanted, wanted.float(), name=name)
        exact.append(oracle["loss"])
        single.append(policy_loss(**batch, kind=kind, **options).loss)
        peers.append(padded(batch, kind, kl, estimator, *eps))
    assert single[0].dtype == torch.float32
    wanted = torch.tensor(exact, dtype=torch.float64)
    assert_within_error_budget(torch.stack(single), wanted, torch.stack(peers), name=f"{kind} fp32")


def cast(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_micro_batches_add_up_to_the_step(kind: str, parts: int) -> None:
    """Loss, gradient and metrics do not depend on how the step was cut; empty completions included."""
    lengths = [3, 0, 5, 1, 0, 0, 7, 2]
    batch, options = step(lengths), {"kind": kind, "kl": 0.1, **counts(lengths)}
    logp = batch["logp"].clone().requires_grad_()
    whole = policy_loss(**(batch | {"logp": logp}), **options)
    (wanted,) = torch.autograd.grad(whole.loss, logp)
    loss, metrics, gradients = torch.zeros((), dtype=torch.float64), [], []
    for completions in torch.arange(len(lengths)).chunk(parts):
        first, last = int(completions[0]), int(completions[-1]) + 1
        a, b = int(batch["offsets"][first]), int(batch["offsets"][last])
        piece = {name: batch[name][a:b] for name in ("logp", "logp_old", "logp_ref")}
        piece |= {
            "advantage": batch["advantage"][first:last],
            "offsets": batch["offsets"][first : last + 1] - a,
        }
        piece["logp"] = piece["logp"].clone().requires_grad_()
        out = policy_loss(**piece, **options)
        gradients.append(torch.autograd.grad(out.loss, piece["logp"])[0])
        loss = loss + out.loss.detach()
        metrics.append(out.metrics)
    assert_exact(torch.cat(gradients), wanted, name="gradient")
    oracle = whole.loss.detach()
    assert_within_error_budget(loss.float(), oracle, oracle.float(), name="loss")
    for name, value in whole.metrics.items():
        each = torch.stack([part[name] for part in metrics])
        together = each.max() if name == "ratio_max" else each.sum()
        assert_within_error_budget(together.float(), value, value.float(), name=name)


# What cispo holds constant moves with logp: its gradient, in test_policy_kinds.py, is not its slope.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cispo"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck(kind: str, estimator: str) -> None:
    lengths = [3, 0, 2]
    batch = step(lengths, seed=3)
    logp = batch.pop("logp").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, **batch, kind=kind, kl=0.3, kl_estimator=estimator, **counts(lengths)).loss,
        logp,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_gradient_is_reinforce(kind: str) -> None:
    """At ratio 1 the gradient is -A, up to each kind's normaliser."""
    lengths = [2, 4]
    batch = step(lengths)
    logp = batch["logp_old"].clone().requires_grad_()
    policy_loss(**(batch | {"logp": logp}), kind=kind, **counts(lengths)).loss.backward()
    a = batch["advantage"].repeat_interleave(torch.tensor(lengths))
    norm = {
        "grpo": torch.tensor([4.0] * 2 + [8.0] * 4),
        "dapo": torch.tensor(6.0),
        "dr_grpo": torch.tensor(32.0),
    }
    same = {"gspo": "grpo", "sapo": "grpo", "cispo": "dapo"}
    oracle = -a / norm[same.get(kind, kind)].double()
    assert_within_error_budget(logp.grad.float(), oracle, oracle.float(), name=kind)


@pytest.mark.parametrize(
    ("a", "log_ratio", "low", "high"),
    [(-1.0, -1.0, 1, 0), (1.0, 1.0, 0, 1), (1.0, -1.0, 0, 0), (-1.0, 1.0, 0, 0)],
)
def test_clipping_stops_the_gradient_on_one_side(a: float, log_ratio: float, low: int, high: int) -> None:
    logp = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    out = policy_loss(
        logp,
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([a]),
        torch.tensor([0, 1]),
        num_tokens=1,
        num_sequences=1,
    )
    out.loss.backward()
    assert (out.metrics["clip_low"].item(), out.metrics["clip_high"].item()) == (low, high)
    assert (logp.grad.item() == 0.0) == bool(low or high)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_without_differences_has_no_gradient(kind: str) -> None:
    lengths = [3, 2]
    batch = step(lengths) | {"advantage": torch.zeros(2)}
    batch["logp"] = (batch["logp_old"] + 200.0).requires_grad_()  # exp overflows: 0 * inf would be NaN
    out = policy_loss(**batch, kind=kind, **counts(lengths))
    out.loss.backward()
    # Adding 0 takes the sign from a zero.
    assert_exact(out.loss.detach() + 0.0, torch.zeros((), dtype=torch.float64), name="loss")
    assert_exact(batch["logp"].grad + 0.0, torch.zeros(5, dtype=torch.float64), name="gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [-1e4, -30.0, 30.0, 1e4])
@pytest.mark.parametrize("a", [-1.0, 1.0])
def test_far_off_tokens_stay_finite(kind: str, gap: float, a: float) -> None:
    logp = torch.full((2,), gap, requires_grad=True)
    zeros = torch.zeros(2)
    out = policy_loss(
        logp, zeros, torch.tensor([a]), torch.tensor([0, 2]), kind=kind, logp_ref=zeros, kl=0.1, **counts([2])
    )
    out.loss.backward()
    assert out.loss.isfinite() and logp.grad.isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())
    assert out.metrics["ratio_max"] <= math.exp(MAX_LOG_RATIO) * 1.001


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], []])
def test_nothing_to_score(kind: str, lengths: list[int]) -> None:
    batch = step(lengths)
    logp = batch["logp"].requires_grad_()
    out = policy_loss(**batch, kind=kind, kl=0.1, **counts(lengths))
    out.loss.backward()
    assert_exact(out.loss.detach(), torch.zeros((), dtype=torch.float64), name="loss")
    assert logp.grad.shape == (0,)
    assert all(value == 0 for value in out.metrics.values())


def test_only_logp_has_a_gradient() -> None:
    lengths = [3, 2]
    batch = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in step(lengths).items()}
    out = policy_loss(**batch, kl=0.1, **counts(lengths))
    out.loss.backward()
    assert batch["logp"].grad is not None
    assert all(batch[name].grad is None for name in ("logp_old", "logp_ref", "advantage"))
    assert not any(value.requires_grad for value in out.metrics.values())


def test_counts_may_be_tensors() -> None:
    lengths = [3, 2]
    batch = step(lengths)
    for kind in KINDS:
        number = policy_loss(**batch, kind=kind, **counts(lengths))
        tensors = counts(lengths) | {"num_tokens": torch.tensor(5), "num_sequences": torch.tensor(2)}
        assert_exact(policy_loss(**batch, kind=kind, **tensors).loss, number.loss, name=kind)
    empty = policy_loss(**step([]), num_tokens=torch.tensor(0), num_sequences=torch.tensor(0))
    assert empty.loss == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    """Fake tensors have no values: whatever read one on the host would raise."""
    with FakeTensorMode():
        tokens, offsets = torch.zeros(5, requires_grad=True), torch.zeros(4, dtype=torch.int64)
        options = {"kind": kind, "logp_ref": torch.zeros(5), "kl": 0.1, **counts([5, 0, 0])}
        out = policy_loss(tokens, torch.zeros(5), torch.zeros(3), offsets, **options)
        out.loss.backward()
    assert out.loss.shape == ()


def test_reported_kl_costs_nothing_and_needs_a_reference() -> None:
    lengths = [3, 2]
    batch = step(lengths)
    reported = policy_loss(**batch, **counts(lengths))
    assert "kl" in reported.metrics
    plain = policy_loss(**(batch | {"logp_ref": None}), **counts(lengths))
    assert "kl" not in plain.metrics
    assert_exact(plain.loss, reported.loss, name="loss at kl 0")


def test_low_precision_is_computed_in_fp32() -> None:
    lengths = [3, 2]
    batch = cast(step(lengths), torch.bfloat16)
    out = policy_loss(**batch, **counts(lengths))
    upcast = policy_loss(**cast(batch, torch.float32), **counts(lengths))
    assert_exact(out.loss, upcast.loss, name="bf16")


def test_inputs_are_not_written() -> None:
    lengths = [3, 0, 2]
    batch = step(lengths)
    copies = {name: value.clone() for name, value in batch.items()}
    policy_loss(**batch, kl=0.1, **counts(lengths))
    for name, value in copies.items():
        assert_exact(batch[name], value, name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "bnpo"}, "kind: got 'bnpo', wanted 'grpo', 'dapo', .*'cispo' or 'sapo'"),
        ({"kl_estimator": "k4"}, "kl_estimator: got 'k4'"),
        ({"kl": 0.1, "logp_ref": None}, "kl: got 0.1 without logp_ref"),
        ({"kl": -0.1}, "kl: got -0.1, wanted a finite weight"),
        ({"kl": float("nan")}, "kl: got nan, wanted a finite weight"),
        ({"kind": "dr_grpo", "max_length": None}, "max_length: got None"),
        ({"eps_low": 1.5}, "eps_low, eps_high: got 1.5"),
        ({"eps_high": -0.1}, "eps_low, eps_high: got 0.2, -0.1"),
        ({"eps_high": float("nan")}, "eps_low, eps_high: got 0.2, nan"),
        ({"num_tokens": -1}, "num_tokens: got -1"),
        ({"num_sequences": float("nan")}, "num_sequences: got nan"),
        ({"logp": torch.zeros(5, 1)}, r"logp: got torch.float32 of shape \[5, 1\].*pack\(x, mask\)"),
        ({"logp_old": torch.zeros(4)}, r"logp_old: got shape \[4\], wanted that of logp, \[5\]"),
        ({"logp_ref": torch.zeros(6)}, r"logp_ref: got shape \[6\]"),
        ({"advantage": torch.zeros(5)}, r"advantage: got shape \[5\], wanted one per completion, \[2\]"),
        ({"offsets": torch.zeros(3)}, r"offsets: got torch.float32 of shape \[3\]"),
        (
            {"offsets": torch.zeros(1).long(), "advantage": torch.zeros(0)},
            "offsets: got no completion for 5 tokens",
        ),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    arguments = step([3, 2]) | counts([3, 2]) | change
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments)


@given(mask=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_pack_keeps_the_marked_tokens_in_order(mask: list[list[bool]]) -> None:
    is_token = torch.tensor(mask)
    x = torch.arange(is_token.numel(), dtype=torch.float64).view(is_token.shape).requires_grad_()
    packed, offsets = pack(x, is_token)
    rows = [
        [v for v, m in zip(row, keep, strict=True) if m] for row, keep in zip(x.tolist(), mask, strict=True)
    ]
    assert [packed[a:b].tolist() for a, b in pairwise(offsets)] == rows
    packed.sum().backward()
    assert_exact(x.grad, is_token.double(), name="gradient")
    assert offsets.dtype == torch.int64 and offsets[0] == 0 and offsets[-1] == len(packed)


def test_pack_extra_axes_and_errors() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    packed, offsets = pack(torch.ones(2, 2, 3), mask)
    assert packed.shape == (1, 3) and offsets.tolist() == [0, 1, 1]
    with pytest.raises(TypeError, match=r"mask: got torch\.int64 of shape \[2, 2\].*mask\.bool"):
        pack(torch.ones(2, 2), mask.long())
    with pytest.raises(ValueError, match=r"x: got shape \[2, 3\], wanted \[2, 2\]"):
        pack(torch.ones(2, 3), mask)
