"""Vocabulary shards through the public names: on one machine, and in groups of 4, 2 and 1 gloo processes."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp

import raise_core as rc
from raise_kernels import reference
from raise_kernels._checks import DIFFERENTIABLE, STATS, LogitMap
from tests.budget import assert_exact, assert_rank, assert_within_error_budget, half_ulp, less_exact, rounding
from tests.kernels.cases import IGNORED, folded, gradient, permuted_peers
from tests.kernels.linear_cases import Case, gradients_of, stats_of

INF, NAN = float("inf"), float("nan")
WORLD = 4
TOPK = 7
# Uneven shards of 150 columns. With 101 valid ones the third of four ends in the padding, the last is in it.
CUTS = {4: [40, 70, 130], 2: [60], 1: []}
VALID = 101


def bounds(size: int, vocab: int) -> list[tuple[int, int]]:
    return list(pairwise([0, *CUTS[size], vocab]))


def hard_rows() -> tuple[Tensor, Tensor]:
    """Logits [3, 6, 150] and targets: masked shards, NaN, rows far from 0, sure tokens, targets of no use."""
    x = torch.randn(3, 6, 150) * 3
    x[0, 0, :40] = x[0, 1, 40:VALID] = x[0, 2] = -INF
    x[0, 3, 65] = NAN
    x[0, 4, 20] = INF
    x[1, 0] += 1e4
    x[1, 1] -= 1e4
    x[1, 2, 80] += 40
    x[1, 3] *= 30
    y = torch.randint(0, VALID, (3, 6))
    y[0, 0], y[1, 2] = 12, 80
    y[2] = torch.tensor([IGNORED, -1, VALID, 149, 2**40, 100])
    return x, y


def logit_cases() -> list[dict[str, Any]]:
    x, y = hard_rows()
    up = {name: torch.randn(y.shape) for name in DIFFERENTIABLE}
    plain: dict[str, Any] = {"x": x, "y": y, "rows": None, "options": {"valid_vocab": VALID}, "up": up}
    picked = torch.tensor([4, 17, 4, 9, 18, -1, 0, 2])
    targets = torch.tensor([3, 149, 120, 60, 5, 5, IGNORED, 8])
    mapped = {"temperature": 0.7, "logit_scale": 0.5, "softcap": 8.0}
    return [
        plain | {"impl": "native"},
        plain | {"impl": "native", "x": x.bfloat16()},
        plain | {"impl": "reference", "x": x.double()},
        plain
        | {"impl": "auto", "rows": picked, "y": targets, "options": mapped, "up": {"logp": torch.randn(8)}},
    ]


def linear_cases() -> list[dict[str, Any]]:
    hidden, weight, bias = torch.randn(2, 5, 24), torch.randn(150, 24), torch.randn(150)
    hidden[1, 0, 3] = NAN
    bias[45:70] = -INF
    y = torch.randint(0, 40, (2, 5))
    y[0, 3], y[0, 4], y[1, 4] = IGNORED, VALID, 90
    up = {name: torch.randn(y.shape) for name in DIFFERENTIABLE}
    plain: dict[str, Any] = {
        "x": hidden, "weight": weight, "bias": bias, "y": y, "rows": None, "impl": "native", "up": up,
        "options": {"valid_vocab": VALID, "temperature": 1.5},
    }  # fmt: skip
    halves = {name: plain[name].bfloat16() for name in ("x", "weight", "bias")}
    picked = {
        "rows": torch.tensor([9, 2, 9]),
        "y": torch.tensor([7, 149, 3]),
        "up": {"entropy": torch.randn(3)},
    }
    return [plain, plain | halves, plain | picked | {"bias": None, "options": {}, "impl": "reference"}]


def run(case: dict[str, Any], size: int, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """One process's statistics and gradients."""
    a, b = bounds(size, len(case["weight"]) if "weight" in case else case["x"].shape[-1])[
        dist.get_rank(group)
    ]
    options = case["options"] | {"rows": case["rows"], "want": STATS, "topk": TOPK, "impl": case["impl"]}
    apart: dict[str, Any] = {"process_group": group}
    if "weight" in case:
        bias = case["bias"]
        leaves = [x for x in (case["x"], case["weight"][a:b], None if bias is None else bias[a:b])]
        h, w, c = (None if x is None else x.clone().requires_grad_() for x in leaves)
        leaves, options["bias"] = [x for x in (h, w, c) if x is not None], c
        arguments, sharded, alone = (h, w), rc.parallel_linear_token_stats, rc.linear_token_stats
    else:
        leaves = [case["x"][..., a:b].clone().requires_grad_()]
        arguments, sharded, alone = leaves, rc.parallel_token_stats, rc.token_stats
        if size == 2:
            apart["first_column"] = a
    out = sharded(*arguments, case["y"], **apart, **options)
    result = {name: getattr(out, name).detach().clone() for name in STATS}
    if size == 1:
        plain = alone(*arguments, case["y"], **options)
        result["alone"] = {name: getattr(plain, name).detach() for name in STATS}
    values = [getattr(out, name) for name in case["up"]]
    assert not any(getattr(out, name).requires_grad for name in set(STATS) - set(DIFFERENTIABLE))
    up = [u.to(v.dtype) for u, v in zip(case["up"].values(), values, strict=True)]
    for name in case["up"]:
        getattr(out, name).detach().zero_()  # what the caller does with his results changes no gradient
    result["gradients"] = torch.autograd.grad(values, leaves, up)
    return result


def refusals(rank: int, pair: dist.ProcessGroup) -> list[str]:
    """What each process is told about calls that fit no group."""
    x, y = torch.randn(4, 10), torch.zeros(4, dtype=torch.long)
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (x[: 4 - rank % 2], y[: 4 - rank % 2], {}),
        (x.double() if rank % 2 else x, y, {}),
        (x, y, {"want": ("logp",) if rank % 2 else ("logp", "entropy")}),
        (x, y, {"valid_vocab": 21}),
        (x, y, {"first_column": -1}),
        (x, y, {"topk": 0}),
    ]
    told = []
    for logits, targets, options in calls:
        with pytest.raises(ValueError) as error:
            rc.parallel_token_stats(logits, targets, process_group=pair, **options)
        told.append(str(error.value))
    return told


def work(rank: int, folder: str) -> None:
    """What one of the processes does; it leaves its results in the folder."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(minutes=5)
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = dist.new_group([0])
    cases = torch.load(f"{folder}/cases.pt")
    groups = {4: None, 2: pairs[rank // 2]} | ({1: alone} if rank == 0 else {})
    results: dict[str, Any] = {
        str(size): [run(case, size, group) for case in cases] for size, group in groups.items()
    }
    results["empty"] = rc.parallel_token_stats(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).logp
    results["told"] = refusals(rank, pairs[rank // 2])
    x, y = torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="no member"):
        rc.parallel_token_stats(x, y, process_group=pairs[1 - rank // 2])
    if rank == 0:
        with pytest.raises(ValueError, match="first_column is 3"):
            rc.parallel_token_stats(x, y, process_group=alone, first_column=3)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(cases, results of each rank)."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.manual_seed(0)
    cases = logit_cases() + linear_cases()
    torch.save(cases, folder / "cases.pt")
    rc.token_stats(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))  # compiles what the others load
    mp.spawn(work, (str(folder),), WORLD)
    return cases, [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


Ran = tuple[list[dict[str, Any]], list[dict[str, Any]]]
NUMBER = len(logit_cases()) + len(linear_cases())
each_case = pytest.mark.parametrize("number", range(NUMBER))
each_size = pytest.mark.parametrize("size", [4, 2])


@each_case
@each_size
def test_every_process_has_the_same_bits(ran: Ran, size: int, number: int) -> None:
    first = ran[1][0][str(size)][number]
    for results in ran[1][1:size]:
        for name in STATS:
            assert_exact(results[str(size)][number][name], first[name], name=name)


@each_case
def test_a_group_of_one_is_the_plain_operation(ran: Ran, number: int) -> None:
    one = ran[1][0]["1"][number]
    for name in STATS:
        assert_exact(one[name], one["alone"][name], name=name)


@each_case
@each_size
def test_statistics_are_those_of_the_whole_row(ran: Ran, size: int, number: int) -> None:
    case, got = ran[0][number], ran[1][0][str(size)][number]
    x, y, rows, how = case["x"], case["y"], case["rows"], LogitMap(**case["options"])
    if "weight" in case:
        oracle, peer, tied = stats_of(Case(x, case["weight"], case["bias"], y, rows, how), STATS, TOPK)
        assert_rank(got.pop("rank"), oracle["rank"], tied, name="rank")
    else:
        oracle = reference.token_stats(x.double(), y, rows=rows, how=how, want=STATS, topk=TOPK)
        peer = permuted_peers(x.float(), y, oracle, how, rows=rows, want=STATS, topk=TOPK)
    for name in set(STATS) & set(got):
        assert got[name].dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert_within_error_budget(got[name].float(), oracle[name], peer[name], name=name)


def whole(results: list[dict[str, Any]], size: int, number: int, which: int, dim: int) -> Tensor:
    """Gradient of all columns from that of each process's own."""
    return torch.cat([r[str(size)][number]["gradients"][which] for r in results[:size]], dim)


@pytest.mark.parametrize("number", range(len(logit_cases())))
@each_size
def test_each_shard_gets_its_columns_of_the_gradient(ran: Ran, size: int, number: int) -> None:
    case = ran[0][number]
    x, y, up = case["x"], case["y"], case["up"]
    how, rows = LogitMap(**case["options"]), {"rows": case["rows"]} if case["rows"] is not None else {}
    actual = whole(ran[1], size, number, 0, -1)
    assert actual.dtype == x.dtype and actual.shape == x.shape
    oracle = gradient(reference.token_stats, x.double(), y, up, how=how, **rows)
    floor = (
        half_ulp(torch.float32)
        * sum(float(u.abs().max()) for u in up.values())
        * how.factors[0]
        * how.factors[1]
    )
    low = torch.float32 if x.dtype == torch.float64 else x.dtype
    worst = (oracle + floor).to(low)
    columns = how.columns(x.shape[-1])
    for k in range(3):
        peer = torch.zeros_like(oracle)
        fp32 = x[..., :columns].float()
        peer[..., :columns] = gradient(
            reference.token_stats, fp32, y, up, how=folded(how, k), **rows
        ).double()
        worst = less_exact(worst, peer.to(low), oracle)
    assert_within_error_budget(actual.to(low), oracle, worst, name="gradient")


@pytest.mark.parametrize("number", range(len(logit_cases()), NUMBER))
@each_size
def test_gradients_of_hidden_states_weight_and_bias(ran: Ran, size: int, number: int) -> None:
    case, results = ran[0][number], ran[1]
    up = case["up"]
    packed = Case(
        case["x"], case["weight"], case["bias"], case["y"], case["rows"], LogitMap(**case["options"])
    )

    def slopes(stats: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: u.reshape(-1).to(stats[name].dtype) for name, u in up.items()}

    oracle, peer = gradients_of(packed, slopes, tuple(up))
    on_hidden = [r[str(size)][number]["gradients"][0] for r in results[:size]]
    for other in on_hidden[1:]:
        assert_exact(other, on_hidden[0], name="hidden on every process")
    # Each process rounds its share; the shares are of the size of the whole.
    rounded = size * rounding(oracle.hidden, case["x"].dtype).amax()
    of_hidden = less_exact(peer.hidden, (oracle.hidden + rounded).to(case["x"].dtype), oracle.hidden)
    assert_within_error_budget(on_hidden[0], oracle.hidden, of_hidden, name="hidden")
    actual = whole(results, size, number, 1, 0)
    assert_within_error_budget(actual, oracle.weight, peer.weight, name="weight")
    if case["bias"] is not None:
        assert oracle.bias is not None and peer.bias is not None
        actual = whole(results, size, number, 2, 0)
        assert_within_error_budget(actual, oracle.bias, peer.bias, name="bias")


def test_no_tokens_and_calls_that_fit_no_group(ran: Ran) -> None:
    expected = ["targets, statistics"] * 3 + [
        "valid_vocab is 21",
        "first_column is -1",
        "topk is 0",
    ]
    for results in ran[1]:
        assert results["empty"].shape == (0,)
        for told, wanted in zip(results["told"], expected, strict=True):
            assert wanted in told


def test_a_process_group_is_needed() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        rc.parallel_token_stats(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
