"""`raise-core check-data`: every row is looked at, what is refused is counted, named and written down."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from raise_trainer import tiny
from raise_trainer.check_data import Media, check_data
from raise_trainer.cli import _check_data
from raise_trainer.clips import write_mp4
from raise_trainer.errors import UserError
from raise_trainer.train_config import TrainConfig, check

CHOICE = {
    "problem": "What colour?",
    "problem_type": "multiple choice",
    "options": ["A. red", "B. blue"],
    "solution": "<answer>A</answer>",
}
ROWS: list[dict[str, Any]] = [
    {**CHOICE, "problem_id": "good", "data_type": "video", "path": "a.mp4", "process": "<think>x</think>"},
    {**CHOICE, "problem_id": "text", "data_type": "text"},
    {**CHOICE, "problem_id": "gone", "data_type": "video", "path": "gone.mp4"},
    {**CHOICE, "problem_id": "cut", "data_type": "video", "path": "cut.mp4"},
    {**CHOICE, "problem_id": "cut again", "data_type": "video", "path": "cut.mp4"},
    {**CHOICE, "problem_id": "long", "data_type": "text", "problem": "why? " * 900},
    {**CHOICE, "problem_id": "optionless", "data_type": "text", "options": []},
]
EVAL = [{**CHOICE, "data_type": "text", "reward": "igsr"}, {"problem_type": "OCR"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    frames = np.random.default_rng(0).integers(0, 255, (8, 56, 56, 3), dtype=np.uint8)
    write_mp4(root / "a.mp4", frames, 4)
    (root / "cut.mp4").write_bytes((root / "a.mp4").read_bytes()[:400])
    (root / "train.json").write_text(json.dumps(ROWS))
    (root / "eval.jsonl").write_text("\n".join([*map(json.dumps, EVAL), "{broken"]))
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tiny.build_processor(), seed=0)
    model.config.save_pretrained(root / "model")
    processor = tiny.build_processor()
    assert len(processor.tokenizer) == len(tokenizer)
    processor.save_pretrained(root / "model")
    return root


def config(root: Path, **change: Any) -> TrainConfig:
    return check(
        {
            "model": str(root / "model"), "data": root / "train.json", "eval_data": root / "eval.jsonl",
            "out": root / "run", "workers": 0, "frames": 4, "pixels": 56 * 56, "max_new_tokens": 16,
        } | change
    )  # fmt: skip


BAD_ROWS = ["optionless", None, None]  # the eval file's row without id, and the line that is no JSON
REFUSED: dict[Media, list[str | None]] = {
    "none": BAD_ROWS,
    "exists": ["gone", *BAD_ROWS],
    "decode": ["gone", "cut", "cut again", *BAD_ROWS],
    "prompts": ["gone", "cut", "cut again", "long", *BAD_ROWS],
}


@pytest.mark.parametrize("media", REFUSED)
def test_each_level_refuses_what_it_can_see(root: Path, tmp_path: Path, media: Media) -> None:
    out = io.StringIO()
    refused = tmp_path / "refused.json"
    count = check_data(config(root), media=media, refused=refused, console=Console(file=out, width=200))
    listed = json.loads(refused.read_text())
    assert [entry["id"] for entry in listed] == REFUSED[media] and count == len(listed)
    for entry in listed:
        assert set(entry) == {"file", "row", "id", "reason"} and entry["reason"]
        if entry["file"].endswith("train.json"):
            assert ROWS[entry["row"]]["problem_id"] == entry["id"]
    assert [entry["row"] for entry in listed[-2:]] == [1, 2]
    said = out.getvalue()
    assert f"{10 - count} rows can be used, {count} are refused" in said
    assert "igsr" in said and "scre" in said and "eval_data" in said


def test_worker_processes_find_the_same(root: Path, tmp_path: Path) -> None:
    out = Console(file=io.StringIO())
    check_data(config(root, workers=1), media="decode", refused=tmp_path / "r.json", console=out)
    assert [entry["id"] for entry in json.loads((tmp_path / "r.json").read_text())] == REFUSED["decode"]


def test_a_data_set_without_fault_gives_an_empty_list_and_status_0(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.json").write_text(json.dumps([ROWS[1]]))
    monkeypatch.chdir(tmp_path)
    settings = [f"data={tmp_path / 'good.json'}", "model=m", "out=o"]
    assert _check_data(settings) == 0 and (tmp_path / "refused.json").read_text() == "[]"
    assert (
        _check_data(["--media", "none", "--refused", "r.json", *settings[1:], f"data={root / 'train.json'}"])
        == 1
    )
    assert len(json.loads((tmp_path / "r.json").read_text())) == 1


def test_a_list_that_cannot_be_written_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--refused .*none/r\.json: No such file"):
        check_data(
            config(root),
            media="none",
            refused=tmp_path / "none" / "r.json",
            console=Console(file=io.StringIO()),
        )


def test_a_template_or_model_that_is_not_there_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="template 'tink'"):
        check_data(config(root, template="tink"), media="none", refused=tmp_path / "r.json")
    missing = os.fspath(tmp_path / "no-model")
    with pytest.raises(UserError, match=r"no-model.*cannot be loaded"):
        check_data(config(root, model=missing), media="prompts", refused=tmp_path / "r.json")
