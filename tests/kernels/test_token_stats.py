"""token_stats: reference, CPU and Triton (interpreted without a GPU) against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raise_kernels import native, reference
from raise_kernels._checks import DIFFERENTIABLE, PLAIN, STATS, LogitMap
from raise_kernels._layout import block_rows
from tests.budget import assert_exact, assert_within_error_budget
from tests.kernels.cases import DTYPES, IGNORED, IMPLS, judge, names_of

every_impl = pytest.mark.parametrize("impl", list(IMPLS))
fast_impl = pytest.mark.parametrize("impl", ["native", "triton"])
NAN, INF = float("nan"), float("inf")


def test_reference_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log() + 7
    got = reference.token_stats(logits, torch.tensor([1]), want=STATS, topk=2)
    entropy = 1.5 * math.log(2)
    second_moment = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    want = {
        "logp": math.log(0.25),
        "lse": 7.0,
        "entropy": entropy,
        "self_certainty": -(math.log(0.5) + 2 * math.log(0.25)) / 3 - math.log(3),
        "max_logp": math.log(0.5),
        "varentropy": second_moment - entropy**2,
        "rank": 1.0,
        "topk_logp_mean": (math.log(0.5) + math.log(0.25)) / 2,
    }
    for name, value in want.items():
        expected = torch.tensor([value], dtype=torch.float64)
        assert_within_error_budget(got[name], expected, got[name].float().double(), name=name)


def test_reference_agrees_with_another_way_to_write_it() -> None:
    x = torch.randn(40, 300, dtype=torch.float64) * 4
    y = torch.randint(0, 300, (40,))
    got = reference.token_stats(x, y, want=STATS)
    p = torch.distributions.Categorical(logits=x)
    other = {
        "logp": p.log_prob(y),
        "entropy": p.entropy(),
        "self_certainty": -math.log(300) - p.logits.mean(-1),
        "max_logp": p.probs.max(-1).values.log(),
        "rank": x.argsort(-1, descending=True).argsort(-1).gather(1, y[:, None])[:, 0].double(),
        "topk_logp_mean": p.logits.sort(-1, descending=True).values[:, :20].mean(-1),
        "varentropy": (p.probs * p.logits**2).sum(-1) - p.entropy() ** 2,
    }
    for name, value in other.items():
        assert_within_error_budget(got[name], value, value.float().double(), name=name)


@every_impl
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 64, 65, 1000, 4096, 17000])
def test_within_budget(impl: str, dtype: torch.dtype, vocab: int) -> None:
    logits = (torch.randn(6, vocab) * 5).to(dtype)
    judge(impl, logits, torch.randint(0, vocab, (6,)))


@every_impl
@pytest.mark.parametrize("shift", [1e4, -1e4, -60.0])
@pytest.mark.parametrize("peak", [0.0, 30.0, 300.0])
def test_peaked_shifted_and_negative_logits(impl: str, shift: float, peak: float) -> None:
    vocab = 777
    logits = torch.randn(16, vocab) * 3 + shift
    y = torch.randint(0, vocab, (16,))
    logits[torch.arange(8), y[:8]] += peak
    logp = judge(impl, logits, y)["logp"]
    assert (logp <= 0).all()


@every_impl
def test_rows_without_a_result(impl: str) -> None:
    vocab = 300
    logits = torch.randn(10, vocab)
    y = torch.randint(0, 200, (10,))
    logits[0] = -INF
    logits[1, 5] = NAN
    logits[2, 7] = INF
    y[3], y[4], y[5] = vocab, -1, 250
    y[6], logits[6] = IGNORED, NAN
    logits[7, :249] = -INF
    y[8], logits[8, 3] = 3, -INF
    how = LogitMap(valid_vocab=250)
    logits[7, 249] = 0.0
    y[7] = 249
    got = judge(impl, logits, y, how=how)
    for name, value in got.items():
        assert value[:6].isnan().all(), name
        assert value[6] == 0, name
        assert not value[7:].isnan().any(), name
    assert got["logp"][7] == 0
    assert got["logp"][8] == -INF
    assert got["self_certainty"][7] == 0


@every_impl
@pytest.mark.parametrize("softcap", [0.5, 5.0])
def test_the_vocabulary_mask_comes_after_the_softcap(impl: str, softcap: float) -> None:
    logits = torch.randn(6, 900) * 3
    y = torch.randint(0, 20, (6,))
    clean = judge(impl, logits[:, :20].contiguous(), y, how=LogitMap(softcap=softcap))
    masked = logits.clone()
    masked[:, 20:] = -INF
    padded = judge(impl, masked, y, how=LogitMap(softcap=softcap))
    cut = judge(impl, logits, y, how=LogitMap(softcap=softcap, valid_vocab=20))
    oracle = reference.token_stats(logits[:, :20].double(), y, how=LogitMap(softcap=softcap))["logp"]
    for other in (padded, cut):
        assert_within_error_budget(other["logp"], oracle, clean["logp"], name="padding")


@every_impl
def test_a_masked_value_of_the_dtype_is_as_good_as_infinity_for_logp(impl: str) -> None:
    logits = torch.randn(4, 5000)
    logits[:, ::3] = torch.finfo(torch.float32).min
    y = torch.tensor([1, 2, 4, 5])
    judge(impl, logits, y, want=("logp", "lse", "max_logp", "entropy"))


@every_impl
def test_rows_selects_and_may_repeat(impl: str) -> None:
    logits = torch.randn(3, 5, 200)
    rows = torch.tensor([14, 0, 3, 3, 15, -1, 7], dtype=torch.int32)
    y = torch.tensor([0, 199, 5, 6, 1, 1, IGNORED])
    got = judge(impl, logits, y, rows=rows)
    whole = IMPLS[impl](logits.view(15, 200)[[14, 0, 3, 3]], y[:4], want=names_of(impl))
    for name in whole:
        assert_exact(got[name][:4], whole[name], name=name)
        assert got[name][4:6].isnan().all()
        assert got[name][6] == 0


@fast_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [PLAIN, LogitMap(temperature=0.7, softcap=20.0)])
def test_a_row_alone_equals_the_row_in_any_batch(impl: str, dtype: torch.dtype, how: LogitMap) -> None:
    logits = (torch.randn(6, 17001) * 4).to(dtype)
    y = torch.randint(0, 17001, (6,))
    want = names_of(impl)
    batch = IMPLS[impl](logits, y, how=how, want=want)
    order = torch.randperm(6)
    mixed = IMPLS[impl](logits[order], y[order], how=how, want=want)
    alone = [IMPLS[impl](logits[k : k + 1], y[k : k + 1], how=how, want=want) for k in (0, 5)]
    for name in want:
        assert_exact(mixed[name], batch[name][order], name=f"{name} reordered")
        assert_exact(alone[0][name], batch[name][:1], name=f"{name} alone")
        assert_exact(alone[1][name], batch[name][5:], name=f"{name} alone")


@pytest.mark.parametrize("vocab", [1, 7, 500, 513])
@pytest.mark.parametrize("how", [PLAIN, LogitMap(temperature=0.7, softcap=20.0)])
def test_a_row_of_a_small_vocabulary_equals_the_row_in_several_blocks(vocab: int, how: LogitMap) -> None:
    count = block_rows(vocab) + 3
    logits = torch.randn(count, vocab) * 4
    logits[::5, : vocab // 2] = -INF
    y = torch.full((count,), vocab - 1)
    batch = native.token_stats(logits, y, how=how, want=STATS)
    order = torch.randperm(count)
    mixed = native.token_stats(logits.view(1, count, vocab), y, rows=order, how=how, want=STATS)
    alone = native.token_stats(logits[-1:], y[-1:], how=how, want=STATS)
    for name in STATS:
        assert_exact(mixed[name], batch[name][order], name=f"{name} reordered")
        assert_exact(alone[name], batch[name][-1:], name=f"{name} alone")


def test_native_takes_more_rows_at_a_time_of_a_smaller_vocabulary() -> None:
    assert [block_rows(v) for v in (10**6, 151936, 32000, 500)] == [4, 4, 18, 256]


@fast_impl
def test_strided_targets_and_rows(impl: str) -> None:
    logits, wide = torch.randn(7, 40), torch.randint(0, 7, (7, 2, 3))
    y, rows = wide[:, 0, 1], wide[:, 1, 2]
    got = IMPLS[impl](logits, y, rows=rows)["logp"]
    want = IMPLS[impl](logits, y.contiguous(), rows=rows.contiguous())["logp"]
    assert_exact(got, want, name="strided")


@every_impl
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_no_rows(impl: str, shape: tuple[int, ...]) -> None:
    got = IMPLS[impl](torch.randn(shape), torch.zeros(shape[:-1], dtype=torch.long), want=names_of(impl))
    assert all(v.shape == shape[:-1] for v in got.values())


@every_impl
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, ValueError, "targets has shape"),
        ({"targets": torch.zeros(4)}, TypeError, "targets is torch.float32"),
        ({"logits": torch.zeros(4, 9, dtype=torch.long)}, TypeError, "logits is torch.int64"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "V at least 1"),
        ({"rows": torch.zeros(3, dtype=torch.long)}, ValueError, "rows has shape"),
        ({"rows": torch.zeros(4)}, TypeError, "rows is"),
        ({"targets": torch.zeros(4, dtype=torch.long, device="meta")}, ValueError, "targets is on meta"),
        ({"want": "logp"}, TypeError, "want is the string"),
        ({"want": ("perplexity",)}, ValueError, "perplexity"),
        ({"want": ()}, ValueError, "one or more"),
        ({"how": LogitMap(valid_vocab=10)}, ValueError, "valid_vocab is 10"),
    ],
)
def test_wrong_arguments(impl: str, change: dict[str, object], error: type[Exception], match: str) -> None:
    arguments = {"logits": torch.zeros(4, 9), "targets": torch.zeros(4, dtype=torch.long)} | change
    with pytest.raises(error, match=match):
        IMPLS[impl](arguments.pop("logits"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", 0.0), ("temperature", -1.0), ("temperature", NAN), ("logit_scale", 0.0)]
    + [("softcap", -3.0), ("softcap", INF), ("valid_vocab", 0)],
)
def test_wrong_options(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        LogitMap(**{option: value})


def test_triton_names_what_it_cannot_do() -> None:
    x, y = torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match='impl="native"'):
        IMPLS["triton"](x.double(), y)
    with pytest.raises(ValueError, match="do not fold"):
        IMPLS["triton"](torch.zeros(3, 3, 3, 3, 8)[:2, :2, :2, :2], torch.zeros(2, 2, 2, 2, dtype=torch.long))


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returned, alone or in a tuple, in memory of its own."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_makes_nothing_of_the_size_of_the_logits(dtype: torch.dtype) -> None:
    rows, vocab = 1100, 3000
    logits = torch.randn(rows, vocab).to(dtype)
    with _Largest(logits) as seen:
        native.token_stats(logits, torch.randint(0, vocab, (rows,)), want=STATS)
    largest = 4 * (block_rows(vocab) + 1) * (vocab + native.VECTOR)
    assert seen.numel <= largest < logits.numel()


@fast_impl
@given(data=st.data())
def test_any_subset_of_names_gives_the_same_bits(impl: str, data: st.DataObject) -> None:
    logits = torch.randn(5, 130)
    y = torch.randint(0, 130, (5,))
    want = tuple(data.draw(st.sets(st.sampled_from(names_of(impl)), min_size=1)))
    some = IMPLS[impl](logits, y, want=want)
    every = IMPLS[impl](logits, y, want=names_of(impl))
    assert set(some) == set(want)
    for name in want:
        assert_exact(some[name], every[name], name=name)


def test_differentiable_names_are_statistics() -> None:
    assert set(DIFFERENTIABLE) < set(STATS)
