"""linear_token_stats in Triton (interpreted without a GPU): tiles, splits, chunks, rows, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from raise_kernels import _linear_operator, linear_stats, linear_tiles, token_stats
from raise_kernels._backward import LinearGradient, Normaliser, coefficients
from raise_kernels._checks import DIFFERENTIABLE, PLAIN, STATS, LogitMap
from raise_kernels.linear_tiles import Tile
from tests.budget import assert_exact, assert_rank, assert_within_error_budget
from tests.kernels.cases import DTYPES, IGNORED
from tests.kernels.linear_cases import Case, gradients_of, rows_of_hidden, stats_of

# What numpy says in the interpreter where all of a tile is NaN.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

NAN, INF = float("nan"), float("inf")
NAMES = tuple(name for name in STATS if name != "topk_logp_mean")
BY_LEVEL = [token_stats.LEVELS[0][:3], (*token_stats.LEVELS[0][:3], "entropy", "self_certainty"), NAMES]
MAPS = [PLAIN, LogitMap(temperature=0.7, logit_scale=0.4, softcap=9.0, valid_vocab=190)]
ALL_NAMES = [(NAMES, dtype) for dtype in DTYPES]
SMALL = Tile(16, 32, 16, 4, 2, 16)  # several blocks of rows, of columns and of hidden, and pieces of a tile
MEMORY = 1 << 30


@pytest.fixture(params=["small", "table"])
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small tiles with four splits, and those of the table."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "small":
            cut_small(patch)
        yield


def cut_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linear_tiles, "choose", lambda *_: SMALL)
    patch.setattr(linear_stats, "SPLITS", 4)
    patch.setattr(linear_stats, "MULTIPLE", 32)


def inputs_of(
    count: int, size: int, vocab: int, dtype: torch.dtype, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    made = torch.randn(count, size), torch.randn(vocab, size) / size**0.5 * 3, torch.randn(vocab)
    hidden, weight, offset = (x.to(dtype) for x in made)
    return hidden, weight, offset if bias else None


def stats(case: Case, want: tuple[str, ...] = NAMES, memory: int = MEMORY) -> dict[str, Tensor]:
    return _linear_operator.linear_token_stats(
        "triton", *case[:2], case.y, bias=case.bias, rows=case.rows, how=case.how, want=want, memory=memory
    )


def judge(case: Case, want: tuple[str, ...] = NAMES, memory: int = MEMORY) -> dict[str, Tensor]:
    """Hold every statistic to the budget of fp32 PyTorch on the same numbers."""
    actual = stats(case, want, memory)
    oracle, peer, tied = stats_of(case, want)
    for name in want:
        if name == "rank":
            assert_rank(actual[name], oracle[name], tied, name=name)
        else:
            assert_within_error_budget(actual[name], oracle[name], peer[name], name=name)
    return actual


def gradient(
    case: Case,
    up: dict[str, Tensor],
    memory: int = MEMORY,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> LinearGradient:
    leaves = [
        None if x is None else x.detach().requires_grad_(need)
        for x, need in zip(case[:3], needs, strict=True)
    ]
    out = stats(Case(*leaves, *case[3:]), tuple(up), memory)  # type: ignore[arg-type]
    inputs = [x for x in leaves if x is not None and x.requires_grad]
    made = iter(torch.autograd.grad([out[name] for name in up], inputs, list(up.values())))
    return LinearGradient(*(next(made) if x is not None and x.requires_grad else None for x in leaves))


def judge_gradient(case: Case, up: dict[str, Tensor], memory: int = MEMORY) -> LinearGradient:
    """Hold the gradients of all inputs to the budget of fp32 PyTorch with one rounding of dz."""
    actual = gradient(case, up, memory)

    def slopes(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: u.view(-1).to(values[name].dtype) for name, u in up.items()}

    oracle, peer = gradients_of(case, slopes, tuple(up))
    for name, got, want, worst in zip(actual._fields, actual, oracle, peer, strict=True):
        assert (got is None) == (want is None), name
        if got is not None and want is not None and worst is not None:
            assert_within_error_budget(got, want, worst, name=f"gradient of {name}")
    return actual


@pytest.mark.parametrize(("want", "dtype"), [(names, torch.bfloat16) for names in BY_LEVEL[:2]] + ALL_NAMES)
@pytest.mark.parametrize("how", MAPS)
def test_every_level(tiles: None, want: tuple[str, ...], dtype: torch.dtype, how: LogitMap) -> None:
    y = torch.randint(0, 190, (9,))
    y[3], y[5], y[6], y[7] = IGNORED, 200, -1, 2**40
    out = judge(Case(*inputs_of(9, 40, 200, dtype), y, None, how), want)
    assert out["logp"][3] == 0 and out["logp"][5:8].isnan().all()


@pytest.mark.parametrize(
    ("names", "dtype", "how"),
    [((name,), torch.float32, MAPS[1]) for name in DIFFERENTIABLE]
    + [(DIFFERENTIABLE, dtype, how) for dtype in DTYPES for how in MAPS],
)
def test_each_gradient(names: tuple[str, ...], dtype: torch.dtype, how: LogitMap) -> None:
    rows = torch.tensor([0, 8, 3, 3, 3, 5, 77, 6])
    y = torch.tensor([5, 100, 4, IGNORED, 189, 400, 3, 3])
    up = {name: torch.randn(8) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        judge_gradient(Case(*inputs_of(9, 20, 200, dtype), y, rows, how), up, memory=8 * 64)


# `test_fuzz` tries many more, with the tiles of the table.
@settings(max_examples=6, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(case=rows_of_hidden(), memory=st.integers(1, 10**5), data=st.data())
def test_random_rows_in_small_tiles(case: Case, memory: int, data: st.DataObject) -> None:
    before = [x.clone() for x in case[:3] if x is not None]
    names = tuple(data.draw(st.sets(st.sampled_from(DIFFERENTIABLE), min_size=1)))
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        judge(case, tuple(data.draw(st.sets(st.sampled_from(NAMES), min_size=1))), memory)
        judge_gradient(case, {name: torch.randn(case.y.shape) for name in names}, memory)
    for x, kept in zip([x for x in case[:3] if x is not None], before, strict=True):
        assert_exact(x.clone(), kept, name="input unwritten")


def test_masked_tiles(tiles: None) -> None:
    """A bias of -inf masks columns: a whole split, and the target's."""
    hidden, weight, bias = inputs_of(4, 16, 200, torch.float32)
    assert bias is not None
    bias[:70], bias[130] = -INF, -INF
    y = torch.tensor([130, 1, 80, 199])
    out = judge(Case(hidden, weight, bias, y, None, PLAIN))
    assert out["logp"][:2].tolist() == [-INF, -INF]
    made = judge_gradient(
        Case(hidden, weight, bias, y, None, PLAIN), {n: torch.randn(4) for n in ("entropy",)}
    )
    assert made.weight is not None and (made.weight[:70] == 0).all()
    masked = Case(hidden, weight, torch.full_like(bias, -INF), y, None, PLAIN)
    assert stats(masked)["logp"].isnan().all()
    assert all((g == 0).all() for g in gradient(masked, {"logp": torch.ones(4)}) if g is not None)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_row_reaches_no_other(tiles: None, bad: float) -> None:
    hidden, weight, bias = inputs_of(5, 16, 200, torch.float32)
    y = torch.tensor([130, 1, 80, 199, IGNORED])
    up = {"logp": torch.randn(5), "entropy": torch.randn(5)}
    clean = Case(hidden, weight, bias, y, None, PLAIN)
    hidden_bad = hidden.clone()
    hidden_bad[[1, 4], 3] = bad
    spoilt = clean._replace(hidden=hidden_bad)
    expected, got = stats(clean), stats(spoilt)
    for name in NAMES:
        assert got[name][1].isnan() and got[name][4] == 0
        assert_exact(got[name][[0, 2, 3]], expected[name][[0, 2, 3]], name=name)
    quiet = gradient(clean, {name: u.index_fill(0, torch.tensor([1]), 0.0) for name, u in up.items()})
    for name, a, b in zip(quiet._fields, gradient(spoilt, up), quiet, strict=True):
        assert a is not None and b is not None
        assert_exact(a, b, name=f"gradient of {name}")


def test_uninitialised_padding_of_the_head_is_never_used(tiles: None) -> None:
    hidden, weight, bias = inputs_of(4, 16, 200, torch.bfloat16)
    assert bias is not None
    weight[150:], bias[150:] = NAN, NAN
    case = Case(hidden, weight, bias, torch.tensor([1, 149, 3, 4]), None, LogitMap(valid_vocab=150))
    assert not judge(case)["logp"].isnan().any()
    made = gradient(case, {"logp": torch.ones(4)})
    assert made.hidden is not None and made.weight is not None and made.bias is not None
    assert made.hidden.isfinite().all() and (made.weight[150:] == 0).all() and (made.bias[150:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_equals_the_row_in_any_batch(tiles: None, dtype: torch.dtype) -> None:
    hidden, weight, bias = inputs_of(20, 40, 200, dtype)
    y = torch.randint(0, 190, (20,))
    whole = Case(hidden, weight, bias, y, None, MAPS[1])
    batch = stats(whole)
    order = torch.randperm(20)
    moved = stats(whole._replace(rows=order, y=y[order]))
    alone = stats(Case(hidden[19:], weight, bias, y[19:], None, MAPS[1]))
    for name in NAMES:
        assert_exact(moved[name], batch[name][order], name=f"{name} in another order")
        assert_exact(alone[name], batch[name][19:], name=f"{name} alone")


def test_a_gradient_has_the_same_bits_every_time(tiles: None) -> None:
    rows = torch.tensor([3, 0, 3, 8, 3])
    case = Case(*inputs_of(9, 24, 200, torch.bfloat16), torch.tensor([1, 2, 3, 4, 5]), rows, PLAIN)
    up = {name: torch.randn(5) for name in DIFFERENTIABLE}
    one, two = gradient(case, up, 1), gradient(case, up, 1)
    for name, a, b in zip(one._fields, one, two, strict=True):
        assert a is not None and b is not None
        assert_exact(a, b, name=f"gradient of {name}")


def test_memory_changes_no_bit_of_the_statistics() -> None:
    """150 rows of small tiles: two groups of blocks, which a small memory takes one after the other."""
    y = torch.randint(0, 70, (150,))
    case = Case(*inputs_of(150, 8, 70, torch.float32), y, None, PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        seen: list[int] = []
        reduce = linear_stats._reduce
        patch.setattr(linear_stats, "_reduce", lambda *a: seen.append(len(a[1])) or reduce(*a))
        whole, parts = judge(case), stats(case, memory=1)
        named = stats(case._replace(rows=torch.arange(150)), memory=1)
    assert seen == [150, 128, 22, 128, 22]
    for name in NAMES:
        assert_exact(parts[name], whole[name], name=name)
        assert_exact(named[name], whole[name], name=f"{name} of named rows")


@pytest.mark.parametrize("memory", [1, 9 * 4 * 64, MEMORY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_the_vocabulary(memory: int, dtype: torch.dtype) -> None:
    case = Case(*inputs_of(9, 24, 200, dtype), torch.randint(0, 200, (9,)), None, PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        judge_gradient(case, {"logp": torch.randn(9), "entropy": torch.randn(9)}, memory)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
@pytest.mark.parametrize("rows", [None, torch.tensor([4, 4, 0, 9, 2])])
def test_each_input_alone(needs: tuple[bool, bool, bool], rows: Tensor | None) -> None:
    case = Case(*inputs_of(5, 8, 90, torch.float32), torch.tensor([1, 2, 3, 4, 89]), rows, PLAIN)
    together = gradient(case, {"logp": torch.ones(5)})
    alone = gradient(case, {"logp": torch.ones(5)}, needs=needs)
    for need, a, b in zip(needs, alone, together, strict=True):
        assert (a is not None) == need
        if a is not None and b is not None:
            assert_exact(a, b, name="gradient")


def test_rows_repeat_in_any_order_and_strides_do_not_matter(tiles: None) -> None:
    wide, weight, bias = inputs_of(30, 16, 200, torch.float32)
    hidden = wide.view(5, 6, 16)[:, :-1]
    rows, y = torch.tensor([7, 24, 7, 99, 0, -1]), torch.tensor([5, 5, 9, 9, 100, 1])
    case = Case(hidden, weight.T.contiguous().T, bias, y, rows, PLAIN)
    out = judge(case)
    assert out["logp"].isnan().tolist() == [False, False, False, True, False, True]
    made = judge_gradient(case, {"logp": torch.randn(6), "entropy": torch.randn(6)})
    assert made.hidden is not None
    assert (made.hidden.reshape(25, 16) != 0).any(1).nonzero()[:, 0].tolist() == [0, 7, 24]
    straight = Case(hidden.contiguous(), weight, bias, y, rows, PLAIN)
    for name, value in stats(straight).items():
        assert_exact(out[name], value, name=name)


def test_offsets_beyond_32_bits() -> None:
    """Virtual memory only: the pages between the rows are never touched."""
    far = 2**31 + 64
    memory = torch.empty(2 * far, dtype=torch.bfloat16)
    hidden, weight = memory.as_strided((2, 16), (far, 1)), memory[32:].as_strided((2, 16), (far, 1))
    columns = memory[64:].as_strided((3, 2), (2, far))
    for h, w in (
        (hidden, weight),
        (columns, torch.randn(5, 2).bfloat16()),
        (torch.randn(3, 2).bfloat16(), columns),
    ):
        for view in (h, w):
            view.copy_(torch.randn(view.shape))
        case = Case(h, w, None, torch.arange(len(h)) % len(w), None, PLAIN)
        judge(case)
        made = gradient(case._replace(weight=w), {"logp": torch.ones(len(h))})
        assert made.hidden is not None and made.hidden.isfinite().all()


def test_a_target_never_outranks_itself() -> None:
    """Its logit is summed in another order for the comparison, which the only column must not notice."""
    hidden, weight, _ = inputs_of(200, 48, 1, torch.float32)
    out = stats(Case(hidden * 7, weight, None, torch.zeros(200, dtype=torch.long), None, PLAIN), ("rank",))
    assert (out["rank"] == 0).all()


@pytest.mark.parametrize("rows", [None, torch.zeros(0, dtype=torch.long)])
def test_nothing_to_score(rows: Tensor | None) -> None:
    for count in (0, 3):
        if rows is None and count:
            continue
        case = Case(*inputs_of(count, 8, 20, torch.bfloat16), torch.zeros(0, dtype=torch.long), rows, PLAIN)
        assert all(value.shape == (0,) for value in stats(case).values())
        made = gradient(case, {"logp": torch.zeros(0)})
        for x, g in zip(case[:3], made, strict=True):
            assert x is not None and g is not None and g.shape == x.shape and (g == 0).all()
    nowhere = Case(
        *inputs_of(0, 8, 20, torch.float32), torch.tensor([1, IGNORED]), torch.tensor([0, 0]), PLAIN
    )
    assert stats(nowhere)["logp"].isnan().tolist() == [True, False]
    assert all((g == 0).all() for g in gradient(nowhere, {"logp": torch.ones(2)}) if g is not None)


def test_a_first_launch_alone_can_be_joined_later(tiles: None) -> None:
    case = Case(*inputs_of(6, 24, 200, torch.bfloat16), torch.tensor([1, 199]), torch.tensor([5, 0]), MAPS[0])
    assert case.rows is not None
    parts = linear_stats.partial_linear_stats(*case[:3], case.y, case.rows, case.how, 1)
    joined = token_stats.merge(parts)
    for name, value in stats(case, BY_LEVEL[1]).items():
        assert_exact(joined[name], value, name=name)


def test_the_number_of_splits_comes_from_the_vocabulary() -> None:
    assert [linear_stats.split_width(v) for v in (1, 500, 32_000, 38_912, 38_913, 151_936, 256_000)] == [
        256, 256, 256, 256, 512, 1024, 1792,
    ]  # fmt: skip
    assert all(-(-v // linear_stats.split_width(v)) <= linear_stats.SPLITS for v in range(1, 300_000, 97))


def test_every_tile_divides_a_split_and_bounds_what_a_device_has() -> None:
    for table in (linear_tiles.HALVES, linear_tiles.SINGLES):
        assert set(table) == {"sm_80", "sm_90", "sm_100", "gfx942"}
        for tiles_of in table.values():
            for tile in tiles_of.values():
                assert linear_stats.MULTIPLE % tile.columns == 0 and tile.columns % tile.piece == 0


def test_what_triton_does_not_take() -> None:
    hidden, weight, _ = inputs_of(2, 8, 20, torch.float32)
    y = torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match=r'hidden is torch.float64.*impl="native"'):
        stats(Case(hidden.double(), weight.double(), None, y, None, PLAIN))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels that would be launched; nothing is, so that fake tensors suffice."""
    seen: list[str] = []
    kernel = type(linear_stats._linear_kernel)
    monkeypatch.setattr(kernel, "run", lambda self, *_, **__: seen.append(self.fn.__name__))
    monkeypatch.setattr(linear_stats, "alignment", lambda *_: 1)  # a fake tensor has no address
    return seen


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_read_back(launches: list[str], named: bool, dtype: torch.dtype, device: str) -> None:
    """Everything around the launches runs on tensors without values, where any read of one is an error."""
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_tiles, "family", lambda _: "sm_90")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden, weight, bias = (
            torch.empty(4, 6, 16, **place),
            torch.empty(700, 16, **place),
            torch.empty(700, **place),
        )
        rows = torch.zeros(5, dtype=torch.long, device=device) if named else None
        y = torch.zeros(5 if named else 24, dtype=torch.long, device=device)
        names = ("logp", "entropy", "count", "rank")
        out = linear_stats.ENGINE.forward(hidden, weight, bias, y, rows, PLAIN, names, 20, MEMORY)
        weights = coefficients(
            {"logp": out["logp"]}, Normaliser(out["top"], out["max_logp"]), None, None, y != 1
        )
        norm = Normaliser(out["top"], out["max_logp"])
        needs = (True, True, True)
        made = linear_stats.ENGINE.backward(hidden, weight, bias, y, rows, norm, weights, PLAIN, needs, 1)
    chunks = -(-700 // linear_tiles.choose("sm_90", dtype == torch.bfloat16, "gradient", False).columns)
    collected = ["_collect_kernel"] if named else []
    forward = ["_target_kernel", "_linear_kernel", "_merge_kernel"]
    assert launches == [*forward, *["_dlogits_kernel"] * chunks, *collected]
    for x, g in zip((hidden, weight, bias), made, strict=True):
        assert g is not None and (g.shape, g.dtype, g.device) == (x.shape, x.dtype, x.device)
