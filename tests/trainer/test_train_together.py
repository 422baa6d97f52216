"""Settings of one run together: it goes on from its checkpoint to the same bytes of every log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raise_trainer import tiny
from raise_trainer.dataset import write_dataset
from raise_trainer.demo import save_model
from raise_trainer.train import run_train
from raise_trainer.train_config import check

LOGS = ("metrics.jsonl", "rows.jsonl", "completions.jsonl")
SMALL: dict[str, Any] = {
    "dtype": "float32", "template": "plain", "steps": 4, "prompts": 3, "group_size": 4, "max_new_tokens": 8,
    "frames": 2, "pixels": 56 * 56, "gradient_checkpointing": False, "save_every": 2, "lr": 1e-3,
    "workers": 0, "mask_truncated": False, "updates": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder / "data", train_videos=6, test_questions=2, seed=0, advance=lambda n=1: None)
    processor = tiny.build_processor()
    save_model(tiny.build_model(processor, seed=0), processor, folder / "model")
    return folder


@pytest.mark.parametrize(
    ("other", "keys"),
    [
        ({"reward": "rlpr", "resample": 1, "loss": "cispo", "eval_every": 2,
          "bonus": {"format": 0.1, "t-grpo": 0.3, "grpo-care": 0.5}},
         {"t_grpo_share", "grpo_care_share", "rounds", "learned_groups"}),
        ({"reward": "jepo", "resample": 2, "loss": "gspo", "clip": [3e-4, 4e-4], "kl": {"k2": 0.1},
          "lora_rank": 2, "reference": "frozen", "micro_tokens": 150}, {"kl", "rounds"}),
        ({"reward": "deepconf", "loss": "sapo", "scale": "batch", "reference": "policy",
          "dtype": "bfloat16", "bonus": {"t-grpo": 0.3}, "temperature": 0.8}, {"t_grpo_share"}),
    ],
    ids=["rlpr, bonuses, resampling", "jepo, adapters, KL", "deepconf, bfloat16"],
)  # fmt: skip
def test_a_run_goes_on_to_the_same_logs(
    world: Path, tmp_path: Path, other: dict[str, Any], keys: set[str]
) -> None:
    """The data files have their own sampling, so that frames are shuffled by another count than the run's."""
    torch.set_num_threads(1)
    files = {
        name: [{"path": world / f"data/{file}.json", "frames": {"fps": 4, "max": 6}}]
        for name, file in (("data", "train"), ("eval_data", "test"))
    }
    config = check(SMALL | files | {"model": str(world / "model"), "out": tmp_path / "run"} | other)
    run = run_train(config)
    whole = [(run / name).read_bytes() for name in LOGS]
    lines = [json.loads(line) for line in whole[0].splitlines()]
    trained = [line for line in lines if line["stage"] == "train"]
    assert [line["step"] for line in trained] == [0, 2] and all(keys <= line.keys() for line in trained)
    assert sum(line["grad_norm"] for line in trained) > 0 and lines[-1]["stage"] == "evaluate"
    (last,) = run.glob("checkpoints/*-step-4")
    shutil.rmtree(last)
    run_train(config)
    assert [(run / name).read_bytes() for name in LOGS] == whole
