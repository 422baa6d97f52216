"""Signals, steps that are not finite, and the log of a resumed run."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from raise_trainer.checkpoints import StepGuard, TooManyBadSteps, graceful_stop, truncate_log
from raise_trainer.checkpoints.files import Reader
from tests.budget import assert_exact


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_the_flag_and_handlers_return(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with graceful_stop() as stop:
        assert (stop.asked, stop.agreed(), stop.signal) == (False, False, None)
        os.kill(os.getpid(), number)
        assert (stop.asked, stop.agreed(), stop.signal) == (True, True, number.name)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == number.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_handlers_return_after_an_exception_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), graceful_stop():
        assert signal.getsignal(signal.SIGTERM) != before
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_it_says_so() -> None:
    said: list[str] = []

    def work() -> None:
        try:
            with graceful_stop():
                said.append("entered")
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == ["graceful_stop: call it in the main thread; Python handles signals there alone"]


BATCH = {"ids": torch.arange(6).reshape(2, 3), "half": torch.ones(2).bfloat16(), "names": ["a", {1}]}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_bad_step_is_skipped_counted_and_dumped(bad: float, name: str, tmp_path: Path) -> None:
    said: list[str] = []
    guard = StepGuard(tmp_path, say=said.append)
    good: dict[str, Any] = {"loss": 1.0, "grad_norm": torch.tensor(2.0)}
    assert guard.good(11, batch=BATCH, **good)
    assert not guard.good(12, batch=BATCH, **{**good, name: torch.tensor(bad)})
    assert (guard.skipped, guard.in_a_row) == (1, 1) and len(said) == 1
    assert f"step 12 is skipped, number 1 in a row: loss {bad if name == 'loss' else 1.0}" in said[0]
    dump = Reader(tmp_path / "bad-step-12").tree("batch")
    assert dump["step"] == 12 and repr(dump["figures"][name]) == repr(bad)
    for key in ("ids", "half"):
        assert_exact(dump["batch"][key], BATCH[key], name=key)  # type: ignore[arg-type]
    assert dump["batch"]["names"] == ["a", "{1}"]
    assert [path.name for path in tmp_path.iterdir()] == ["bad-step-12"]


def test_only_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    guard = StepGuard(tmp_path, limit=3, keep=4, say=lambda text: None)
    nan = float("nan")
    taken = [guard.good(i, loss=x) for i, x in enumerate([nan, nan, 1.0, nan, nan])]
    assert taken == [False, False, True, False, False]
    again = StepGuard(tmp_path, limit=3, keep=4)
    again.load_state_dict(guard.state_dict())
    assert guard.state_dict() == {"skipped": 4, "in_a_row": 2}
    with pytest.raises(
        TooManyBadSteps, match=r"step 5 is skipped, number 3 in a row: loss nan.*look at the batch"
    ):
        again.good(5, loss=nan)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"bad-step-{i}" for i in (1, 3, 4, 5)]


def test_a_dump_that_fails_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="step 1 is skipped.*batch: not dumped, .*Not a directory"):
        assert not StepGuard(tmp_path / "file").good(1, loss=float("nan"))


@pytest.mark.parametrize("options", [{"limit": 0}, {"keep": 0}])
def test_wrong_options(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got 0, wanted 1 or more"):
        StepGuard(tmp_path, **options)  # type: ignore[arg-type]


def write(file: Path, *records: tuple[str, int], end: str = "") -> None:
    file.write_text("".join(json.dumps({"stage": a, "step": b}) + "\n" for a, b in records) + end)


def read(file: Path) -> list[tuple[str, int]]:
    return [(r["stage"], r["step"]) for r in map(json.loads, file.read_text().splitlines())]


def test_a_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert truncate_log(file, 3) == 0 and not file.exists()
    records = [("sft", 0), ("sft", 1), ("grpo", 0), ("grpo", 1), ("grpo", 2)]
    write(file, *records)
    assert truncate_log(file, 3, stage="grpo") == 0 and read(file) == records
    write(file, *records, end='{"stage": "grpo", "st')
    assert truncate_log(file, 2, stage="grpo") == 2 and read(file) == records[:4]
    assert truncate_log(file, 1, stage="sft") == 3 and read(file) == records[:1]
    assert truncate_log(file, 0) == 1 and file.read_bytes() == b""
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_lines_without_a_step_stay_and_broken_ones_are_named(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"note": 1}\n{"step": 0}\n{"note": 2}\n{"step": 1}\n')
    assert truncate_log(file, 1) == 1
    assert file.read_text() == '{"note": 1}\n{"step": 0}\n{"note": 2}\n'
    file.write_text('{"step": 0}\n[1]\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2: got b'\[1\]"):
        truncate_log(file, 1)
