"""A checkpoint is whole or not there: pruning, damage, a full disk, leftovers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raise_trainer.checkpoints import Checkpoints, DamagedCheckpoint, SaveFailed, TrainingState, manifest

ROOT = Path(__file__).resolve().parents[2]


def state(value: float = 0.0) -> TrainingState:
    """A run whose weights say which one it is."""
    model = nn.Linear(30, 20)
    with torch.no_grad():
        model.weight.fill_(value)
    return TrainingState(model, torch.optim.AdamW(model.parameters()))


def filled(folder: Path, count: int, **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for step in range(1, count + 1):
        checkpoints.save(state(step), step)
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded(checkpoints: Checkpoints) -> tuple[int, float]:
    other = state()
    resumed = checkpoints.resume(other)
    assert resumed is not None
    return resumed.step, float(other.model.weight.detach()[0, 0])  # type: ignore[operator]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none")
    assert (checkpoints.all(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
    assert checkpoints.resume(state()) is None


def test_the_last_are_kept_and_order_is_that_of_saving(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 4, keep_last=3)
    assert names(tmp_path) == ["save-00002-step-2", "save-00003-step-3", "save-00004-step-4"]
    checkpoints.save(state(9.0), 2)  # a run taken back to step 1 goes on from there
    assert names(tmp_path) == ["save-00003-step-3", "save-00004-step-4", "save-00005-step-2"]
    assert loaded(checkpoints) == (2, 9.0)
    assert [path.name for path in checkpoints.all()] == names(tmp_path)


@pytest.mark.parametrize(("order", "best"), [("max", 2), ("min", 3)])
def test_the_best_is_kept(order: str, best: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=order)
    for step, metric in enumerate([0.5, 0.9, 0.1, float("nan"), None, 0.6], 1):
        checkpoints.save(state(step), step, metric)
    assert names(tmp_path) == [f"save-0000{best}-step-{best}", "save-00006-step-6"]
    assert checkpoints.best() == tmp_path / f"save-0000{best}-step-{best}"
    assert loaded(checkpoints) == (6, 6.0)


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_best": "least"}])
def test_wrong_options(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Checkpoints(tmp_path, **options)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a bit": ("model/model.safetensors", flip, "model.safetensors: its SHA-256 is not that"),
    "the end": ("optimizer.json", cut_short, r"optimizer.json: has \d+ bytes, \d+ were written"),
    "a file": ("random.safetensors", Path.unlink, "random.safetensors: No such file"),
    "no manifest": (manifest.NAME, Path.unlink, "manifest.json: No such file"),
    "half a manifest": (manifest.NAME, lambda file: os.truncate(file, 40), "manifest.json: is no JSON"),
    "an empty manifest": (manifest.NAME, lambda file: file.write_text("{}"), "manifest.json: its contents"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_newest_is_passed_over_loudly(case: str, tmp_path: Path) -> None:
    name, damage, reason = DAMAGE[case]
    filled(tmp_path, 3)
    damage(tmp_path / "save-00003-step-3" / name)
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(RuntimeWarning, match=f"save-00003-step-3 is damaged and passed over: .*{reason}"):
        assert loaded(checkpoints) == (2, 2.0)
    # The good one is not given up for the damaged one.
    checkpoints.save(state(7.0), 3)
    assert names(tmp_path) == ["save-00002-step-2", "save-00004-step-3"]
    assert loaded(checkpoints) == (3, 7.0)


def test_a_changed_manifest_is_damage(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    file = tmp_path / "save-00001-step-1" / manifest.NAME
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, "metric": 1.0}))
    said: list[str] = []
    with pytest.raises(DamagedCheckpoint, match=r"none of the 1 checkpoints in .* is whole; to start over"):
        Checkpoints(tmp_path, say=said.append).resume(state())
    assert len(said) == 1 and "its contents are not those that were written" in said[0]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, 2)
    for name in (".saving-00003", ".removing-save-00001-step-1"):
        (tmp_path / name / "model").mkdir(parents=True)
    assert checkpoints.latest() == tmp_path / "save-00002-step-2"
    assert len(names(tmp_path)) == 4  # looking removes nothing: another process may be saving
    assert loaded(checkpoints) == (2, 2.0)
    assert names(tmp_path) == ["save-00001-step-1", "save-00002-step-2"]


class Full:
    """A file on a disk that has room for a few bytes more."""

    room = 0

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, data: Any) -> int:
        Full.room -= len(data)
        if Full.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()


@pytest.mark.parametrize("room", [0, 100, 3000, 6000])
def test_a_disk_that_fills_up_keeps_the_checkpoint_before(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = filled(tmp_path, 2)
    original = Path.open
    Full.room = room
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: Full(original(self, *a, **k)))
        with pytest.raises(SaveFailed) as failure:
            checkpoints.save(state(3.0), 3)
    text = str(failure.value)
    assert f"the checkpoint of step 3 was not saved in {tmp_path}: No space left on device; it needs" in text
    assert f"about {state().bytes()} bytes; the one before, save-00002-step-2, is kept" in text
    assert names(tmp_path) == ["save-00001-step-1", "save-00002-step-2"]
    assert loaded(checkpoints) == (2, 2.0)
    checkpoints.save(state(3.0), 3)
    assert loaded(checkpoints) == (3, 3.0)


def test_too_little_room_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 17}))
    with pytest.raises(SaveFailed, match=r"only 17 bytes are free; it needs about .*there is none before it"):
        Checkpoints(tmp_path).save(state(), 1)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveFailed, match=r"was not saved in .*file/checkpoints: Not a directory"):
        Checkpoints(tmp_path / "file/checkpoints").save(state(), 1)


LIMITED = """
import resource, sys
from raise_trainer.checkpoints import Checkpoints, SaveFailed, TrainingState
from tests.tiny_models import text_model

run = TrainingState(text_model("Llama", vocab_size=2000))
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(run, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    checkpoints.save(run, 2)
except SaveFailed as error:
    print(error)
print(checkpoints.resume(run).step)
"""


@pytest.mark.parametrize("room", [2000, 300_000])
def test_a_real_limit_stops_save_pretrained_too(room: int, tmp_path: Path) -> None:
    """The kernel refuses the write, inside transformers and the safetensors library."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT}/trainer:{ROOT}/kernels",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(room)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    said, step = out.strip().rsplit("\n", 1)
    assert "the checkpoint of step 2 was not saved" in said and "File too large" in said and step == "1"
    assert names(tmp_path) == ["save-00001-step-1"]


def test_logs_are_put_on_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("{}\n")
    order: list[str] = []
    sync, rename = manifest.sync, os.rename
    monkeypatch.setattr(manifest, "sync", lambda path: (order.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    place = Checkpoints(tmp_path / "c").save(state(), 1, logs=[log])
    files = [file.name for file in sorted(place.rglob("*")) if file.is_file() and file.name != manifest.NAME]
    assert order == [log.name, *files, manifest.NAME, "model", ".saving-00001", "rename", "c"]
    with pytest.raises(SaveFailed, match="No such file"):
        Checkpoints(tmp_path / "c").save(state(), 2, logs=[tmp_path / "absent"])
    assert names(tmp_path / "c") == [place.name]
