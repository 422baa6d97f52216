"""Random spans and groups, and rewards straight from logits or hidden states, against float64.

python -m pytest tests/kernels/test_fuzz_spans.py                     20 examples a test
RAISE_FUZZ=long python -m pytest tests/kernels/test_fuzz_spans.py     6,000 and more, counted at the end
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import raise_core as rc
from raise_kernels import reference
from raise_kernels._checks import Igsr, LogitMap, Scre
from tests.budget import (
    assert_exact,
    assert_within_bound,
    assert_within_error_budget,
)
from tests.kernels import linear_cases
from tests.kernels.cases import (
    permuted_peers,
    rows_of_logits,
)
from tests.kernels.fuzz import (
    ROWS,
    fuzzed,
    generator,
    report_count,
    running,
    upstream,
)
from tests.kernels.linear_cases import rows_of_hidden
from tests.kernels.span_bounds import Exact, Ranked, bound
from tests.kernels.spans import Case, packed

__all__ = ["report_count"]
# Examples of each path. From log-probabilities, native is the reference's own lines.
SPANS = {"native": 1200, "triton": 600}
PATHS = {"spans": SPANS, "igsr": SPANS, "rewards_logits": ROWS, "rewards_hidden": ROWS}
# What numpy says in the interpreter where all of a tile is NaN.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
Logits = tuple[Tensor, Tensor, LogitMap]

scre_options = st.builds(
    Scre,
    eta=st.sampled_from([0.0, 0.1, 2.0, 90.0]),
    lam=st.sampled_from([0.0, 1.0, 5.0]),
    first_index=st.sampled_from([0, 1]),
    normalize=st.booleans(),
)
igsr_options = st.builds(
    Igsr,
    tau=st.sampled_from([0.05, 0.1, 0.25, 0.5]),
    delta=st.sampled_from([1e-6, 1e-2]),
    penalty=st.sampled_from([0.0, 0.05, 0.3]),
    min_bonus=st.sampled_from([None, 0.0, 0.03]),
    variant=st.sampled_from(["paper", "balanced"]),
)


@fuzzed(SPANS, data=st.data(), case=packed(), how=scre_options)
def test_spans(engine: str, data: st.DataObject, case: Case, how: Scre) -> None:
    up = upstream(data, ("reward", "logp"), case.score)
    reduce = data.draw(st.sampled_from(["mean", "sum", "decay"]))
    decay = vars(how) | {"lam": 0.0}
    weights = Scre(**decay) if reduce == "decay" else Scre(eta=0.0, normalize=reduce == "mean")
    leaf = case.logp.detach().requires_grad_()
    with running(engine, "spans", *case, *up.values()) as impl:
        reward = rc.scre(leaf, case.offsets, **vars(how), impl=impl)
        del decay["lam"]
        logp = rc.span_logp(leaf, case.offsets, reduce=reduce, **decay, impl=impl)
        slopes = [
            torch.autograd.grad(x, leaf, up[n].float())[0] for n, x in (("reward", reward), ("logp", logp))
        ]
    free = case.logp.double().requires_grad_()
    for k, (op, option, got) in enumerate(
        ((reference.scre, how, reward), (reference.span_logp, weights, logp))
    ):
        exact = Exact(case.logp, case.offsets, option)
        want = op(free, case.offsets, option)
        upper = list(up.values())[k].double()
        (slope,) = torch.autograd.grad(want, free, upper)
        want = want.detach()
        value_bound = exact.span_logp() if k else exact.scre(want)
        slope_bound = exact.span_logp_slope() if k else exact.scre_slope(want, engine == "native")
        assert got.dtype == torch.float32 and slopes[k].dtype == case.logp.dtype
        name = f"{engine} {op.__name__}"
        assert_within_bound(got, want, bound(value_bound), name=name)
        reach = upper.abs()[exact.spans.owner]
        assert_within_bound(slopes[k], slope, bound(slope_bound * reach), name=f"{name} gradient")


@fuzzed(SPANS, case=packed(), how=igsr_options)
def test_igsr(engine: str, case: Case, how: Igsr) -> None:
    options = vars(how)
    with running(engine, "igsr", *case) as impl:
        got = rc.igsr(case.logp, case.offsets, case.score, case.group, **options, impl=impl)
    parts = reference.igsr_parts(case.logp.double(), case.offsets, case.score, case.group, how)
    ranked = Ranked(Exact(case.logp, case.offsets, Scre()), case.score, case.group, parts, how)
    sure = ~ranked.edge & ~ranked.unsure
    assert_within_bound(got[sure], parts.reward[sure], ranked.reward[sure], name=f"{engine} igsr")
    assert bool((got[parts.bin < 0].nan_to_num() == 0).all()), "a row in no bin has a reward"


def judge_rewards(engine: str, got: rc.Rewards, case: Case, scre_how: Scre, igsr_how: Igsr) -> None:
    """Rewards and their parts against what float64 makes of the same log-probabilities."""
    logp = got.parts["logp"]
    args = (case.offsets, case.score, case.strict, case.group, scre_how, igsr_how)
    want = reference.span_rewards(logp.double(), *args)
    exact = Exact(logp, case.offsets, scre_how)
    ranked = Ranked(exact, case.score, case.group, want, igsr_how)
    strict = bound(exact.scre(torch.where(case.strict, want.confidence, 0.0)))
    e = want.nll.nan_to_num(0.0, 0.0, 0.0)
    sure = (-e).exp() * (ranked.nll + bound(3 * e.abs() + 4))
    score = case.score.double().nan_to_num().clamp(0, 1)
    known = ~(ranked.edge | ranked.unsure)
    bounds = {
        "reward": torch.where(case.strict, score * strict + bound(score), ranked.reward),
        "confidence": torch.where(case.strict, strict, sure),
        "variance": bound(exact.variance()),
        "nll": ranked.nll,
        "bonus": ranked.bonus,
    }
    values = vars(got) | got.parts
    for name, limit in bounds.items():
        where = known if name in ("reward", "bonus") else torch.ones_like(known)
        oracle = getattr(want, name)
        assert_within_bound(values[name][where], oracle[where], limit[where], name=f"{engine} {name}")
    assert_exact(got.parts["bin"][~ranked.unsure], want.bin[~ranked.unsure], name="bin")
    assert_exact(got.parts["is_bonus"][known], want.applied[known], name="is_bonus")


def groups_of(data: st.DataObject) -> tuple[Case, int | None]:
    """Spans that `rc.Spans` takes, and group_size where the groups are blocks of one size."""
    blocks = data.draw(st.booleans())
    case = data.draw(packed(blocks))
    case = case._replace(offsets=case.offsets.long(), group=case.group.long() + 3)
    size = int((case.group == case.group[0]).sum()) if blocks and len(case.group) else None
    return case, size


def spans_over(data: st.DataObject, case: Case, likely: Tensor, columns: int) -> rc.Spans:
    """The spans with tokens scored on random rows, some of which, and some targets, are outside.

    likely [rows]: the target of most tokens of a row.
    """
    g, count, rows = generator(data), len(case.logp), len(likely)
    rows_of = torch.randint(0, rows, (count,), generator=g)
    targets = torch.randint(0, columns, (count,), generator=g)
    targets = torch.where(torch.rand(count, generator=g) < 0.9, likely[rows_of], targets)
    if data.draw(st.booleans()):
        rows_of[torch.rand(count, generator=g) < 0.05] = data.draw(st.sampled_from([rows, 2**40]))
        targets[torch.rand(count, generator=g) < 0.05] = data.draw(st.sampled_from([columns, 2**40]))
    return rc.Spans(rows_of, targets, case.offsets, case.group, torch.arange(len(case.group)))


def every_row(head: linear_cases.Case) -> linear_cases.Case:
    """The head with a target, 0, for each of its rows."""
    shape = head.hidden.shape[:-1]
    return head._replace(rows=None, y=torch.zeros(shape, dtype=torch.long))


def scalars(how: LogitMap, *but: str) -> dict[str, Any]:
    return {name: value for name, value in vars(how).items() if name not in but}


@fuzzed(ROWS, data=st.data(), logits=rows_of_logits(largest=300), how=scre_options, rank=igsr_options)
def test_rewards_logits(engine: str, data: st.DataObject, logits: Logits, how: Scre, rank: Igsr) -> None:
    x, _, to_z = logits
    case, size = groups_of(data)
    columns = to_z.columns(x.shape[-1])
    likely = x[..., :columns].reshape(-1, columns).argmax(-1)
    spans = spans_over(data, case, likely, columns)
    from_logp = data.draw(st.sampled_from([False, False, True]))
    source = {"logp": case.logp} if from_logp else {"logits": x}
    options = vars(how) | vars(rank) | scalars(to_z, "ignore_index")
    given = (*case, x, spans.rows, spans.targets)
    with running(engine, "rewards_logits", *given) as impl:
        got = rc.confidence_rewards(
            spans, case.score, case.strict, **source, group_size=size, **options, impl=impl
        )
    judge_rewards(engine, got, case, how, rank)
    if not from_logp:
        named: dict[str, Any] = {"rows": spans.rows, "want": ("logp",)}
        oracle = reference.token_stats(x.double(), spans.targets, how=to_z, **named)
        peer = permuted_peers(x, spans.targets, oracle, to_z, **named)
        assert_within_error_budget(got.parts["logp"], oracle["logp"], peer["logp"], name=f"{engine} logp")


@fuzzed(ROWS, data=st.data(), head=rows_of_hidden(), how=scre_options, rank=igsr_options)
def test_rewards_hidden(
    engine: str, data: st.DataObject, head: linear_cases.Case, how: Scre, rank: Igsr
) -> None:
    case, size = groups_of(data)
    columns = head.how.columns(len(head.weight))
    likely = linear_cases.by_token(every_row(head), torch.float32).logits().argmax(-1)
    spans = spans_over(data, case, likely, columns)
    options = vars(how) | vars(rank) | scalars(head.how, "ignore_index")
    given = (*case, *head[:3], spans.rows, spans.targets)
    with running(engine, "rewards_hidden", *given) as impl:
        got = rc.confidence_rewards(
            spans, case.score, case.strict, hidden=head.hidden, weight=head.weight, bias=head.bias,
            group_size=size, **options, impl=impl,
        )  # fmt: skip
    judge_rewards(engine, got, case, how, rank)
    oracle, peer, _ = linear_cases.stats_of(head._replace(y=spans.targets, rows=spans.rows), ("logp",))
    assert_within_error_budget(got.parts["logp"], oracle["logp"], peer["logp"], name=f"{engine} logp")


def test_the_long_run_is_of_thousands_of_examples() -> None:
    assert sum(sum(long.values()) for long in PATHS.values()) >= 6_000
    assert all(f"test_{path}" in globals() for path in PATHS)
