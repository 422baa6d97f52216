"""Random candidates of a row, and random vocabulary shards, by every implementation, against float64.

python -m pytest tests/kernels/test_fuzz_shards.py                     20 examples a test
RAISE_FUZZ=long python -m pytest tests/kernels/test_fuzz_shards.py     5,000 and more, counted at the end
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from raise_core.ops.partial import linear_shards, logit_shards
from raise_kernels import reference
from raise_kernels._checks import DIFFERENTIABLE, LogitMap
from tests.budget import assert_rank, assert_within_error_budget, half_ulp, no_better_than, rounding
from tests.kernels import linear_cases, shards
from tests.kernels.cases import (
    gradient_budget,
    names_of,
    permuted_peers,
    rows_of_logits,
    some_targets,
    ties,
)
from tests.kernels.fuzz import (
    ROWS,
    fewer,
    fuzzed,
    generator,
    memories,
    plain_rows,
    report_count,
    running,
    some_rows,
    upstream,
    wanted,
)
from tests.kernels.linear_cases import rows_of_hidden

__all__ = ["report_count"]
PATHS = ("candidates_logits", "candidates_hidden", "shards_logits", "shards_hidden")
# What numpy says in the interpreter where all of a tile is NaN.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
Logits = tuple[Tensor, Tensor, LogitMap]


def some_candidates(data: st.DataObject, y: Tensor, columns: int) -> Tensor:
    """Token ids [..., K]: the targets, then others, of which some repeat, are ignored or lie outside."""
    count = data.draw(st.integers(1, 5))
    ids = some_targets(data.draw, generator(data), columns, (*y.shape, count))
    ids[..., 0] = y
    if count > 2 and data.draw(st.booleans()):
        ids[..., -1] = ids[..., 1]
    return ids


def one_by_one(ids: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """(candidates, rows) as tokens of their own, [T * K] each."""
    count = ids[..., 0].numel()
    n = torch.arange(count) if rows is None else rows
    return ids.reshape(-1), n.repeat_interleave(ids.shape[-1])


@fuzzed(ROWS, data=st.data(), case=rows_of_logits(largest=300))
def test_candidates_logits(engine: str, data: st.DataObject, case: Logits) -> None:
    logits, y, how = case
    logits, y = fewer(engine, plain_rows(engine, logits), y)
    y, named = some_rows(data, logits, y, how)
    ids = some_candidates(data, y, how.columns(logits.shape[-1]))
    up = upstream(data, ("logp",), ids)["logp"]
    leaf = logits.detach().requires_grad_()
    with running(engine, "candidates_logits", logits, ids, up, *named.values()) as impl:
        got = rc.candidate_logp(ids, logits=leaf, **named, **vars(how), impl=impl)
        (slope,) = torch.autograd.grad(got, leaf, up)
    assert slope.dtype == logits.dtype and slope.shape == logits.shape
    flat, each = one_by_one(ids, named.get("rows"))
    tokens: dict[str, Any] = {"rows": each, "want": ("logp",)}
    oracle = reference.token_stats(logits.double(), flat, how=how, **tokens)
    peer = permuted_peers(logits, flat, oracle, how, **tokens)
    assert_within_error_budget(got.reshape(-1), oracle["logp"], peer["logp"], name=f"{engine} candidates")
    want, worst = gradient_budget(logits, flat, {"logp": up.reshape(-1)}, how, each)
    assert_within_error_budget(slope, want, worst, name=f"{engine} gradient of candidates")


def finite_rows(head: linear_cases.Case) -> linear_cases.Case:
    """The case with 0 for hidden states that are no number: a plain product spreads them over the weight."""
    return head._replace(hidden=head.hidden.nan_to_num(0.0, 0.0, 0.0))


@fuzzed(ROWS, data=st.data(), case=rows_of_hidden())
def test_candidates_hidden(engine: str, data: st.DataObject, case: linear_cases.Case) -> None:
    case = finite_rows(case) if engine == "reference" else case
    hidden, y = fewer(engine, case.hidden, case.y)
    case = case._replace(hidden=hidden, y=y)
    ids = some_candidates(data, case.y, case.how.columns(len(case.weight)))
    up = upstream(data, ("logp",), ids)["logp"]
    leaves = [None if x is None else x.detach().requires_grad_() for x in case[:3]]
    needed = [x for x in leaves if x is not None]
    with running(engine, "candidates_hidden", *case[:3], case.rows, ids, up) as impl:
        got = rc.candidate_logp(
            ids, hidden=leaves[0], weight=leaves[1], bias=leaves[2], rows=case.rows, **vars(case.how),
            impl=impl,
        )  # fmt: skip
        made = iter(torch.autograd.grad(got, needed, up))
    flat, each = one_by_one(ids, case.rows)
    tokens = case._replace(y=flat, rows=each)
    oracle, peer, _ = linear_cases.stats_of(tokens, ("logp",))
    assert_within_error_budget(got.reshape(-1), oracle["logp"], peer["logp"], name=f"{engine} candidates")
    wants, worst = linear_cases.gradients_of(
        tokens, lambda _: {"logp": up.reshape(-1).double()}, ("logp",), gathered=True
    )
    for k, leaf in enumerate(leaves):
        if leaf is not None:
            slope = next(made)
            assert slope.dtype == leaf.dtype and slope.shape == leaf.shape
            name = f"{engine} gradient of {case._fields[k]}"
            peer_slope = worst[k]
            if leaf.dtype in (torch.float16, torch.bfloat16):
                peer_slope = no_better_than(peer_slope, wants[k], rounded_parts(case, up, k))
            assert_within_error_budget(slope, wants[k], peer_slope, name=name)


def rounded_parts(case: linear_cases.Case, up: Tensor, leaf: int) -> float:
    """What a 16-bit gradient may lose: its parts, of the logit and of the normaliser, are rounded apart."""
    slope = abs(case.how.logit_scale) / case.how.temperature
    other = (case.weight, case.hidden, None)[leaf]
    size = 1.0 if other is None else float(other.detach().double().nan_to_num(posinf=0, neginf=0).abs().max())
    reach = float(up.detach().double().nan_to_num(posinf=0, neginf=0).abs().sum())
    return 2 * half_ulp(case.hidden.dtype) * slope * reach * size


def judge_merged(
    engine: str,
    got: rc.TokenStats,
    oracle: dict[str, Tensor],
    peer: dict[str, Tensor],
    tied: Tensor,
    columns: int,
) -> None:
    # A part gives the logarithm of its sum of exponentials, and of its columns, in fp32.
    rounded = half_ulp(torch.float32) * (1 + torch.tensor(float(columns)).log().item())
    for name, want in oracle.items():
        value = getattr(got, name)
        assert value.dtype == torch.float32 and value.shape == want.shape
        if name == "rank":
            assert_rank(value, want, tied, name=f"{engine} rank")
        else:
            near = no_better_than(peer[name], want, rounded)
            assert_within_error_budget(value, want, near, name=f"{engine} {name}")


@fuzzed(ROWS, data=st.data(), case=rows_of_logits(largest=300))
def test_shards_logits(engine: str, data: st.DataObject, case: Logits) -> None:
    x, y, how = case
    x, y = fewer(engine, plain_rows(engine, x), y)
    bounds, how = shards.some_bounds(data.draw, x.shape[-1], how)
    y, named = some_rows(data, x, y, how)
    rows = named.get("rows")
    columns, flat = how.columns(x.shape[-1]), x.reshape(-1, x.shape[-1])
    n = torch.arange(y.numel()) if rows is None else rows.clamp(0, len(flat) - 1)
    target_logit = flat[n, y.reshape(-1).clamp(0, columns - 1)].view(y.shape)
    names, up = wanted(data, DIFFERENTIABLE), upstream(data, DIFFERENTIABLE, y)
    up = {name: up[name] for name in names}
    with running(engine, "shards_logits", x, y, target_logit, *named.values(), *up.values()) as impl:
        want = wanted(data, names_of(impl))
        topk = data.draw(st.sampled_from([1, 3, 20]))
        parts = [
            rc.partial_token_stats(
                x[..., a:b], y, first_column=a, want=want, topk=topk, target_logit=target_logit,
                **named, **vars(how), impl=impl,
            )
            for a, b in pairwise(bounds)
        ]  # fmt: skip
        got = rc.merge_token_stats(data.draw(st.permutations(parts)))
        make = logit_shards(x, impl)
        pieces = [make(x[..., a:b]) for a, b in pairwise(bounds)]
        parted = shards.cut(pieces, y.reshape(-1), rows, how, topk)
        made = parted.gradients({name: u.reshape(-1) for name, u in up.items()}, rows, 1)
    oracle = reference.token_stats(x.double(), y, how=how, want=want, topk=topk, **named)
    peer = permuted_peers(x, y, oracle, how, want=want, topk=topk, **named)
    judge_merged(engine, got, oracle, peer, ties(x, y, how, rows), columns)
    slope = torch.cat([g for (g,) in made if g is not None], -1)
    assert slope.dtype == x.dtype and slope.shape == x.shape
    exact, worst = gradient_budget(x, y, up, how, **named)
    assert_within_error_budget(slope, exact, worst, name=f"{engine} gradient of {names}")


@fuzzed(ROWS, data=st.data(), case=rows_of_hidden())
def test_shards_hidden(engine: str, data: st.DataObject, case: linear_cases.Case) -> None:
    case = finite_rows(case) if engine == "reference" else case
    bounds, how = shards.some_bounds(data.draw, len(case.weight), case.how)
    hidden, y = fewer(engine, case.hidden, case.y)
    case = case._replace(how=how, hidden=hidden, y=y)
    hidden, weight, bias, y, rows, _ = case
    columns, h = how.columns(len(weight)), hidden.reshape(-1, hidden.shape[-1]).float()
    at = y.reshape(-1).clamp(0, columns - 1)
    n = torch.arange(y.numel()) if rows is None else rows.clamp(0, len(h) - 1)
    target_logit = (h[n] * weight[at].float()).sum(-1) + (0.0 if bias is None else bias[at].float())
    target_logit = target_logit.view(y.shape)
    names, up = wanted(data, DIFFERENTIABLE), upstream(data, DIFFERENTIABLE, y)
    up = {name: up[name].reshape(-1) for name in names}
    memory = data.draw(memories)
    with running(engine, "shards_hidden", *case[:5], target_logit, *up.values()) as impl:
        want = wanted(data, names_of(impl))
        topk = data.draw(st.sampled_from([1, 3, 20]))
        parts = [
            rc.partial_linear_token_stats(
                hidden, weight[a:b], y, first_column=a, bias=None if bias is None else bias[a:b], want=want,
                topk=topk, target_logit=target_logit, rows=rows, memory=memory, **vars(how), impl=impl,
            )
            for a, b in pairwise(bounds)
        ]  # fmt: skip
        got = rc.merge_token_stats(data.draw(st.permutations(parts)))
        make = linear_shards(hidden, memory, impl)
        pieces = [make(hidden, weight[a:b], None if bias is None else bias[a:b]) for a, b in pairwise(bounds)]
        parted = shards.cut(pieces, y.reshape(-1), rows, how, topk)
        made = parted.gradients(up, rows, 3)
    oracle, peer, tied = linear_cases.stats_of(case, want, topk)
    judge_merged(engine, got, oracle, peer, tied, columns)
    wants, worst = linear_cases.gradients_of(case, lambda _: {k: u.double() for k, u in up.items()}, names)
    of_hidden, *others = (list(one) for one in zip(*made, strict=True))
    # Every shard rounds its share of the gradient of hidden once.
    shares = [g.double() for g in of_hidden if g is not None]
    lost = sum((rounding(g, hidden.dtype) for g in shares), torch.zeros_like(shares[0]))
    near = no_better_than(worst.hidden, wants.hidden, lost)
    name = f"{engine} gradient of"
    assert_within_error_budget(sum(shares).to(hidden.dtype), wants.hidden, near, name=f"{name} hidden")
    for k, made_of in enumerate(others, 1):
        if case[k] is not None:
            slope = torch.cat([g for g in made_of if g is not None])
            assert slope.dtype == case[k].dtype and slope.shape == case[k].shape
            assert_within_error_budget(slope, wants[k], worst[k], name=f"{name} {case._fields[k]}")


def test_the_long_run_is_of_thousands_of_examples() -> None:
    assert sum(ROWS.values()) * len(PATHS) >= 5_000
    assert all(f"test_{path}" in globals() for path in PATHS)
