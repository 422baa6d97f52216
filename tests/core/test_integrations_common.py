"""Grading rows, and the way from log-probabilities to rewards, here and over processes."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch import multiprocessing as mp

import raise_core as rc
from raise_core.integrations import common
from tests.budget import assert_as_exact_as_fp32, assert_exact
from tests.core.adapter_cases import encode, tokenizer

TEXTS = ["hm <answer>B</answer>", "<answer>B</answer> well", "<answer>A</answer>", "none"]


def test_grade() -> None:
    got = common.grade(
        [*TEXTS, "<answer>blue ball</answer>"],
        ["B", "B", "B", "B", None],
        ["multiple choice", "multiple_choice", "free-form", "numerical", "free-form"],
    )
    assert got.score.tolist() == [1, 1, 0, 0, 0]
    assert got.strict.tolist() == [True, True, False, True, False]
    assert got.usable == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("solutions", "kinds", "wanted"),
    [
        (
            ["B", "B"],
            ["multiple_choice", "riddle"],
            "row 1: kind: got 'riddle', wanted one of multiple_choice",
        ),
        (["B", "B"], ["multiple_choice", None], "row 1: kind"),
        (["B", 7], "multiple_choice", "row 1: solution: got int"),
        (["B"], "multiple_choice", "solutions: got 1, wanted one for each of 2"),
        (["B", "B"], ["numerical"], "kinds: got 1"),
    ],
)
def test_grade_names_the_row(solutions: Any, kinds: Any, wanted: str) -> None:
    with pytest.raises((TypeError, ValueError), match=wanted):
        common.grade(["<answer>B</answer>"] * 2, solutions, kinds)


def test_column() -> None:
    assert common.column({"a": (1, 2)}, "a", 2, "x") == [1, 2]
    with pytest.raises(ValueError, match=r"column 'b' \(the right answers\) is missing, got \['a'\]"):
        common.column({"a": [1]}, "b", 1, "the right answers")
    with pytest.raises(ValueError, match="column 'a': got 1 values, wanted one for each of 2"):
        common.column({"a": [1]}, "a", 2, "x")


def hand() -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """Log-probabilities [2, C] of `hm <answer>B</answer>` and of an answer of two tokens."""
    ids = [encode(TEXTS[0]), encode("<answer>BB</answer>")]
    logps = torch.full((2, 9), -7.0)
    logps[0, ids[0].index(encode("B")[0])] = math.log(0.5)
    logps[1, 1:3] = torch.tensor([0.8, 0.4]).log()
    return logps, ids, torch.tensor([1.0, 1.0])


def test_rewards_from_logps_by_hand() -> None:
    logps, ids, score = hand()
    made = common.rewards_from_logps(logps, ids, tokenizer(), score, torch.tensor([True, True]), ["a", "b"])
    first = 0.5 ** math.exp(-0.1)
    second = 0.8 ** math.exp(-0.1) * 0.4 ** math.exp(-0.2) * math.exp(-0.04)
    for got, want in zip(made.reward.tolist(), (first, second), strict=True):
        assert_as_exact_as_fp32(got, want, name="SCRE")


def test_rows_may_be_lists_and_padding_is_never_read() -> None:
    logps, ids, score = hand()
    strict = torch.tensor([True, True])
    whole = common.rewards_from_logps(logps, ids, tokenizer(), score, strict, [0, 1])
    logps[0, len(ids[0]) :] = math.nan
    rows = [row[: len(i)].tolist() for row, i in zip(logps, ids, strict=True)]
    for given_logps in (logps, rows):
        again = common.rewards_from_logps(given_logps, ids, tokenizer(), score, strict, [0, 1])
        assert_exact(again.reward, whole.reward, name="reward")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"temperature": 0.7}, r"logits / 0\.7, wanted those at temperature 1"),
        (
            {"group_size": 2},
            "group 0: got 1 completions, wanted group_size 2; a group is split over processes",
        ),
        ({"logps": torch.zeros(1, 9)}, "logps: got 1 rows, wanted one for each of 2"),
        ({"logps": torch.zeros(2, 3)}, r"logps\[0\]: got 3 log-probabilities, wanted 6"),
        ({"logps": torch.full((2, 9), math.nan)}, r"logps\[0\]: got \[nan\] inside the answer"),
    ],
)
def test_rewards_from_logps_refuses(change: dict[str, Any], wanted: str) -> None:
    logps, ids, score = hand()
    call = {"logps": logps, "completion_ids": ids, "tokenizer": tokenizer(), "score": score,
            "strict": torch.tensor([True, True]), "group": [0, 1]}  # fmt: skip
    with pytest.raises(ValueError, match=wanted):
        common.rewards_from_logps(**{**call, **change})


def test_another_temperature_can_be_accepted() -> None:
    logps, ids, score = hand()
    for temperature in (1.0, 0.7):
        made = common.rewards_from_logps(
            logps, ids, tokenizer(), score, torch.tensor([True, True]), [0, 1],
            temperature=temperature, any_temperature=True,
        )  # fmt: skip
        assert made.reward.min() > 0


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_share_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match="confidence_share: got"):
        common.mixed(torch.zeros(1), torch.zeros(1), share)


CASES = st.lists(
    st.tuples(
        st.sampled_from(["x", "y", "z"]),
        st.lists(st.floats(-9, 0, width=32), max_size=4),
        st.sampled_from([0.0, 0.25, 0.5, 0.55, 1.0]),
        st.booleans(),
    ),
    max_size=8,
)


@given(CASES)
def test_rewards_of_answers_are_confidence_rewards(rows: list[tuple[str, list[float], float, bool]]) -> None:
    """However the answers are packed, keys of any kind, in any order."""
    logps = [torch.tensor(row[1], dtype=torch.float32) for row in rows]
    score = torch.tensor([row[2] for row in rows])
    strict = torch.tensor([row[3] for row in rows], dtype=torch.bool)
    keys = [row[0] for row in rows]
    made = common.rewards_of_answers(logps, score, strict, common.number_groups(keys))
    flat = torch.cat([*logps, torch.zeros(0)])
    offsets = torch.tensor([0, *map(len, logps)]).cumsum(0)
    groups = torch.tensor([ord(key) for key in keys], dtype=torch.long)
    scre = score * rc.scre(flat, offsets)
    igsr = rc.igsr(flat, offsets, torch.where(strict, 0.0, score), groups)  # strict rows are in no bin
    assert_exact(made.reward, torch.where(strict, scre, igsr), name="reward")
    alone = common.rewards_over_processes(logps, score, strict, keys)
    assert_exact(alone.reward, made.reward, name="one process")


ROWS = [
    ("p", -0.5, 0.5),
    ("p", -0.1, 0.5),
    ("q", -1.0, 1.0),
    ("p", -2.0, 0.5),
    ("p", -0.3, 0.8),
    ("q", -0.2, 0.9),
]


def _rewards(rows: list[tuple[str, float, float]], **options: Any) -> torch.Tensor:
    made = common.rewards_over_processes(
        [torch.tensor([logp]) for _, logp, _ in rows], torch.tensor([s for *_, s in rows]),
        torch.zeros(len(rows), dtype=torch.bool), [key for key, *_ in rows], **options,
    )  # fmt: skip
    return made.reward


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mine = ROWS[:3] if rank == 0 else ROWS[3:]
    torch.save(_rewards(mine), f"{folder}/{rank}.pt")
    try:
        _rewards(mine, group_size=4)
    except ValueError as error:
        Path(f"{folder}/{rank}.txt").write_text(str(error))
    dist.barrier()  # a process that closes while another still connects takes it down
    dist.destroy_process_group()


def test_a_group_on_two_processes_is_gathered(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_exact(torch.cat(parts), _rewards(ROWS), name="gathered")
    assert not torch.equal(parts[0], _rewards(ROWS[:3])), "the group's other rows made no difference"
    for rank in range(2):  # group q has two of four rows wherever one looks
        assert "group 1: got 2 completions, wanted group_size 4" in (tmp_path / f"{rank}.txt").read_text()
