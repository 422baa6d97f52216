"""Every wrong argument of every operation: the exception, and a message with its name, what came, a way out.

What only the data shows has a result: tests/core/test_only_the_data.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import raise_core as rc
from raise_core.spans import Found, Spans, build_spans

IMPLS = ["reference", "native", "triton"]
every_impl = pytest.mark.parametrize("impl", IMPLS)
NAN, INF = float("nan"), float("inf")
LONG = torch.long


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device="meta")


def of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=LONG)


def some_spans() -> Spans:
    return Spans(
        rows=of(0, 1, 2, 3), targets=of(1, 2, 3, 4), offsets=of(0, 2, 4), group=of(0, 0), owner=of(0, 1)
    )


def arguments(operation: str) -> dict[str, Any]:
    """A call that works."""
    packed = {"logp": -torch.ones(4), "offsets": of(0, 2, 4)}
    linear = {"hidden": torch.randn(4, 3), "weight": torch.randn(9, 3), "targets": of(1, 2, 3, 4)}
    policy = {"logp_old": torch.zeros(4), "advantage": torch.ones(2), "offsets": of(0, 2, 4)}
    counts = {"num_tokens": 4, "num_sequences": 2}
    scores = {"score": torch.tensor([0.5, 0.6])}
    return {
        "token_stats": {"logits": torch.randn(4, 9), "targets": of(1, 2, 3, 4)},
        "linear_token_stats": linear,
        "linear_policy_loss": linear | policy | counts,
        "policy_loss": {"logp": torch.zeros(4)} | policy | counts,
        "scre": packed,
        "span_logp": packed,
        "igsr": packed | scores | {"group": of(0, 0)},
        "confidence_rewards": {"spans": some_spans(), "logits": torch.randn(4, 9)}
        | scores
        | {"strict": torch.tensor([True, False])},
    }[operation]


Wrong = tuple[dict[str, Any], type[Exception], str]
# How a row of logits is mapped, and which rows are scored: the same in three operations.
MAP: list[Wrong] = [
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; give a finite number above 0"),
    ({"temperature": -1.0}, ValueError, "temperature is -1.0; give a finite number above 0"),
    ({"temperature": NAN}, ValueError, "temperature is nan; give a finite number above 0"),
    ({"temperature": INF}, ValueError, "temperature is inf; give a finite number above 0"),
    ({"temperature": None}, TypeError, "temperature is None; give a Python number"),
    ({"temperature": "1"}, TypeError, "temperature is '1'; give a Python number"),
    ({"temperature": torch.tensor(1.0)}, TypeError, "temperature is tensor(1.); give a Python number"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0; give a finite number above 0"),
    ({"softcap": -3.0}, ValueError, "softcap is -3.0; give a finite number above 0, or None"),
    ({"softcap": INF}, ValueError, "softcap is inf; give a finite number above 0, or None"),
    ({"valid_vocab": 0}, ValueError, "valid_vocab is 0; give at least 1, or None"),
    ({"valid_vocab": -2}, ValueError, "valid_vocab is -2; give at least 1, or None"),
    ({"valid_vocab": 2.5}, TypeError, "valid_vocab is 2.5; give a whole number"),
    ({"valid_vocab": 10}, ValueError, "valid_vocab is 10, but the logits have 9 columns; give at most that"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'; give one of"),
    ({"impl": None}, ValueError, "impl is None; give one of"),
]
ROWS: list[Wrong] = [
    ({"targets": torch.zeros(4)}, TypeError, "targets is torch.float32; give int64 or int32"),
    ({"targets": of(1, 2, 3, 4).bool()}, TypeError, "targets is torch.bool; give int64 or int32"),
    ({"targets": meta(4, dtype=LONG)}, ValueError, "targets is on meta, the scores on cpu; move it"),
    ({"targets": [0, 0, 0, 0]}, TypeError, "targets is a list; give a tensor"),
    ({"targets": of(1, 2, 3)}, ValueError, "targets has shape (3,)"),
    ({"rows": of(0, 1, 2)}, ValueError, "rows has shape (3,), targets (4,); give both as [T]"),
    ({"rows": torch.zeros(4)}, TypeError, "rows is torch.float32; give int64 or int32"),
    ({"rows": [0, 1, 2, 3]}, TypeError, "rows is a list; give a tensor"),
    ({"rows": meta(4, dtype=LONG)}, ValueError, "rows is on meta, the scores on cpu; move it"),
    (
        {"rows": of(0, 1, 2, 3).view(2, 2), "targets": of(0, 1, 2, 3).view(2, 2)},
        ValueError,
        "rows has shape (2, 2), targets (2, 2); give both as [T]",
    ),
]
WANTED: list[Wrong] = [
    ({"want": "logp"}, TypeError, "want is the string 'logp'; give a tuple"),
    ({"want": ("perplexity",)}, ValueError, "want is ('perplexity',); give one or more of"),
    ({"want": ()}, ValueError, "want is (); give one or more of"),
    ({"want": None}, TypeError, "want is None; give a tuple"),
    ({"topk": 0}, ValueError, "topk is 0; give at least 1"),
    ({"topk": 2.5}, TypeError, "topk is 2.5; give a whole number"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index is 1.5; give an int"),
    ({"ignore_index": None}, TypeError, "ignore_index is None; give an int"),
]
LOGITS: list[Wrong] = [
    ({"logits": torch.zeros(4, 9, dtype=LONG)}, TypeError, "logits is torch.int64; give a floating-point"),
    ({"logits": torch.zeros(4, 0)}, ValueError, "logits has shape (4, 0); give [..., V] with V at least 1"),
    ({"logits": torch.tensor(1.0)}, ValueError, "logits has shape (); give [..., V]"),
    ({"logits": [[0.0]]}, TypeError, "logits is a list; give a tensor"),
    ({"logits": torch.zeros(4, 9).to_sparse()}, TypeError, "give logits.to_dense()"),
]
HEAD: list[Wrong] = [
    ({"hidden": [[0.0]]}, TypeError, "hidden is a list; give a tensor"),
    (
        {"hidden": torch.zeros(4, 3, dtype=LONG)},
        TypeError,
        "hidden is torch.int64; give fp32, bf16, fp16 or fp64",
    ),
    (
        {"hidden": torch.tensor(1.0)},
        ValueError,
        "hidden has shape (), weight (9, 3); give [..., D] and [V, D]",
    ),
    (
        {"hidden": torch.zeros(4, 3).double()},
        TypeError,
        "hidden is torch.float64, weight torch.float32; give",
    ),
    (
        {"weight": torch.zeros(9, 3).double()},
        TypeError,
        "hidden is torch.float32, weight torch.float64; give",
    ),
    ({"weight": torch.zeros(9, 3, dtype=LONG)}, TypeError, "weight is torch.int64; give fp32"),
    ({"weight": torch.zeros(9)}, ValueError, "weight (9,); give [..., D] and [V, D]"),
    ({"weight": torch.zeros(9, 4)}, ValueError, "hidden has shape (4, 3), weight (9, 4); give"),
    (
        {"weight": torch.zeros(0, 3)},
        ValueError,
        "weight (0, 3); give [..., D] and [V, D], V and D at least 1",
    ),
    (
        {"hidden": torch.zeros(4, 0), "weight": torch.zeros(9, 0)},
        ValueError,
        "hidden has shape (4, 0), weight (9, 0); give [..., D] and [V, D], V and D at least 1",
    ),
    ({"weight": meta(9, 3)}, ValueError, "weight is on meta, hidden on cpu; move one of them"),
    ({"bias": torch.zeros(8)}, ValueError, "bias has shape (8,), weight (9, 3); give [V]"),
    ({"bias": torch.zeros(9, 1)}, ValueError, "bias has shape (9, 1), weight (9, 3); give [V]"),
    ({"bias": torch.zeros(9, dtype=LONG)}, TypeError, "bias is torch.int64; give fp32"),
    ({"bias": meta(9)}, ValueError, "bias is on meta, hidden on cpu; move one of them"),
    ({"memory": 0}, ValueError, "memory is 0; give at least 1, or None"),
    ({"memory": -5}, ValueError, "memory is -5; give at least 1, or None"),
    ({"memory": 1.5}, TypeError, "memory is 1.5; give a whole number"),
]
LOSS: list[Wrong] = [
    ({"logp_old": torch.zeros(3)}, ValueError, "logp_old: got shape [3], wanted that of logp, [4]"),
    ({"logp_old": meta(4)}, ValueError, "logp_old: got a tensor on meta, wanted cpu"),
    ({"logp_ref": torch.zeros(3)}, ValueError, "logp_ref: got shape [3], wanted that of logp, [4]"),
    ({"logp_ref": meta(4)}, ValueError, "logp_ref: got a tensor on meta, wanted cpu"),
    ({"advantage": torch.ones(3)}, ValueError, "advantage: got shape [3], wanted one per completion, [2]"),
    ({"advantage": meta(2)}, ValueError, "advantage: got a tensor on meta, wanted cpu"),
    ({"advantage": [1.0, 1.0]}, TypeError, "advantage is a list; give a tensor"),
    (
        {"offsets": torch.tensor([0.0, 2.0, 4.0])},
        ValueError,
        "offsets: got torch.float32 of shape [3], wanted int64",
    ),
    ({"offsets": meta(3, dtype=LONG)}, ValueError, "offsets: got a tensor on meta, wanted cpu"),
    ({"offsets": of(0, 3, 2, 4)}, ValueError, "offsets must rise from 0 to 4"),
    ({"offsets": of(0, 2, 3)}, ValueError, "offsets must rise from 0 to 4"),
    ({"offsets": of(1, 2, 4)}, ValueError, "offsets must rise from 0 to 4"),
    ({"offsets": of(0, 2, 5)}, ValueError, "offsets must rise from 0 to 4"),
    (
        {"offsets": of(0, 2, 4, 4).view(2, 2)},
        ValueError,
        "offsets: got torch.int64 of shape [2, 2], wanted int64",
    ),
    ({"offsets": of()}, ValueError, "offsets: got torch.int64 of shape [0], wanted int64"),
    ({"kind": "ppo"}, ValueError, "kind: got 'ppo', wanted 'grpo'"),
    ({"kind": "dr_grpo"}, ValueError, "max_length: got None, wanted the longest"),
    ({"kl": -1.0}, ValueError, "kl: got -1.0, wanted a finite weight"),
    ({"kl": NAN}, ValueError, "kl: got nan, wanted a finite weight"),
    ({"kl": 0.1}, ValueError, "kl: got 0.1 without logp_ref; pass"),
    ({"kl_estimator": "k9"}, ValueError, "kl_estimator: got 'k9', wanted 'k1'"),
    ({"eps_low": -0.1}, ValueError, "eps_low, eps_high: got -0.1, 0.2, wanted"),
    ({"eps_low": NAN}, ValueError, "eps_low, eps_high: got nan, 0.2, wanted"),
    ({"eps_high": -1.0}, ValueError, "eps_low, eps_high: got 0.2, -1.0, wanted"),
    ({"num_tokens": -1}, ValueError, "num_tokens: got -1, wanted a count"),
    ({"num_tokens": NAN}, ValueError, "num_tokens: got nan, wanted a count"),
    ({"num_sequences": None}, TypeError, "num_sequences: got None, wanted a count"),
]
PACKED: list[Wrong] = [
    (
        {"logp": torch.zeros(4, dtype=LONG)},
        ValueError,
        "logp has shape (4,) and dtype torch.int64; give floats",
    ),
    (
        {"logp": torch.zeros(2, 2)},
        ValueError,
        "logp has shape (2, 2) and dtype torch.float32; give floats as [T]",
    ),
    ({"logp": [0.0]}, TypeError, "logp is a list; give a tensor"),
    ({"offsets": torch.tensor([0.0, 4.0])}, TypeError, "offsets is torch.float32; give int64 or int32"),
    ({"offsets": meta(3, dtype=LONG)}, ValueError, "offsets is on meta, the scores on cpu; move it"),
    ({"offsets": [0, 2, 4]}, TypeError, "offsets is a list; give a tensor"),
    (
        {"offsets": of(0, 3, 2, 4)},
        ValueError,
        "offsets must rise from 0 to 4 (the length of logp) and never fall",
    ),
    ({"offsets": of(1, 2, 4)}, ValueError, "offsets must rise from 0 to 4"),
    ({"offsets": of(0, 2, 3)}, ValueError, "offsets must rise from 0 to 4"),
    ({"offsets": of(0, 2, 5)}, ValueError, "offsets must rise from 0 to 4"),
    ({"offsets": of()}, ValueError, "offsets has shape (0,); give [S + 1]"),
    ({"offsets": of(0, 2, 4)[None]}, ValueError, "offsets has shape (1, 3); give [S + 1]"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'; give one of"),
]
WEIGHTS: list[Wrong] = [
    ({"eta": -1.0}, ValueError, "eta is -1.0; give a finite number"),
    ({"eta": NAN}, ValueError, "eta is nan; give a finite number"),
    ({"eta": "0.1"}, TypeError, "eta is '0.1'; give a Python number"),
    ({"first_index": 2}, ValueError, "first_index is 2; give 1 (the paper's) or 0"),
]
LAM: list[Wrong] = [
    ({"lam": -1.0}, ValueError, "lam is -1.0; give a finite number"),
    ({"lam": INF}, ValueError, "lam is inf; give a finite number"),
]
BINS: list[Wrong] = [
    ({"tau": 0.0}, ValueError, "tau is 0.0; give a bin width in (0, 0.5]"),
    ({"tau": 0.6}, ValueError, "tau is 0.6; give a bin width in (0, 0.5]"),
    ({"tau": NAN}, ValueError, "tau is nan; give a bin width in (0, 0.5]"),
    ({"tau": None}, TypeError, "tau is None; give a Python number"),
    ({"delta": 0.0}, ValueError, "delta is 0.0; give a probability in (0, 1)"),
    ({"delta": 1.0}, ValueError, "delta is 1.0; give a probability in (0, 1)"),
    ({"penalty": -1.0}, ValueError, "penalty is -1.0; give a finite number"),
    ({"min_bonus": -1.0}, ValueError, "min_bonus is -1.0; give a finite number"),
    ({"variant": "ours"}, ValueError, "variant is 'ours'; give one of"),
]
SCORES: list[Wrong] = [
    ({"score": torch.zeros(3)}, ValueError, "score has shape (3,); offsets describes 2 spans: give [S]"),
    ({"score": torch.zeros(2, 1)}, ValueError, "score has shape (2, 1); offsets describes 2 spans: give [S]"),
    ({"score": meta(2)}, ValueError, "score is on meta, offsets on cpu; move one of them"),
    ({"score": [0.5, 0.5]}, TypeError, "score is a list; give a tensor"),
]
GROUPS: list[Wrong] = [
    ({"group": of(0, 0, 0)}, ValueError, "group has shape (3,); offsets describes 2 spans: give [S]"),
    ({"group": torch.zeros(2)}, TypeError, "group is torch.float32; give int64 or int32"),
    ({"group": meta(2, dtype=LONG)}, ValueError, "group is on meta, offsets on cpu; move one of them"),
]
REWARDS: list[Wrong] = [
    (
        {"spans": [Found(0, 1)]},
        TypeError,
        "spans is a list; give Spans(rows, targets, offsets, group, owner)",
    ),
    ({"spans": None}, TypeError, "spans is a NoneType; give Spans"),
    ({"memory": 0}, ValueError, "memory is 0; give at least 1, or None"),
    ({"memory": 1.5}, TypeError, "memory is 1.5; give a whole number"),
    ({"strict": of(1, 0)}, TypeError, "strict is torch.int64; give bool"),
    (
        {"strict": torch.tensor([True])},
        ValueError,
        "strict has shape (1,); offsets describes 2 spans: give [S]",
    ),
    ({"strict": meta(2, dtype=torch.bool)}, ValueError, "strict is on meta, offsets on cpu; move"),
    ({"logits": None}, ValueError, "got nothing; give exactly one of logits, hidden with weight, or logp"),
    ({"logp": torch.zeros(4)}, ValueError, "got ['logits', 'logp']; give exactly one of"),
    ({"logits": None, "logp": torch.zeros(3)}, ValueError, "offsets must rise from 0 to 3"),
    ({"weight": torch.zeros(9, 3)}, ValueError, "hidden and weight go together: give both"),
    ({"bias": torch.zeros(9)}, ValueError, "bias is given without hidden and weight; give all three"),
    ({"group_size": 0}, ValueError, "group_size is 0; give at least 1"),
    ({"group_size": 1.5}, TypeError, "group_size is 1.5; give a whole number"),
    ({"group_size": 3}, ValueError, "group_size is 3, which does not divide the 2 spans; leave it out"),
    ({"group_size": 1}, ValueError, "group_size is 1, but a group is split or incomplete: give"),
]
REDUCES: list[Wrong] = [({"reduce": "max"}, ValueError, "reduce is 'max'; give one of ('mean'")]
TABLE: dict[str, list[Wrong]] = {
    "token_stats": MAP + ROWS + WANTED + LOGITS,
    "linear_token_stats": MAP + ROWS + WANTED + HEAD,
    "linear_policy_loss": MAP + ROWS + HEAD + LOSS,
    "policy_loss": LOSS,
    "scre": PACKED + WEIGHTS + LAM,
    "span_logp": PACKED + WEIGHTS + REDUCES,
    "igsr": PACKED + BINS + SCORES + GROUPS,
    "confidence_rewards": MAP + WEIGHTS + LAM + BINS + SCORES + REWARDS + LOGITS[:1] + LOGITS[3:4],
}


@every_impl
@pytest.mark.parametrize(
    ("operation", "change", "error", "message"),
    [pytest.param(name, *wrong, id=f"{name}-{wrong[2]}") for name, table in TABLE.items() for wrong in table],
)
def test_refused(
    operation: str, change: dict[str, Any], error: type[Exception], message: str, impl: str
) -> None:
    options = {} if operation == "policy_loss" else {"impl": impl}
    call: Callable[..., Any] = getattr(rc, operation)
    with pytest.raises(error) as refused:
        call(**(arguments(operation) | options | change))
    assert message in str(refused.value)


@every_impl
@pytest.mark.parametrize("operation", list(TABLE))
def test_what_the_table_changes_is_accepted_unchanged(operation: str, impl: str) -> None:
    options = {} if operation == "policy_loss" else {"impl": impl}
    getattr(rc, operation)(**arguments(operation), **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": [0, 1, 2, 3]}, TypeError, "rows: got list, wanted an int64 tensor; use torch.tensor"),
        ({"rows": torch.zeros(4)}, TypeError, "rows: got torch.float32 of shape [4], wanted int64"),
        ({"rows": of(0, 1, 2, 3).int()}, TypeError, "rows: got torch.int32 of shape [4], wanted int64"),
        ({"targets": of(1, 2, 3)}, ValueError, "targets: got 3 entries, wanted 4"),
        ({"targets": of(1, 2, -100, 4)}, ValueError, "targets[2]: got -100, wanted 0 or more; leave"),
        ({"rows": of(0, -1, 2, 3)}, ValueError, "rows[1]: got -1, wanted 0 or more"),
        ({"offsets": of(0, 3, 2, 4)}, ValueError, "offsets: got [0, 3, 2, 4], wanted"),
        ({"offsets": of(1, 2, 4)}, ValueError, "offsets: got [1, 2, 4], wanted"),
        ({"offsets": of()}, ValueError, "offsets: got [], wanted"),
        ({"offsets": of(0, 2, 5)}, ValueError, "rows: got 4 entries, wanted 5"),
        ({"group": of(0)}, ValueError, "group: got 1 entries, wanted 2"),
        ({"owner": of(0, 1).view(2, 1)}, TypeError, "owner: got torch.int64 of shape [2, 1], wanted"),
        ({"owner": meta(2, dtype=LONG)}, ValueError, "owner: got a tensor on meta, wanted the CPU; build"),
    ],
)
def test_spans_are_refused_when_built(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refused:
        Spans(**(vars(some_spans()) | change))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"found": [Found(0, 1)]}, ValueError, "found: got 1 entries, wanted one for each of 2"),
        ({"first_rows": [0]}, ValueError, "first_rows: got 1 entries, wanted one for each of 2"),
        ({"first_rows": torch.zeros(2)}, TypeError, "first_rows: got torch.float32 of shape [2], wanted"),
        ({"group": [0, 0, 0]}, ValueError, "group: got 3 entries, wanted one for each of 2"),
        ({"found": [Found(0, 1), Found(0, 9)]}, ValueError, "found[1]: got tokens 0..9, wanted them inside"),
        ({"completion_ids": [1, 2]}, TypeError, "completion_ids[0]: got int, wanted a list"),
        ({"first_rows": [-5, 0]}, ValueError, "rows[0]: got -5, wanted 0 or more"),
    ],
)
def test_what_was_found_is_refused_when_packed(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {
        "found": [Found(0, 1), Found(1, 2)],
        "completion_ids": [[5, 6], [7, 8]],
        "first_rows": [0, 2],
        "group": [0, 0],
    }
    with pytest.raises(error) as refused:
        build_spans(**(good | change))
    assert message in str(refused.value)
