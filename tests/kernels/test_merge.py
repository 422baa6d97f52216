"""Statistics of a row from parts of its columns: wherever the cuts are, whatever the parts hold."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raise_kernels import native, reference, reference_engine, token_stats
from raise_kernels._backward import Coefficients, Engine, Normaliser
from raise_kernels._checks import DIFFERENTIABLE, PLAIN, STATS, LogitMap
from raise_kernels.merge import CALL, merge_parts, part_names
from raise_kernels.parallel import LogitShard, fields, shard_gradient
from tests.budget import assert_exact, assert_within_error_budget, half_ulp, less_exact, no_better_than
from tests.kernels import shards
from tests.kernels.cases import IGNORED, folded, gradient, permuted_peers, rows_of_logits
from tests.kernels.shards import EVERYTHING, Cut

INF, NAN = float("inf"), float("nan")
ENGINES = {"definition": reference_engine.ENGINE, "native": native.ENGINE, "triton": token_stats.ENGINE}
every_engine = pytest.mark.parametrize("engine", list(ENGINES))
TOPK = 5


def cut(
    engine: Engine, x: Tensor, y: Tensor, how: LogitMap, cuts: list[int], rows: Tensor | None = None
) -> Cut:
    """x [..., V] cut before the columns `cuts`, in fp64 for the definition: there the merge alone can err."""
    x = x.double() if engine is reference_engine.ENGINE else x
    made = [LogitShard(engine, x[..., a:b]) for a, b in pairwise([0, *cuts, x.shape[-1]])]
    return shards.cut(made, y.reshape(-1), rows, how, TOPK)


def some_cuts(data: st.DataObject, vocab: int) -> list[int]:
    inside = st.integers(1, max(vocab - 1, 1))
    cuts = sorted(data.draw(st.sets(inside, max_size=4), label="cuts"))
    return cuts if vocab > 1 else []


@every_engine
@given(case=rows_of_logits(largest=200), data=st.data())
def test_any_cut_gives_the_whole_row(
    engine: str, case: tuple[Tensor, Tensor, LogitMap], data: st.DataObject
) -> None:
    x, y, how = case
    before = x.clone()
    merged, scored = cut(ENGINES[engine], x, y, how, some_cuts(data, x.shape[-1])).merged()
    assert_exact(x, before, name="logits are left as they were")
    assert_exact(scored, (y != IGNORED).reshape(-1), name="scored")
    oracle = reference.token_stats(x.double(), y, how=how, want=STATS, topk=TOPK)
    peer = permuted_peers(x, y, oracle, how, want=STATS, topk=TOPK)
    # A part gives the logarithm of its sum of exponentials, and of its columns, in fp32.
    rounded = half_ulp(torch.float32) * (1 + math.log(x.shape[-1]))
    for name in STATS:
        floored = no_better_than(peer[name], oracle[name], rounded)
        assert merged[name].dtype == (torch.float64 if engine == "definition" else torch.float32)
        actual = merged[name].view(y.shape).float()
        assert_within_error_budget(actual, oracle[name], floored, name=f"{engine} {name}")


@every_engine
@given(case=rows_of_logits(largest=200), data=st.data())
def test_any_cut_gives_the_gradient_of_the_whole_row(
    engine: str, case: tuple[Tensor, Tensor, LogitMap], data: st.DataObject
) -> None:
    x, y, how = case
    parts = cut(ENGINES[engine], x, y, how, some_cuts(data, x.shape[-1]))
    names = data.draw(st.sampled_from([("logp",), ("entropy", "lse"), DIFFERENTIABLE]), label="names")
    up = {name: torch.randn(y.shape) for name in names}
    actual = gradient_of_parts(parts, {n: u.reshape(-1) for n, u in up.items()})
    assert actual.dtype == parts.shards[0].logits.dtype and actual.shape == x.shape
    oracle = gradient(reference.token_stats, x.double(), y, up, how=how)
    a, b = how.factors
    worst = (oracle + half_ulp(torch.float32) * sum(float(u.abs().max()) for u in up.values()) * a * b).to(
        x.dtype
    )
    columns = how.columns(x.shape[-1])
    for k in range(3):
        peer = torch.zeros_like(oracle)
        part = gradient(reference.token_stats, x[..., :columns].float(), y, up, how=folded(how, k))
        peer[..., :columns] = part.double()
        worst = less_exact(worst, peer.to(x.dtype), oracle)
    assert_within_error_budget(actual.to(x.dtype), oracle, worst, name=f"{engine} gradient of {names}")


def gradient_of_parts(parts: Cut, up: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
    return torch.cat([g for (g,) in parts.gradients(up, rows, 1) if g is not None], -1)


@every_engine
def test_rows_that_repeat_and_rows_outside(engine: str) -> None:
    x = torch.randn(2, 3, 90) * 4
    rows = torch.tensor([5, 0, 5, 6, -1, 2**40, 3, 2])
    y = torch.tensor([88, 3, 40, 1, 2, 3, IGNORED, 95])
    how = LogitMap(temperature=0.5, valid_vocab=89)
    parts = cut(ENGINES[engine], x, y, how, [20, 60], rows)
    merged, _ = parts.merged()
    oracle = reference.token_stats(x.double(), y, rows=rows, how=how, want=STATS, topk=TOPK)
    assert oracle["logp"].isnan().tolist() == [False] * 3 + [True] * 3 + [False, True]
    peer = permuted_peers(x, y, oracle, how, rows=rows, want=STATS, topk=TOPK)
    for name in STATS:
        assert_within_error_budget(merged[name].float(), oracle[name], peer[name], name=name)
    up = {"logp": torch.ones(len(y)), "entropy": torch.randn(len(y))}
    actual = gradient_of_parts(parts, up, rows)
    oracle_dx = gradient(reference.token_stats, x.double(), y, up, rows=rows, how=how)
    peer_dx = gradient(reference.token_stats, x, y, up, rows=rows, how=how)
    assert_within_error_budget(actual.float(), oracle_dx, peer_dx + half_ulp(torch.float32), name="gradient")


@every_engine
def test_parts_without_an_open_column(engine: str) -> None:
    """A part of masked columns, and one that is all padding, hold nothing; a row of them has no result."""
    x = torch.randn(4, 120)
    x[0, :50] = x[1, 50:90] = x[2] = -INF
    y = torch.tensor([3, 20, 5, 70])
    how = LogitMap(valid_vocab=90)
    parts = cut(ENGINES[engine], x, y, how, [50, 90])
    top = torch.stack([v[fields(EVERYTHING, TOPK).index("top")] for v in parts.values])
    masked = torch.tensor([[True, False, True, False], [False, True, True, False], [True] * 4])
    assert_exact(top == -INF, masked, name="top of a part without open columns")
    merged, _ = parts.merged()
    assert merged["logp"][0] == -INF, "a masked target in a masked part"
    assert merged["logp"][2].isnan() and merged["top"][2] == -INF
    oracle = reference.token_stats(x.double(), y, how=how, want=STATS, topk=TOPK)
    peer = permuted_peers(x, y, oracle, how, want=STATS, topk=TOPK)
    for name in STATS:
        assert_within_error_budget(merged[name].float(), oracle[name], peer[name], name=name)
    dx = gradient_of_parts(parts, {"logp": torch.ones(4)})
    assert not dx[:, 90:].any() and not dx[2].any() and not dx[0, :50].any()


def test_merges_of_merges() -> None:
    """What is merged can be a part again, also where all of it is masked."""
    x, y = torch.randn(3, 64), torch.tensor([1, 30, 60])
    x[1, :32] = -INF
    names = ("logp", "entropy", "self_certainty", "varentropy", "count", "top", "max_logp", "lse")
    needed = part_names(names)
    local = [(y - start).clamp(0, 15) for start in range(0, 64, 16)]
    quarter = [
        native.stats_forward(x[:, 16 * k : 16 * k + 16], local[k], None, PLAIN, needed, 1) for k in range(4)
    ]
    mine = torch.stack([y // 16 == k for k in range(4)])

    def join(parts: list[dict[str, Tensor]], mine: Tensor) -> dict[str, Tensor]:
        return merge_parts({n: torch.stack([p[n] for p in parts]) for n in needed}, mine, names)

    halves = [quarter[:2], quarter[2:]]
    # A merge asks for a target: where the half has none, any of its parts will do.
    chosen = [m | torch.tensor([[True], [False]]) & ~m.any(0) for m in (mine[:2], mine[2:])]
    joined = [join(half, m) for half, m in zip(halves, chosen, strict=True)]
    assert joined[0]["top"][1] == -INF and joined[0]["max_logp"][1].isnan()
    twice = join(joined, torch.stack([mine[:2].any(0), mine[2:].any(0)]))
    want = tuple(name for name in names if name in STATS)
    oracle = reference.token_stats(x.double(), y, want=want)
    peer = permuted_peers(x, y, oracle, PLAIN, want=want)
    for name in want:
        assert_within_error_budget(twice[name], oracle[name], peer[name], name=name)


def test_bits_do_not_depend_on_the_other_tokens() -> None:
    x = (torch.randn(700, 40) * 3).repeat(25, 1)
    y = torch.randint(0, 40, (700,)).repeat(25)
    assert len(y) > CALL, "more tokens than one call of the merge takes"
    parts = cut(native.ENGINE, x, y, PLAIN, [7, 30])
    merged, _ = parts.merged()
    for chosen in (slice(0, 1), slice(699, 700), slice(16383, 16386), slice(17000, 17250)):
        alone = parts._replace(values=[v[:, chosen] for v in parts.values])
        for name, value in alone.merged()[0].items():
            assert_exact(value, merged[name][chosen], name=name)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_finite_differences(name: str) -> None:
    x = torch.randn(3, 11, dtype=torch.float64) * 2
    x[0, 2:5] = x[1, :4] = -INF
    y = torch.tensor([0, 8, 3])
    how = LogitMap(temperature=0.5, logit_scale=0.3, softcap=2.0, valid_vocab=9)
    free = x.isfinite()

    class Sharded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values: Tensor) -> Tensor:
            ctx.parts = cut(native.ENGINE, x.masked_scatter(free, values), y, how, [4, 10])
            return ctx.parts.merged()[0][name]

        @staticmethod
        def backward(ctx, up: Tensor) -> Tensor:
            return gradient_of_parts(ctx.parts, {name: up})[free]

    torch.autograd.gradcheck(Sharded.apply, x[free].clone().requires_grad_())


@every_engine
def test_no_tokens(engine: str) -> None:
    parts = cut(ENGINES[engine], torch.randn(0, 9), torch.zeros(0, dtype=torch.long), PLAIN, [4])
    assert all(v.shape == (0,) for v in parts.merged()[0].values())
    weights = Coefficients(*(torch.zeros(0) for _ in range(4)))
    norm = Normaliser(torch.zeros(0), torch.zeros(0))
    g = shard_gradient(parts.shards[0], parts.at[0], None, norm, weights, (True,))[0]
    assert g is not None and g.shape == (0, 4)
