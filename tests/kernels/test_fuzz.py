"""Random shapes, strides, dtypes, masks and flags, by every implementation, against float64.

python -m pytest tests/kernels/test_fuzz.py                     20 examples a test
RAISE_FUZZ=long python -m pytest tests/kernels/test_fuzz.py     10,000 examples and more, counted at the end
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from raise_core.policy_loss import policy_loss
from raise_kernels._checks import DIFFERENTIABLE, LogitMap
from tests.budget import assert_rank, assert_within_error_budget, no_better_than
from tests.kernels.cases import judge, judge_gradient, names_of, rows_of_logits
from tests.kernels.fuzz import (
    fuzzed,
    generator,
    memories,
    report_count,
    running,
    some_rows,
    upstream,
    wanted,
)
from tests.kernels.linear_cases import Case, gradients_of, rows_of_hidden, stats_of

__all__ = ["report_count"]
PATHS = ("logits", "logits_gradient", "hidden", "hidden_gradient", "policy_loss")
LONG = {"floor": 900, "compiled": 900, "triton": 220}  # examples of each path

# What numpy says in the interpreter where all of a tile is NaN.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")


@fuzzed(LONG, data=st.data(), case=rows_of_logits())
def test_logits(engine: str, data: st.DataObject, case: tuple[Tensor, Tensor, LogitMap]) -> None:
    logits, y, how = case
    y, options = some_rows(data, logits, y, how)
    with running(engine, "logits", logits, y, *options.values()) as impl:
        want = wanted(data, names_of(impl))
        if "topk_logp_mean" in want:
            options["topk"] = data.draw(st.sampled_from([1, 3, 20]))
        got = judge(impl, logits, y, how=how, want=want, **options)
    assert all(value.shape == y.shape for value in got.values())


@fuzzed(LONG, data=st.data(), case=rows_of_logits(largest=300))
def test_logits_gradient(engine: str, data: st.DataObject, case: tuple[Tensor, Tensor, LogitMap]) -> None:
    logits, y, how = case
    y, options = some_rows(data, logits, y, how)
    up = upstream(data, wanted(data, DIFFERENTIABLE), y)
    with running(engine, "logits_gradient", logits, y, *options.values(), *up.values()) as impl:
        judge_gradient(impl, logits, y, up, how, **options)


def tensors(case: Case) -> tuple[Tensor | None, ...]:
    return case.hidden, case.weight, case.bias, case.y, case.rows


def run(case: Case, impl: str, **options: Any) -> rc.TokenStats:
    return rc.linear_token_stats(case.hidden, case.weight, case.y, **case.options(), **options, impl=impl)


@fuzzed(LONG, data=st.data(), case=rows_of_hidden())
def test_hidden(engine: str, data: st.DataObject, case: Case) -> None:
    with running(engine, "hidden", *tensors(case)) as impl:
        want = wanted(data, names_of(impl))
        topk = data.draw(st.sampled_from([1, 3, 20]))
        got = run(case, impl, want=want, topk=topk, memory=data.draw(memories))
    oracle, peer, tied = stats_of(case, want, topk)
    for name in want:
        value = getattr(got, name)
        assert value.shape == case.y.shape and value.dtype == torch.float32
        if name == "rank":
            assert_rank(value, oracle[name], tied, name=f"{engine} rank")
        else:
            assert_within_error_budget(value, oracle[name], peer[name], name=f"{engine} {name}")


def leaves(case: Case) -> tuple[Case, list[Tensor]]:
    """The case with inputs that need a gradient, which share their memory with the old ones."""
    fresh = [None if x is None else x.detach().requires_grad_() for x in case[:3]]
    return case._replace(**dict(zip(Case._fields, fresh, strict=False))), [x for x in fresh if x is not None]


def judge_inputs(engine: str, given: list[Tensor], case: Case, *judges: Any) -> None:
    oracle, peer = judges
    there = [k for k, x in enumerate(case[:3]) if x is not None]
    for k, value in zip(there, given, strict=True):
        name = f"{engine} gradient of {Case._fields[k]}"
        assert value.dtype == case[k].dtype and value.shape == case[k].shape, name
        assert_within_error_budget(value, oracle[k], peer[k], name=name)


@fuzzed(LONG, data=st.data(), case=rows_of_hidden())
def test_hidden_gradient(engine: str, data: st.DataObject, case: Case) -> None:
    names = wanted(data, DIFFERENTIABLE)
    up = upstream(data, names, case.y)
    free, inputs = leaves(case)
    with running(engine, "hidden_gradient", *tensors(case), *up.values()) as impl:
        got = run(free, impl, want=names, memory=data.draw(memories))
        made = torch.autograd.grad([getattr(got, name) for name in names], inputs, list(up.values()))

    def slopes(stats: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: up[name].reshape(-1).to(stats[name].dtype) for name in names}

    judge_inputs(engine, list(made), case, *gradients_of(case, slopes, names))


# Log ratios: none of them near a clip or a clamp, where a rounding decides.
OFF = torch.tensor([0.0, 0.0, 0.1, -0.1, 0.5, -0.5, 2.0, -25.0])


@fuzzed(LONG, data=st.data(), case=rows_of_hidden(every_token=True))
def test_policy_loss(engine: str, data: st.DataObject, case: Case) -> None:
    count = case.y.numel()
    stats, peers, _ = stats_of(case, ("logp",))
    exact, near = stats["logp"].reshape(-1), peers["logp"].reshape(-1)
    g = generator(data)

    def shifted() -> Tensor:
        return (exact - OFF[torch.randint(len(OFF), (count,), generator=g)]).float()

    cuts = torch.sort(torch.randint(0, count + 1, (data.draw(st.integers(0, 3)),), generator=g)).values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([count])])
    advantage = torch.randn(len(offsets) - 1, generator=g)
    old = data.draw(st.sampled_from([None, shifted()]))
    options: dict[str, Any] = {
        "kind": data.draw(st.sampled_from(["grpo", "dapo", "dr_grpo"])),
        "num_tokens": 7,
        "num_sequences": 3,
        "max_length": 5,
        "logp_ref": data.draw(st.sampled_from([None, shifted()])),
        "eps_high": data.draw(st.sampled_from([0.2, 0.3])),
    }
    if options["logp_ref"] is not None:
        options |= {"kl": data.draw(st.sampled_from([0.0, 0.1])), "kl_estimator": data.draw(KL)}
    memory, fp32_sums = data.draw(memories), data.draw(st.booleans())

    def loss_of(logp: Tensor) -> rc.PolicyLoss:
        before = logp.detach() if old is None else old
        return policy_loss(logp, before.to(logp.dtype), advantage, offsets, **options)

    free, inputs = leaves(case)
    given_ones = (*tensors(case), advantage, offsets, old, options["logp_ref"])
    with running(engine, "policy_loss", *given_ones) as impl:
        got = rc.linear_policy_loss(
            free.hidden, free.weight, case.y, old, advantage, offsets,
            bias=free.bias, rows=case.rows, memory=memory, accumulate_fp32=fp32_sums, impl=impl,
            **{k: v for k, v in vars(case.how).items() if k != "ignore_index"}, **options,
        )  # fmt: skip
        made = torch.autograd.grad(got.loss, inputs)
    assert got.logp is not None
    assert_within_error_budget(got.logp, exact, near, name=f"{engine} logp")
    want, fp32 = loss_of(exact).loss, loss_of(near).loss
    floor = float((near - exact).abs().max()) if count else 0.0
    peer = no_better_than(fp32, want, floor * float(advantage.abs().max() + 1))
    assert_within_error_budget(got.loss.detach(), want, peer, name=f"{engine} loss")
    tiles = 1 if fp32_sums or memory is None else count

    def slopes(stats: dict[str, Tensor]) -> dict[str, Tensor]:
        leaf = stats["logp"].clone().requires_grad_()
        return {"logp": torch.autograd.grad(loss_of(leaf).loss, leaf)[0]}

    oracle = gradients_of(case, slopes, ("logp",), tiles)
    judge_inputs(engine, list(made), case, *oracle)


KL = st.sampled_from(["k1", "k2", "k3"])


def test_the_long_run_is_of_ten_thousand_examples() -> None:
    assert sum(LONG.values()) * len(PATHS) >= 10_000
    assert all(f"test_{path}" in globals() for path in PATHS)
