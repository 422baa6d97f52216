"""Training runs of the demo's tiny model: killed, stopped, resumed, with bad rows, on two processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raise_trainer import tiny, trackers
from raise_trainer import train as train_module
from raise_trainer.checkpoints import ResumeRefused
from raise_trainer.dataset import write_dataset
from raise_trainer.demo import save_model
from raise_trainer.errors import UserError
from raise_trainer.train import run_sft, run_train
from raise_trainer.train_config import TrainConfig, as_yaml, check

KILLS = int(os.environ.get("RAISE_KILLS", "2"))
CHILD = (
    "import sys; from pathlib import Path; from raise_trainer.train_config import load; "
    "from raise_trainer.train import run_train; run_train(load(Path(sys.argv[1])))"
)
SMALL: dict[str, Any] = {
    "dtype": "float32", "template": "plain", "steps": 6, "prompts": 3, "group_size": 3, "max_new_tokens": 28,
    "frames": 8, "pixels": 56 * 56, "gradient_checkpointing": False, "freeze_vision": False,
    "save_every": 2, "lr": 1e-3, "workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Here and in child processes alike: sums of other threads are rounded in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and rows, and a model after a short supervised warm start by `run_sft` itself."""
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder / "data", train_videos=12, test_questions=7, seed=0, advance=lambda n=1: None)
    processor = tiny.build_processor()
    save_model(tiny.build_model(processor, seed=0), processor, folder / "random")
    run_sft(
        check(SMALL | {
            "model": str(folder / "random"), "data": [folder / "data/sft.json"], "out": folder / "sft",
            "steps": 40, "prompts": 12, "lr": 2e-3, "save_every": 40,
        })
    )  # fmt: skip
    return folder


def config(world: Path, out: Path, **other: Any) -> TrainConfig:
    (warm,) = world.glob("sft/checkpoints/*/model")
    given = {"model": str(warm), "data": [world / "data/train.json"], "out": out}
    return check(SMALL | given | other)


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run that nothing interrupts."""
    return run_train(config(world, world / "whole"))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def start(settings: TrainConfig, *launcher: str) -> subprocess.Popen[str]:
    settings.out.parent.mkdir(exist_ok=True, parents=True)
    file = settings.out.with_suffix(".yaml")
    file.write_text(as_yaml(settings))
    program = settings.out.with_suffix(".py")
    program.write_text(CHILD)
    command = [sys.executable, *launcher, str(program), str(file)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(file: Path, child: subprocess.Popen[str], count: int) -> None:
    """Until a file has some lines, or the child is done."""
    while child.poll() is None and (not file.exists() or file.read_text().count("\n") < count):
        time.sleep(0.02)


def test_the_warm_start_learned_and_the_run_is_recorded(world: Path, whole: Path) -> None:
    sft, rows = lines(world / "sft"), lines(whole)
    assert sft[-1]["loss"] < 0.5 * sft[0]["loss"] and len(sft) == 40
    assert [row["step"] for row in rows] == list(range(6))
    assert max(row["reward_mean"] for row in rows) > 0 and max(row["grad_norm"] for row in rows) > 0
    assert all(row["left_out"] == 0 for row in rows)
    times = [json.loads(line) for line in (whole / "timings.jsonl").read_text().splitlines()]
    assert {"decode", "rollout", "score", "update"} <= times[0].keys()
    *steps, ended = times
    tokens = [9 * row["completion_tokens_mean"] for row in rows]  # 3 prompts, 3 completions each
    seconds = [t / spent["tokens_per_s"] for t, spent in zip(tokens, steps, strict=True)]
    for spent, whole_step in zip(steps, seconds, strict=True):
        phases = [spent[phase] - 0.0005 for phase in ("decode", "rollout", "score", "update")]  # of rounding
        assert sum(phases) <= whole_step and 0 < spent["peak_gib"] < 100
    assert ended["stage"] == "train" and sum(seconds) <= ended["seconds"] + 0.0005
    assert sorted(p.name[-6:] for p in (whole / "checkpoints").iterdir()) == ["step-4", "step-6"]


def test_killed_at_any_time_it_goes_on_to_the_same_figures(world: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL one to three steps after a start, and up to 0.3 s later; after a whole run another begins."""
    rng, killed, runs = random.Random(0), 0, 0
    while killed < KILLS:
        settings = config(world, tmp_path / f"run {runs}")
        times, ended = settings.out / "timings.jsonl", False
        while killed < KILLS and not ended:
            before = times.read_text().count("\n") if times.exists() else 0
            child = start(settings)
            wait_for(times, child, before + rng.randint(1, 3))
            time.sleep(rng.random() * 0.3)
            child.kill()
            said, _ = child.communicate()
            assert child.returncode in (0, -signal.SIGKILL), said
            ended = child.returncode == 0
            killed += not ended
        run_train(settings)
        for name in ("metrics.jsonl", "rows.jsonl"):
            assert (settings.out / name).read_bytes() == (whole / name).read_bytes()
        runs += 1
    print(f"{killed} kills of {runs} runs")


def test_a_signal_saves_and_ends_well(world: Path, whole: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "stopped", save_every=100)
    child = start(settings)
    wait_for(settings.out / "metrics.jsonl", child, 1)
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 0 and "SIGTERM: stopped after step" in said, said
    assert 0 < len(lines(settings.out)) < 6
    run_train(settings)
    assert (settings.out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_changed_settings_or_data_are_refused_unless_accepted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(world, tmp_path / "run", steps=1)
    run_train(settings)
    kept = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(ResumeRefused, match=r"group_size: 3 -> 4.*--accept-changes"):
        run_train(config(world, tmp_path / "run", steps=1, group_size=4))
    assert (tmp_path / "run/config.yaml").read_text() == kept, "a refused run has changed the settings"
    capsys.readouterr()
    run_train(config(world, tmp_path / "run", steps=2, group_size=2), accept_changes=True)
    assert "changed since then: group_size: 3 -> 2" in capsys.readouterr().out
    assert len(lines(tmp_path / "run")) == 2
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads((world / "data/train.json").read_text())[:-1]))
    with pytest.raises(ResumeRefused, match="data"):
        run_train(config(world, tmp_path / "run", steps=1, data=[{"path": other, "root": world / "data"}]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no run"):
        run_train(config(world, tmp_path / "full", steps=1))


def with_bad_rows(world: Path, folder: Path) -> Path:
    """The training rows with a lost video, a broken one and a row without a solution among them."""
    rows = json.loads((world / "data/train.json").read_text())[:9]
    broken = world / "data/clips/broken.mp4"
    broken.write_bytes(b"no video")
    rows[2] |= {"path": "./clips/none.mp4", "problem_id": "lost"}
    rows[4] |= {"path": "./clips/broken.mp4", "problem_id": "broken"}
    rows[7] |= {"solution": "", "problem_id": "unsolved"}
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return file


def test_what_cannot_be_used_is_left_out_by_name(world: Path, tmp_path: Path) -> None:
    """One epoch: three rows of nine are listed with their reasons, and nothing takes their place."""
    data = [{"path": with_bad_rows(world, tmp_path), "root": world / "data"}]
    run = run_train(config(world, tmp_path / "run", data=data, steps=3))
    listed = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in listed} >= {"lost", "broken"} and len(listed) == 3
    assert any("no `solution`" in entry["reason"] for entry in listed)
    taken = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert sorted(n for step in taken for n in step["left_out"]) == [2, 4, 7]
    assert sorted(n for step in taken for n in step["used"]) == [0, 1, 3, 5, 6, 8]
    rows = lines(run)
    assert rows[-1]["left_out"] == 3 and rows[-1]["epoch"] == 1.0
    assert all(row["completion_tokens_mean"] > 0 for row in rows)
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints/save-00002-step-3")
    assert rows[1]["left_out"] > 0  # of the run that goes on these are the past
    run_train(config(world, tmp_path / "run", data=data, steps=3))
    assert (run / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"lost|broken|solution"):
        run_train(config(world, tmp_path / "strict", data=data, steps=3, on_bad_media="fail"))


def test_steps_too_small_for_bfloat16_move_the_weights(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is half a place of a weight above 1/16: on fp32 copies they add up, else none shows."""
    other = {"dtype": "bfloat16", "steps": 12, "save_every": 12, "lr": 4e-4}

    def moved(out: Path) -> float:
        """The share of the larger weights that are others after the run."""
        settings = config(world, out, **other, data=[world / "data/sft.json"])
        run_sft(settings)
        start = load_file(Path(settings.model) / "model.safetensors")
        (after,) = out.glob("checkpoints/*-step-12/model/model.safetensors")
        end = load_file(after)
        pairs = [(start[k].bfloat16().flatten(), end[k].flatten()) for k in end]
        old, new = (torch.cat(side) for side in zip(*pairs, strict=True))
        assert new.dtype == torch.bfloat16
        return float((old != new)[old.abs() > 1 / 16].float().mean())

    assert moved(tmp_path / "copies") > 0.1
    monkeypatch.setattr(train_module, "adamw", lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.01))
    assert moved(tmp_path / "none") == 0.0


def test_the_tracker_gets_what_the_files_get(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run goes on: from the step of its checkpoint."""
    sent: dict[int, dict[str, float]] = {}
    begun: list[int] = []
    ended: list[int] = []

    class Fake:
        def log(self, values: dict[str, float], step: int) -> None:
            sent.setdefault(step, {}).update(values)

        def finish(self) -> None:
            ended.append(len(sent))

    def started(kind: str, folder: Path, settings: dict[str, Any], step: int) -> Fake:
        assert (kind, folder, settings["lr"]) == ("wandb", tmp_path / "run", 1e-3)
        begun.append(step)
        return Fake()

    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setattr(trackers, "_started", started)
    for steps in (2, 3):
        run = run_train(config(world, tmp_path / "run", tracker="wandb", steps=steps))
    assert begun == [0, 2] and ended == [2, 3] and list(sent) == [0, 1, 2]
    for row in lines(run):
        found = {name: value for name, value in sent[row["step"]].items() if name.startswith("train/")}
        assert found == {f"train/{name}": v for name, v in row.items() if name not in ("stage", "step")}
        assert {"time/rollout", "time/tokens_per_s", "time/peak_gib"} <= sent[row["step"]].keys()
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run_train(config(world, tmp_path / "new", tracker="tensorboard", model="not looked at"))
    assert not (tmp_path / "new").exists()


def test_supervised_steps_train_after_an_evaluation_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training mode: without it gradient checkpointing and dropout would be off from there on."""
    modes, inner = list[bool](), train_module.sft_step

    def noted(scorer: Any, *args: Any, **options: Any) -> dict[str, float]:
        modes.append(scorer.model.training)
        return inner(scorer, *args, **options)

    monkeypatch.setattr(train_module, "sft_step", noted)
    data = {"data": [world / "data/sft.json"], "eval_data": [world / "data/test.json"]}
    run_sft(config(world, tmp_path / "run", **data, eval_every=1, steps=2))
    assert modes == [True, True]


def test_settings_that_do_not_go_together_are_named_before_the_model_is_loaded(
    world: Path, tmp_path: Path
) -> None:
    for other, match in (({"clip": [2, 0.2]}, "clip"), ({"reward": "jepo", "group_size": 1}, "reward jepo")):
        with pytest.raises(UserError, match=match):
            run_train(config(world, tmp_path / "new", model="not looked at", **other))
    assert not (tmp_path / "new").exists()


def test_evaluation_keeps_the_best_checkpoint(world: Path, tmp_path: Path) -> None:
    """Every row counts, one that cannot be read too; the checkpoint with the best score is not removed."""
    data = [world / "data/test.json", {"path": with_bad_rows(world, tmp_path), "root": world / "data"}]
    run = run_train(config(world, tmp_path / "run", eval_data=data, eval_every=1, save_every=1, steps=4))
    scored = {row["step"]: row for row in lines(run) if row["stage"] == "evaluate"}
    assert list(scored) == [0, 1, 2, 3]
    rows = len(json.loads((world / "data/test.json").read_text())) + 9
    assert all(
        row["unused_share"] == 3 / rows and row["answer_missing_share"] >= 3 / rows for row in scored.values()
    )
    best = max(scored, key=lambda step: scored[step]["text_score_mean"])
    kept = {int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").iterdir()}
    assert kept >= {3, 4} and any(
        scored[step - 1]["text_score_mean"] == scored[best]["text_score_mean"] for step in kept
    )


@pytest.mark.parametrize(
    "other",
    [
        {"lora_rank": 4, "reference": "ema"},
        {"reference": "frozen", "kl": 0.04, "updates": 2, "clip": [0.2, 0.28], "loss": "grpo"},
        {"reference": "policy", "reward": "accuracy", "scale": "batch", "gradient_checkpointing": True},
        {"confidence_share": 0.5, "bonus": {"format": 0.1}, "reward": "scre-igsr-balanced",
         "temperature": 0.9, "mask_truncated": False, "micro_tokens": 200, "loss": "dapo",
         "freeze_vision": True},
    ],
    ids=["lora", "clipped updates", "accuracy", "mixed"],
)  # fmt: skip
def test_every_setting_trains(world: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    run = run_train(config(world, tmp_path / "run", **(other | {"steps": 2, "save_every": 2})))
    rows = lines(run)
    assert all(abs(row["grad_norm"]) < float("inf") for row in rows)
    assert sum(row["grad_norm"] for row in rows) > 0
    assert list((run / "checkpoints").glob("*-step-2/model/*.safetensors"))


def test_two_processes_train_as_one(world: Path, whole: Path, tmp_path: Path) -> None:
    """The same prompts, completions and rewards, to the roundings of sums in another order."""
    settings = config(world, tmp_path / "two", steps=2)
    child = start(settings, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    said, _ = child.communicate(timeout=150)
    assert child.returncode == 0, said
    for one, two in zip(lines(whole)[:2], lines(settings.out), strict=True):
        assert one.keys() == two.keys()
        for key in ("reward_mean", "completion_tokens_mean", "text_score_mean"):
            assert abs(one[key] - two[key]) <= 1e-3 * max(abs(one[key]), 1.0), key
