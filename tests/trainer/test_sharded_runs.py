"""Runs under FSDP2 on 2 processes, and what goes on from them on 1, and from 1 on 2: the same figures."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing as mp

from raise_trainer import tiny
from raise_trainer.dataset import write_dataset
from raise_trainer.demo import save_model
from raise_trainer.train import run_train
from raise_trainer.train_config import TrainConfig, as_yaml, check, load
from tests.budget import assert_as_exact_as_fp32

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
SAME = ("loss", "grad_norm", "entropy", "reward_mean", "confidence_mean", "completion_tokens_mean", "epoch")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder / "data", train_videos=6, test_questions=2, seed=0, advance=lambda n=1: None)
    processor = tiny.build_processor()
    save_model(tiny.build_model(processor, seed=0), processor, folder / "model")
    return folder


def config(world: Path, out: Path) -> TrainConfig:
    """Random weights answer nothing, so that the reward is the policy's certainty."""
    return check({
        "model": str(world / "model"), "data": [world / "data/train.json"], "out": out, "reward": "intuitor",
        "dtype": "float32", "template": "plain", "steps": 4, "prompts": 3, "group_size": 2,
        "max_new_tokens": 5, "frames": 2, "pixels": 56 * 56, "gradient_checkpointing": False,
        "freeze_vision": False, "save_every": 2, "lr": 1e-3, "workers": 0, "reference": {"ema": 0.5},
        "mask_truncated": False,
    })  # fmt: skip


def work(rank: int, port: int, runs: list[tuple[str, dict[str, str]]]) -> None:
    """Runs one after the other as one of two processes, with what a launcher sets for each."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    for file, launch in runs:
        for name in FSDP2:
            os.environ.pop(name, None)
        os.environ |= launch
        run_train(load(Path(file)))


def on_two(runs: list[tuple[TrainConfig, dict[str, str]]]) -> None:
    """These runs in 2 processes."""
    given = []
    for settings, launch in runs:
        file = settings.out.with_suffix(".yaml")
        file.write_text(as_yaml(settings))
        given.append((str(file), launch))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, given), nprocs=2)


def half(run: Path, to: Path) -> Path:
    """A copy of a run that ended after its second step."""
    shutil.copytree(run, to)
    (last,) = to.glob("checkpoints/*-step-4")
    shutil.rmtree(last)
    return to


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path, wanted: Path, name: str) -> None:
    assert [row["step"] for row in lines(run)] == [0, 1, 2, 3]
    for got, want in zip(lines(run), lines(wanted), strict=True):
        assert got.keys() == want.keys()
        for key in SAME:
            assert_as_exact_as_fp32(got[key], want[key], name=f"{name}, step {want['step']}: {key}")


def test_runs_on_one_and_two_processes_and_from_one_to_the_other(world: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one = run_train(config(world, tmp_path / "one"))
    assert max(row["grad_norm"] for row in lines(one)) > 0
    shards = config(world, tmp_path / "shards")
    to_shards, to_two = (config(world, half(one, tmp_path / name)) for name in ("to-shards", "to-two"))
    on_two([(shards, FSDP2), (to_shards, FSDP2), (to_two, {})])
    assert_same(shards.out, one, "FSDP2")
    assert_same(to_shards.out, one, "one to shards")
    assert_same(to_two.out, one, "one to two")
    back = run_train(config(world, half(shards.out, tmp_path / "back")))
    assert_same(back, one, "shards to one")
