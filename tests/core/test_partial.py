"""Statistics of vocabulary shards on one machine: what a shard gives, how they are joined and refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_kernels import reference
from raise_kernels._checks import STATS, LogitMap
from tests.budget import assert_exact, assert_rank, assert_within_error_budget, close_to
from tests.kernels.cases import IGNORED, permuted_peers
from tests.kernels.linear_cases import Case, stats_of

INF = float("inf")
BOUNDS = [(0, 30), (30, 31), (31, 80), (80, 96)]
MAP: dict[str, Any] = {"valid_vocab": 77, "temperature": 0.6, "softcap": 20.0}
every_impl = pytest.mark.parametrize("impl", ["native", "triton", "reference"])


def some_logits() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [2, 5, 96], targets, and the targets' logits."""
    x, y = torch.randn(2, 5, 96) * 4, torch.randint(0, 77, (2, 5))
    x[0, 0, :40] = x[0, 1] = -INF
    x[0, 2, 50] = float("nan")
    y[0, 3], y[0, 4], y[1, 0] = IGNORED, 77, -7
    return x, y, x.gather(-1, y.clamp(0, 95)[..., None])[..., 0]


def parts_of(x: Tensor, y: Tensor, **options: Any) -> list[rc.PartialStats]:
    return [rc.partial_token_stats(x[..., a:b], y, first_column=a, **options) for a, b in BOUNDS]


@every_impl
def test_shards_in_any_order_are_the_whole(impl: str) -> None:
    x, y, target_logit = some_logits()
    parts = parts_of(x, y, target_logit=target_logit, want=STATS, topk=6, impl=impl, **MAP)
    assert all(part.values.shape == (len(part.fields), 2, 5) for part in parts)
    got = rc.merge_token_stats(parts)
    moved = rc.merge_token_stats([parts[k] for k in (2, 0, 3, 1)])
    how = LogitMap(**MAP)
    oracle = reference.token_stats(x.double(), y, how=how, want=STATS, topk=6)
    peer = permuted_peers(x, y, oracle, how, want=STATS, topk=6)
    for name in STATS:
        value, again = getattr(got, name), getattr(moved, name)
        assert_within_error_budget(value, oracle[name], peer[name], name=name)
        assert_exact(again, value, name=f"{name} in another order")
    assert rc.merge_token_stats(parts_of(x, y, want=("lse",), impl=impl)).logp is None


@every_impl
def test_shards_of_a_head(impl: str) -> None:
    hidden, weight, bias = torch.randn(2, 5, 24), torch.randn(96, 24), torch.randn(96)
    bias[25:40] = -INF
    rows, y = torch.tensor([9, 0, 9, 10]), torch.tensor([3, 70, 50, 4])
    safe = rows.clamp(max=9)
    target_logit = (hidden.view(10, 24)[safe] * weight[y]).sum(-1) + bias[y]
    options: dict[str, Any] = {"rows": rows, "want": STATS, "topk": 6, "impl": impl, **MAP}
    parts = [
        rc.partial_linear_token_stats(
            hidden, weight[a:b], y, first_column=a, bias=bias[a:b], target_logit=target_logit, **options
        )
        for a, b in BOUNDS
    ]
    got = rc.merge_token_stats(parts)
    oracle, peer, tied = stats_of(Case(hidden, weight, bias, y, rows, LogitMap(**MAP)), STATS, 6)
    for name in STATS:
        value = getattr(got, name)
        if name == "rank":
            assert_rank(value, oracle[name], tied, name=name)
        else:
            assert_within_error_budget(value, oracle[name], peer[name], name=name)


def test_a_target_never_outranks_itself() -> None:
    """Its logit may come from another product, which rounds to less than its column here."""
    x, y = torch.randn(3, 96), torch.tensor([0, 30, 95])
    parts = parts_of(x, y, want=("rank",), target_logit=torch.full((3,), -1e9))
    rank = rc.merge_token_stats(parts).rank
    assert rank is not None and rank.tolist() == [95.0] * 3


def test_what_a_shard_holds_can_be_sent() -> None:
    x, y, _ = some_logits()
    parts = parts_of(x, y, want=("entropy",))
    sent = torch.stack([part.values for part in parts])
    back = [
        replace(parts[0], values=values, first_column=a, columns=b - a)
        for values, (a, b) in zip(sent, BOUNDS, strict=True)
    ]
    want, got = rc.merge_token_stats(parts).entropy, rc.merge_token_stats(back).entropy
    assert want is not None and got is not None
    assert_exact(got, want, name="entropy")
    assert parts[0].fields[0] == "owner"
    owner = torch.stack([part.values[0] for part in parts])
    assert (owner[:, 0, 3] == -1).all(), "an ignored target is nobody's"
    assert owner[:, 1].sum(0).tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]


@every_impl
@pytest.mark.parametrize("rows", [None, []])
def test_one_row_without_a_leading_axis_and_no_rows(impl: str, rows: list[int] | None) -> None:
    x, hidden, weight = torch.randn(96), torch.randn(1, 24), torch.randn(96, 24)
    y = torch.tensor(40 if rows is None else rows, dtype=torch.long)
    named = {} if rows is None else {"rows": y}
    cuts: list[dict[str, Any]] = [{"first_column": a, "want": ("logp",), "impl": impl} for a, _ in BOUNDS]
    parts = [
        rc.partial_token_stats(x[a:b], y, **named, **cut) for (a, b), cut in zip(BOUNDS, cuts, strict=True)
    ]
    oracle = reference.token_stats(x.double(), y, **named)["logp"]
    peer = reference.token_stats(x, y, **named)["logp"]
    logp = rc.merge_token_stats(parts).logp
    assert logp is not None and logp.shape == y.shape
    assert_within_error_budget(logp, oracle, close_to(oracle) if rows is None else peer, name="logp")
    linear = [
        rc.partial_linear_token_stats(hidden if rows == [] else hidden[0], weight[a:b], y, **named, **cut)
        for (a, b), cut in zip(BOUNDS, cuts, strict=True)
    ]
    oracle = reference.linear_token_stats(hidden.double(), weight.double(), y.view(-1), rows=y.view(-1) * 0)
    logp = rc.merge_token_stats(linear).logp
    assert logp is not None and logp.shape == y.shape
    want = oracle["logp"].view(y.shape)
    assert_within_error_budget(logp, want, close_to(want, 4), name="logp from hidden states")


def test_leaves_no_graph_behind() -> None:
    x, y, _ = some_logits()
    parts = parts_of(x.requires_grad_(), y)
    assert not any(part.values.requires_grad for part in parts)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"first_column": -1}, "first_column is -1"),
        ({"topk": 0}, "topk is 0"),
        ({"want": ("rank",)}, "or use parallel_token_stats"),
        ({"want": ("rank",), "target_logit": torch.zeros(4)}, "one logit for each target"),
        ({"want": ("certainty",)}, "want is"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, "targets has shape"),
        ({"impl": "cuda"}, "impl is"),
        ({"temperature": 0.0}, "temperature is"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], match: str) -> None:
    y = torch.zeros(3, dtype=torch.long)
    shard: dict[str, Any] = {"targets": y, "first_column": 0} | change
    with pytest.raises(ValueError, match=match):
        rc.partial_token_stats(torch.zeros(3, 9), **shard)
    with pytest.raises(ValueError, match=match):
        rc.partial_linear_token_stats(torch.zeros(3, 2), torch.zeros(9, 2), **shard)


@pytest.mark.parametrize(
    ("shard", "error", "match"),
    [
        ([0.0], TypeError, r"logits_shard is a list; give a tensor"),
        (
            torch.zeros(2, 9),
            ValueError,
            r"logits_shard \(2, 9\); give one target for each row of logits_shard",
        ),
        (torch.zeros(3, 9).long(), TypeError, r"logits_shard is torch\.int64"),
    ],
)
def test_a_shard_is_called_by_its_name(shard: Any, error: type[Exception], match: str) -> None:
    y = torch.zeros(3, dtype=torch.long)
    for call in (rc.partial_token_stats, rc.parallel_token_stats):
        with pytest.raises(error, match=match):
            call(shard, y, first_column=0)
    for call in (rc.partial_linear_token_stats, rc.parallel_linear_token_stats):
        with pytest.raises(ValueError, match=r"hidden has shape \(3, 2\), weight_shard \(9, 4\)"):
            call(torch.zeros(3, 2), torch.zeros(9, 4), y, first_column=0)


def test_triton_takes_no_fp64() -> None:
    y = torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"logits_shard is torch\.float64"):
        rc.partial_token_stats(torch.zeros(3, 9).double(), y, first_column=0, impl="triton")


def test_parts_that_do_not_fit_together() -> None:
    x, y, _ = some_logits()
    parts = parts_of(x, y)
    with pytest.raises(ValueError, match="parts is empty"):
        rc.merge_token_stats([])
    with pytest.raises(ValueError, match="a part that starts at 0 is expected"):
        rc.merge_token_stats(parts[1:])
    with pytest.raises(ValueError, match="a part that starts at 30 is expected"):
        rc.merge_token_stats([parts[0], *parts[2:]])
    with pytest.raises(ValueError, match="a part that starts at 31 is expected"):
        rc.merge_token_stats([*parts, parts[1]])
    with pytest.raises(ValueError, match="valid_vocab is 90, but the parts end at column 80"):
        rc.merge_token_stats(parts_of(x, y, valid_vocab=90)[:3])
    others: list[dict[str, Any]] = [{"want": ("lse",)}, {"valid_vocab": 96}]
    for options in others:
        with pytest.raises(ValueError, match="parts differ"):
            rc.merge_token_stats([parts[0], *parts_of(x, y, **options)[1:]])
    with pytest.raises(ValueError, match="parts differ"):
        rc.merge_token_stats([parts[0], *parts_of(x.double(), y)[1:]])


def test_arguments_of_another_type() -> None:
    x, y, _ = some_logits()
    for change, match in (
        ({"topk": 2.5}, "topk is 2.5"),
        ({"first_column": None}, "first_column is None"),
        ({"first_column": 1.5}, "first_column is 1.5"),
    ):
        with pytest.raises(TypeError, match=match):
            rc.partial_token_stats(x, y, **{"first_column": 0, **change})
    with pytest.raises(TypeError, match=r"memory is 1\.5"):
        rc.partial_linear_token_stats(
            torch.randn(2, 3), torch.randn(5, 3), y[0, :2], first_column=0, memory=1.5
        )
    with pytest.raises(TypeError, match="parts is PartialStats"):
        rc.merge_token_stats(rc.partial_token_stats(x, y, first_column=0))
