"""Figures of a run in a tracker: the same run after a kill, failures counted, nothing killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from accelerate import tracking

from raise_trainer import trackers
from raise_trainer.errors import UserError
from raise_trainer.logbook import Logbook
from raise_trainer.trackers import Tracker, check_tracker


class Fake(tracking.GeneralTracker):
    """One of accelerate's trackers whose service is a dictionary: by run, the figures of each step."""

    name, requires_logging_directory, main_process_only = "fake", False, True
    service: ClassVar[dict[str, dict[int, dict[str, float]]]] = {}
    down: ClassVar[set[str]] = set()  # methods that fail

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options, self.settings = project, options, dict[str, Any]()

    def _check(self, method: str) -> None:
        if method in self.down:
            raise ConnectionError("no route\nto host")

    def start(self) -> None:
        self._check("start")
        run = self.options.get("id", self.options["name"])
        self.steps = self.service.setdefault(run, {})
        # of the two, W&B alone says where a resumed run goes on
        self.run = (
            SimpleNamespace(starting_step=max(self.steps, default=-1) + 1) if "id" in self.options else self
        )

    @property
    def tracker(self) -> Any:
        return self.run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings |= values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._check("log")
        assert step is not None
        self.steps.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self._check("finish")


@pytest.fixture(params=["wandb", "trackio"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracker whose package seems to be there, and is a fake."""
    chosen = str(request.param)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setattr(tracking, {"wandb": "WandBTracker", "trackio": "TrackioTracker"}[chosen], Fake)
    monkeypatch.setattr(Fake, "service", {})
    monkeypatch.setattr(Fake, "down", set())
    return chosen


def log_of(folder: Path, kind: str, said: list[str], *, step: int = 0) -> Logbook:
    """A run's log with its tracker, as `train` makes it."""
    folder.mkdir(exist_ok=True)
    log = Logbook(folder)
    log.tracker = Tracker(kind, folder, {"lr": 1e-6, "clip": [0.2, 0.2]}, step=step, say=said.append)
    return log


def take(log: Logbook, steps: range, value: float = 0.0) -> None:
    for step in steps:
        log.write("train", step, reward_mean=value + step)
        log.time("step", step=step, rollout=0.5)


def test_a_resumed_run_goes_on_in_the_same_run_at_its_step(kind: str, tmp_path: Path) -> None:
    """Killed after step 5 (nothing is closed), with a checkpoint of 3 finished steps."""
    said: list[str] = []
    take(log_of(tmp_path / "run", kind, said), range(6))
    log = log_of(tmp_path / "run", kind, said, step=3)
    take(log, range(3, 8))
    log.write("evaluate", 7, text_score_mean=0.25)
    log.time("train", units=8, seconds=1.0)  # of no step
    assert log.tracker is not None
    log.tracker.close()
    (name,) = Fake.service
    assert name.startswith("run-") and json.loads((tmp_path / "run/tracker.json").read_text()) == {
        "name": name
    }
    steps = {s: {"train/reward_mean": float(s), "time/rollout": 0.5} for s in range(8)}
    steps[7]["evaluate/text_score_mean"] = 0.25
    assert Fake.service[name] == steps and said == []


def test_two_runs_of_one_name_are_two(kind: str, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        take(log_of(tmp_path / parent / "run", kind, []), range(1))
    assert len(Fake.service) == 2 and all(name.startswith("run-") for name in Fake.service)


def test_what_is_not_taken_is_said_once_and_counted(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    log = log_of(tmp_path / "run", kind, said)
    take(log, range(2))
    Fake.down = {"log"}
    take(log, range(2, 4))
    assert len(said) == 1 and "ConnectionError: no route to host; the run goes on" in said[0]
    Fake.down = {"finish"}
    take(log, range(4, 5))
    assert log.tracker is not None
    log.tracker.close()
    assert len(said) == 2 and said[1].endswith("5 failures, 10 records")
    (sent,) = Fake.service.values()
    assert list(sent) == [0, 1, 4]
    written = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert written == list(range(5))


def test_a_new_run_needs_its_tracker_and_a_resumed_one_does_not(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    Fake.down = {"start"}
    with pytest.raises(UserError, match=f"tracker={kind}: does not start .*no route.* tracker=none"):
        log_of(tmp_path / "run", kind, said)
    log = log_of(tmp_path / "run", kind, said, step=3)
    take(log, range(3, 5))
    assert log.tracker is not None and (log.tracker.failures, log.tracker.records) == (5, 4)
    assert len(said) == 1


@pytest.mark.parametrize(
    "name, package", [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "tensorboard")]
)
def test_a_missing_package_is_named_with_the_command(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=f"tracker={name}: its package is not installed; pip install {package}"
    ):
        Tracker(name, tmp_path, {}, step=3, say=lambda _: None)
    check_tracker("none")


def test_tensorboard_drops_what_a_killed_process_wrote_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is told where the run goes on; with the package itself, its files are read back."""
    made: list[tuple[str, Path, dict[str, Any]]] = []

    class Writer(Fake):
        def __init__(self, name: str, folder: Path, **options: Any) -> None:
            super().__init__(name, name="tensorboard")
            made.append((name, folder, options))

    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setattr(tracking, "TensorBoardTracker", Writer)
    for step in (0, 3):
        log_of(tmp_path, "tensorboard", [], step=step)
    assert made == [("tensorboard", tmp_path, {"purge_step": step}) for step in (0, 3)]


@pytest.mark.filterwarnings("ignore")  # of the package: protobuf's and numpy's deprecations
def test_tensorboard_reads_back_one_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    take(log_of(tmp_path, "tensorboard", []), range(6), value=100)
    log = log_of(tmp_path, "tensorboard", [], step=3)
    take(log, range(3, 8))
    assert log.tracker is not None
    log.tracker.close()
    assert log.tracker.failures == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/reward_mean")]
    assert found == [(s, 100.0 + s if s < 3 else float(s)) for s in range(8)]
    assert [event.step for event in events.Scalars("time/rollout")] == list(range(8))
    (settings,) = events.Tensors("settings/text_summary")
    assert b"1e-06" in settings.tensor_proto.string_val[0]
    assert "tensorboard" in sys.modules
