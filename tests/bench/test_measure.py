"""Peaks, medians, rounds, and the events of a GPU that is not there."""

from __future__ import annotations

import platform

import pytest
import torch

from bench import measure

MEGABYTE = 1 << 20


@pytest.mark.skipif(platform.system() != "Linux", reason="peak memory is read from /proc")
def test_the_peak_of_a_call_is_seen_and_freed_memory_counts_again() -> None:
    machine = measure.Cpu()

    def call() -> int:
        return len(torch.ones(48 * MEGABYTE // 4).mul(2.0))

    for _ in range(2):
        kept, peak = machine.peak(call)
        assert kept == 48 * MEGABYTE // 4
        assert peak is not None and 95 * MEGABYTE < peak < 112 * MEGABYTE


def test_without_proc_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_reset_peak", lambda: False)
    assert measure.Cpu().peak(lambda: 3) == (3, None)


def test_median_and_quartiles() -> None:
    assert measure.timing([5.0, 1.0, 2.0, 4.0, 3.0]) == measure.Timing(3.0, 2.0, 4.0, 5)
    assert measure.timing([2.0]) == measure.Timing(2.0, 2.0, 2.0, 1)


def test_rounds_are_spread_evenly() -> None:
    plan = measure.rounds({"fast": (1.0, 8.0, 2), "slow": (4.0, 8.0, 1)})
    assert len(plan) == 8 and all("fast" in names for names in plan)
    assert [k for k, names in enumerate(plan) if "slow" in names] == [3, 7]


def test_rounds_have_a_least_and_a_most() -> None:
    plan = measure.rounds({"a": (100.0, 1.0, 2), "b": (1e-6, 1.0, 1)}, most=5)
    assert sum("a" in names for names in plan) == 2 and sum("b" in names for names in plan) == 5


class Event:
    """A CUDA event that keeps the order of what happens."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, other: Event) -> float:
        return 250.0


def test_a_gpu_is_timed_by_events_and_asked_for_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 30)
    assert measure.Gpu().seconds(lambda: Event.log.append("call")) == 0.25
    assert Event.log == ["record", "call", "record", "wait"]
    assert measure.Gpu().peak(lambda: "x") == ("x", 20)


def test_the_device_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert measure.device().kind == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure.device().kind == "cpu"
