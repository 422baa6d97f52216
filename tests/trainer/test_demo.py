"""The main job end to end at the size of seconds: what it writes, that it repeats, what it refuses."""

import io
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from raise_trainer import tiny, world
from raise_trainer.config import DemoConfig
from raise_trainer.dataset import write_dataset
from raise_trainer.demo import run_demo
from raise_trainer.errors import BadMedia, BadRow, UserError
from raise_trainer.logbook import Logbook

CURVES = [
    "reward_mean",
    "accuracy",
    "match",
    "completion_tokens_mean",
    "entropy",
    "kl",
    "grad_norm",
    "confidence_mean",
    "scre_differs_share",
    "igsr_bonus_share",
    "equal_groups_share",
]


def config(out: Path, **other: Any) -> DemoConfig:
    return DemoConfig(out=out, smoke=True, threads=1, **other)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    run_demo(config(out))
    return out


def test_same_seed_same_metrics(run: Path, tmp_path: Path) -> None:
    done = command("demo", "--smoke", "--threads", "1", "--out", str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_the_seed_matters_and_the_reward_only_from_grpo_on(run: Path, tmp_path: Path) -> None:
    run_demo(config(tmp_path / "seed", seed=1))
    run_demo(config(tmp_path / "accuracy", reward="accuracy"))
    first, seed, accuracy = metrics(run), metrics(tmp_path / "seed"), metrics(tmp_path / "accuracy")
    assert first[0] != seed[0]
    start = next(i for i, record in enumerate(first) if record["stage"] == "grpo")
    assert start > 3 and first[:start] == accuracy[:start]


def test_the_checkpoint_loads_and_answers(run: Path) -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "model")
    processor = AutoProcessor.from_pretrained(run / "model")
    assert list((run / "model").glob("*.safetensors")) and not list((run / "model").glob("*.bin"))
    assert (
        processor.tokenizer("<answer>B. red</answer>")["input_ids"]
        == (tiny.build_tokenizer()("<answer>B. red</answer>")["input_ids"])
    )
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    frames = torch.from_numpy(world.render(world.draw_scene(random.Random(0), "move"))).permute(0, 3, 1, 2)
    inputs = processor(
        text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt",
        video_metadata=[{"total_num_frames": 8, "fps": 4.0, "frames_indices": list(range(8))}],
    )  # fmt: skip
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_the_report_needs_no_other_file_and_shows_everything(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page and "url(" not in page
    assert page.count("data:image/svg+xml") == 2
    assert page.count("data:image/png") >= 5  # a strip of frames for each kind of question
    assert "&lt;think&gt;" in page and "<think>" not in page


def test_metrics_have_what_the_curves_need(run: Path) -> None:
    steps = [r for r in metrics(run) if r["stage"] == "grpo"]
    assert [r["step"] for r in steps] == [0, 1, 2]
    for record in steps:
        assert all(isinstance(v, (int, str)) or v == v for v in record.values())
        assert set(CURVES) <= set(record)
    assert json.loads((run / "config.json").read_text())["reward"] == "scre-igsr"
    assert {json.loads(s)["stage"] for s in (run / "timings.jsonl").read_text().splitlines()} >= {
        "warm start",
        "grpo",
    }


def test_the_data_have_the_promised_errors_and_answers(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", train_videos=400, test_questions=30, seed=0, advance=lambda _: None)
    rows = {
        name: json.loads((tmp_path / "d" / f"{name}.json").read_text()) for name in ("sft", "train", "test")
    }
    assert not {r["path"] for r in rows["train"]} & {r["path"] for r in rows["test"]}
    truth = {r["problem_id"]: r for r in rows["train"]}
    wrong_chain = wrong_both = 0
    for row in rows["sft"]:
        task, solution = row["data_source"].split("/")[1], truth[row["problem_id"]]["solution"]
        answer = row["solution"].removeprefix("<answer>").removesuffix("</answer>")
        inside = solution.removeprefix("<answer>").removesuffix("</answer>")
        true_answer = next((o for o in row["options"] if o[0] == inside), inside)
        true = world.answer_claim(task, true_answer, row["options"])
        chain = world.chain_claim(task, row["process"].removeprefix("<think>").removesuffix("</think>"))
        given = world.answer_claim(task, answer, row["options"])
        assert chain is not None and given in (chain, true)
        wrong_chain += chain != true
        wrong_both += chain != true and given == chain
    n = len(rows["sft"])
    assert abs(wrong_chain / n - 0.5) < 0.05 and abs(wrong_both / n - 0.25) < 0.05
    tokenizer = tiny.build_tokenizer()
    strict = [r for r in rows["sft"] if r["problem_type"] != "free-form"]
    answers = [r["solution"].removeprefix("<answer>").removesuffix("</answer>") for r in strict]
    assert sum(len(tokenizer(a)["input_ids"]) >= 3 for a in answers) >= len(answers) / 2


# --- what it refuses --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "d"
    write_dataset(root, train_videos=10, test_questions=8, seed=0, advance=lambda _: None)
    return root


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def edit(root: Path, name: str, index: int, **change: Any) -> None:
    rows = json.loads((root / name).read_text())
    rows[index] |= change
    (root / name).write_text(json.dumps(rows))


def test_a_broken_video_stops_the_run_or_is_left_out_and_written_down(own_data: Path, tmp_path: Path) -> None:
    bad = sorted((own_data / "clips").glob("train-*.mp4"))[0]
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(BadMedia, match=re.escape(bad.name)):
        run_demo(config(tmp_path / "fail", data=own_data))
    run_demo(config(tmp_path / "skip", data=own_data, on_bad="skip"))
    refused = json.loads((tmp_path / "skip" / "refused.json").read_text())
    assert refused and all(bad.name in item for item in refused)


def test_rows_without_solution_or_of_unknown_kind_or_outside_are_left_out(
    own_data: Path, tmp_path: Path
) -> None:
    edit(own_data, "train.json", 0, solution="")
    edit(own_data, "train.json", 1, problem_type="essay")
    edit(own_data, "test.json", 0, path="../../x.mp4")
    with pytest.raises(BadRow, match="no `solution`"):
        run_demo(config(tmp_path / "fail", data=own_data))
    run_demo(config(tmp_path / "skip", data=own_data, on_bad="skip"))
    assert len(json.loads((tmp_path / "skip" / "refused.json").read_text())) == 3


def test_nothing_left_is_said(own_data: Path, tmp_path: Path) -> None:
    for clip in (own_data / "clips").glob("test-*.mp4"):
        clip.write_bytes(b"")
    with pytest.raises(UserError, match=r"test\.json: no usable row is left"):
        run_demo(config(tmp_path / "skip", data=own_data, on_bad="skip"))


def test_a_prompt_longer_than_the_context_is_refused(own_data: Path, tmp_path: Path) -> None:
    edit(own_data, "train.json", 0, problem="why? " * 600)
    with pytest.raises(BadRow, match="the context leaves"):
        run_demo(config(tmp_path / "fail", data=own_data))


def test_an_output_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        run_demo(config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_demo(config(tmp_path / "file" / "run"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from raise_trainer.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_one_line() -> None:
    done = command("demo", "--device", "cuda")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "raise-core: error: --device cuda: no CUDA device is visible to torch; use --device cpu\n"
    )


def test_an_unknown_flag_is_refused_with_the_nearest() -> None:
    done = command("demo", "--grpo-step", "3")
    assert done.returncode == 2 and "--grpo-steps" in done.stderr + done.stdout


def test_a_video_that_is_no_video_from_the_command_line(own_data: Path, tmp_path: Path) -> None:
    clip = sorted((own_data / "clips").glob("train-*.mp4"))[0]
    clip.write_text("no video")
    done = command("demo", "--smoke", "--data", str(own_data), "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        done.stderr.startswith(f"raise-core: error: {clip}: cannot be decoded")
        and done.stderr.count("\n") == 1
    )


def test_config_overrides_of_smoke_are_only_sizes() -> None:
    from raise_trainer.demo import SMOKE

    replace(DemoConfig(), **SMOKE)
    assert set(SMOKE) <= set(DemoConfig.__dataclass_fields__) and all(
        isinstance(v, int) for v in SMOKE.values()
    )


def test_every_clip_is_h264(data: Path) -> None:
    clips = sorted((data / "clips").glob("*.mp4"))
    assert len(clips) > 10 and all(b"avc1" in clip.read_bytes() for clip in clips)


def test_at_least_the_questions_asked_for_are_held_out(data: Path) -> None:
    rows = json.loads((data / "test.json").read_text())
    assert 8 <= len(rows) < 8 + max(map(len, world.TASKS_OF.values()))
    assert DemoConfig().test_questions >= 500


def test_a_refused_run_leaves_its_folder_free(own_data: Path, tmp_path: Path) -> None:
    edit(own_data, "train.json", 0, solution="")
    with pytest.raises(BadRow):
        run_demo(config(tmp_path / "run", data=own_data))
    assert not (tmp_path / "run").exists()


def test_rows_of_another_world_are_refused_before_training(own_data: Path, tmp_path: Path) -> None:
    edit(own_data, "train.json", 0, data_source="star")
    with pytest.raises(BadRow, match="data_source 'star'"):
        run_demo(config(tmp_path / "run", data=own_data))


@pytest.mark.parametrize(
    "flag, value",
    [("frames", 1), ("threads", 0), ("min_std", -1.0), ("ema_decay", 2.0), ("prompts", 0), ("grpo_lr", 0.0)],
)
def test_a_senseless_flag_is_refused_by_name(tmp_path: Path, flag: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} "):
        run_demo(replace(DemoConfig(out=tmp_path / "run"), **{flag: value}))
    assert not (tmp_path / "run").exists()


def test_what_a_model_writes_is_no_markup(tmp_path: Path) -> None:
    out = io.StringIO()
    log = Logbook(tmp_path, Console(file=out, width=100))
    log.table("a [/b] title", ["one", "two"], [["[/x] [red]text", "1"]])
    assert "a [/b] title" in out.getvalue() and "[/x] [red]text" in out.getvalue()
