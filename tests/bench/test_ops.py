"""Every case runs; --check fails for what is slow, wrong, greedy or missing; a wrong result gets no ratio."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import first_call, limits, logits_cases, ops, peers, run_case
from bench.cases import Call, Case, Impl, Truth, errors, gate
from bench.measure import Cpu

T, V = 4, 64


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and records of the quick profile."""
    out = tmp_path_factory.mktemp("ops") / "records.jsonl"
    status = ops.main(["--quick", "--check", "--threads", "1", "--out", str(out)])
    return status, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_every_case_runs_and_is_right(quick: tuple[int, list[dict[str, Any]]]) -> None:
    status, records = quick
    assert status == 0
    assert {(r["case"], r["dtype"]) for r in records} == {
        (case, dtype)
        for case in (
            "logp",
            limits.THREE,
            "linear forward",
            "linear forward + backward",
            "linear policy loss",
        )
        for dtype in ("float32", "bfloat16")
    }
    ours = [r for r in records if r["role"] in ("ours", "floor")]
    assert len(ours) == 20 and {r["gate"] for r in ours} == {"green"}


@pytest.mark.slow
def test_a_record_says_what_it_was_made_with(quick: tuple[int, list[dict[str, Any]]]) -> None:
    for record in quick[1]:
        assert {
            "commit",
            "dirty",
            "processor",
            "device",
            "threads",
            "torch",
            "packages",
            "case",
            "shape",
        } <= set(record)
        if record["status"] == "ran":
            assert record["low_s"] <= record["median_s"] <= record["high_s"] and record["samples"] == 1
            assert record["gb_per_s"] > 0 and record["extra_bytes"] >= 0
        else:
            assert record["reason"]


@pytest.mark.slow
def test_the_gradients_of_both_dtypes_are_compared(quick: tuple[int, list[dict[str, Any]]]) -> None:
    rows = [
        r
        for r in quick[1]
        if r["role"] == "ours" and r["case"] in ("linear forward + backward", "linear policy loss")
    ]
    assert len(rows) == 4 and all({"grad_hidden", "grad_weight"} < set(r["error"]) for r in rows)


class Fake:
    """Logits whose fp64 logp is known."""

    def __init__(self) -> None:
        self.x = torch.linspace(-1, 1, T)

    def few(self) -> Fake:
        return self

    def truth(self) -> dict[str, Truth]:
        return {"logp": Truth(self.x.double(), 1e-7)}


def fake_case(ours: Callable[[Fake], Call], *others: Impl, eager_s: float = 0.004) -> Case:
    impls = (
        Impl("amax", "unit", lambda x: lambda: pause(0.002, {})),
        Impl("raise-core", "ours", ours),
        Impl("eager, reused memory", "eager", lambda x: lambda: pause(eager_s, {"logp": x.x})),
        *others,
    )
    return Case("logp", "float32", {"T": T, "V": V}, Fake, impls, "amax", T * V * 4)


def pause(seconds: float, value: dict[str, Tensor]) -> dict[str, Tensor]:
    time.sleep(seconds)
    return value


def checked(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> tuple[int, str]:
    """Exit status of --check over one case, and what it printed."""
    monkeypatch.setattr(ops, "cases", lambda kind, quick: [case])
    monkeypatch.setattr(run_case, "JUDGED", (0.05, 3))
    monkeypatch.setattr(run_case, "OTHERS", (0.05, 1))
    monkeypatch.setattr(Cpu, "peak", lambda self, call: (call(), 0))
    options = ["--check", "--only", "logp", "--threads", "1", "--out", str(tmp_path / "records.jsonl")]
    status = ops.main(options)
    return status, capsys.readouterr().out


def quick_and_right(x: Fake) -> Call:
    return lambda: pause(0.002, {"logp": x.x})


def test_check_passes_what_is_fast_and_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, printed = checked(fake_case(quick_and_right, eager_s=0.02), monkeypatch, capsys, tmp_path)
    assert status == 0 and "falls short" not in printed
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 3


def test_check_fails_what_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    slow = fake_case(lambda x: lambda: pause(0.04, {"logp": x.x}))
    status, printed = checked(slow, monkeypatch, capsys, tmp_path)
    assert status == 1
    short = [line for line in printed.splitlines() if "falls short" in line]
    assert len(short) == 2 and "× amax" in short[0] and "× eager, reused memory" in short[1]
    assert "Faster than raise-core here: eager, reused memory" in printed


def test_a_wrong_result_gets_no_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = fake_case(lambda x: lambda: {"logp": x.x + 1e-3})
    status, printed = checked(wrong, monkeypatch, capsys, tmp_path)
    assert status == 1 and "not judged: the result is wrong" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| raise-core |"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[4] == "" and cells[5] == "" and "no ratio is given" in row
    assert "Faster than" not in printed


@pytest.mark.parametrize("logp", [torch.full((T,), float("nan")), torch.zeros(T + 1)])
def test_nan_and_a_wrong_shape_are_wrong(logp: Tensor) -> None:
    truth = Fake().truth()
    green, _ = gate(errors({"logp": logp}, truth), truth, None)
    assert not green


def test_no_output_is_wrong() -> None:
    assert not gate(errors({"other": torch.zeros(T)}, Fake().truth()), Fake().truth(), None)[0]


def test_the_budget_is_twice_the_peer_and_one_rounding() -> None:
    truth = {"logp": Truth(torch.tensor([-1.0], dtype=torch.float64), 1e-6)}
    eps = torch.finfo(torch.float32).eps
    for off, green in ((1.9e-6, True), (2e-6 + 0.5 * eps, True), (2e-6 + 2.5 * eps, False)):
        got = errors({"logp": torch.tensor([-1.0 + off])}, truth)
        assert gate(got, truth, None)[0] == green


def test_gradients_are_held_to_the_eager_run() -> None:
    truth = {"grad": Truth(torch.zeros(2, dtype=torch.float64), None)}
    eager = errors({"grad": torch.tensor([0.0, 1e-3])}, truth)
    assert gate(errors({"grad": torch.tensor([1.9e-3, 0.0])}, truth), truth, eager)[0]
    assert not gate(errors({"grad": torch.tensor([2.1e-3, 0.0])}, truth), truth, eager)[0]


def test_what_does_not_run_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def absent(x: Fake) -> Call:
        peers.load("no_such_library", "anything")
        return dict

    def broken(x: Fake) -> Call:
        raise RuntimeError("needs another machine\nand more")

    others = (Impl("absent", "peer", absent), Impl("broken", "peer", broken))
    status, printed = checked(
        fake_case(quick_and_right, *others, eager_s=0.02), monkeypatch, capsys, tmp_path
    )
    assert status == 0
    assert "did not run: not installed; pip install -e '.[bench]'" in printed
    assert "did not run: RuntimeError: needs another machine |" in printed


def test_check_fails_when_ours_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(x: Fake) -> Call:
        raise RuntimeError("no")

    status, _ = checked(fake_case(broken), monkeypatch, capsys, tmp_path)
    assert status == 1


def record(**changes: Any) -> dict[str, Any]:
    made = {
        "case": "linear forward", "dtype": "float32", "shape": {"N": 2, "D": 2, "V": 8}, "status": "ran",
        "implementation": "raise-core", "role": "ours", "reason": "", "gate": "green", "error": {"logp": 0.0},
        "budget": {"logp": 0.0}, "median_s": 1.0, "extra_bytes": 0, "device_kind": "cpu", "quick": False,
    }  # fmt: skip
    return made | changes


@pytest.mark.parametrize(
    ("ours", "short"),
    [
        ({"median_s": 1.15, "extra_bytes": 64 << 20}, []),
        ({"median_s": 1.16}, ["time"]),
        ({"extra_bytes": (64 << 20) + 1}, ["extra memory"]),
        ({"extra_bytes": None}, ["extra memory"]),
        ({"gate": "red"}, ["raise-core: error against fp64", "time", "extra memory"]),
    ],
)
def test_limits(ours: dict[str, Any], short: list[str]) -> None:
    unit = record(implementation="GEMM", role="unit")
    verdicts = limits.judge([unit, record(**ours)])
    assert [v.what for v in verdicts if not v.ok] == short


def test_the_fastest_eager_counts_and_a_byte_a_logit_is_too_much() -> None:
    shape = {"T": 2, "V": 8}
    rows = [
        record(case="logp", shape=shape, implementation=name, role=role, median_s=s, extra_bytes=16)
        for name, role, s in (
            ("amax", "unit", 1.0), ("eager, fresh memory", "eager", 9.0),
            ("eager, reused memory", "eager", 2.0), ("raise-core", "ours", 2.5),
        )
    ]  # fmt: skip
    short = [v.found for v in limits.judge(rows) if not v.ok]
    assert short == ["1.25 × eager, reused memory", "0.0 MiB"]


def test_gpu_records_meet_the_limits_of_any_device_alone() -> None:
    rows = [
        record(device_kind="cuda", implementation=n, role=r)
        for n, r in (("GEMM", "unit"), ("raise-core", "ours"))
    ]
    assert [v.what for v in limits.judge(rows)] == ["raise-core: error against fp64"]


def test_a_gpu_gets_larger_shapes_and_one_row_of_ours() -> None:
    large = {c.name: c.shape for c in ops.cases("cuda", quick=False)}
    assert large["logp"] == {"T": 8192, "V": 151936} and large["linear forward"]["N"] == 8192
    for case in ops.cases("cuda", quick=False):
        assert [i.role for i in case.impls].count("ours") == 1 and "floor" not in {i.role for i in case.impls}


def test_the_switch_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv(logits_cases.SWITCH, "1")
    with pytest.raises(KeyError), logits_cases.switched("0"):
        assert os.environ[logits_cases.SWITCH] == "0"
        raise KeyError
    assert os.environ[logits_cases.SWITCH] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token_stats", "linear_token_stats"])
def test_a_first_call_finds_the_library_that_another_left(name: str) -> None:
    shape = (8, 32, 1003)
    assert first_call.seconds(1, shape, name=name, cached=True) > 0
    assert first_call.seconds(1, shape, name=name, compiled=False) > 0


def test_first_calls_are_recorded_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(
        threads: int, shape: tuple[int, int, int], *, name: str, compiled: bool, cached: bool
    ) -> float:
        if name == "linear_token_stats" and not compiled:
            raise RuntimeError("no")
        return 1.0 if compiled else 6.0

    monkeypatch.setattr(first_call, "seconds", seconds)
    records = [{"device_kind": "cpu"} | r for r in ops.first_records((256, 1024, 151936))]
    assert {(r["case"], r["implementation"]) for r in records} == {
        (case, f"raise-core{way}")
        for case in limits.FIRST_CALLS
        for way in ("", ", cached library", ", no C compiler")
    }
    short = [(v.case, v.found) for v in limits.judge(records) if not v.ok]
    assert ("first call", "6.00 s") in short and ("first linear call", "no") in short
    assert {case for case, _ in short} == set(limits.FIRST_CALLS) and len(short) == 3


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ops.main(["--only", "nothing of the kind"])
    assert "names no case" in capsys.readouterr().err


def test_parts_and_quick_runs_are_not_recorded_unasked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ops, "RESULTS", tmp_path)
    monkeypatch.setattr(ops, "cases", lambda kind, quick: [replace(fake_case(quick_and_right))])
    assert ops.main(["--quick", "--threads", "1"]) == 0
    assert not list(tmp_path.iterdir())
