"""`raise-core eval` with a tiny model: what is recorded, killed and run again, samples, clips, bad files."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import raise_core as rc
from raise_trainer import cli, tiny, world
from raise_trainer.benchmarks.answers import Answer, read_answers
from raise_trainer.benchmarks.clips import Clip, ClipRequest, decode_clip
from raise_trainer.benchmarks.command import settings_of
from raise_trainer.benchmarks.run import evaluate
from raise_trainer.benchmarks.settings import EvalSettings
from raise_trainer.benchmarks.stamps import WHOLE, model_stamp
from raise_trainer.clips import write_mp4
from raise_trainer.demo import save_model
from raise_trainer.errors import BadMedia, UserError
from raise_trainer.media.sampling import Sampling
from raise_trainer.media.video import decode
from tests.budget import assert_as_exact_as_fp32
from tests.trainer import media_cases as cases

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).with_name("benchmark_rows")
TINY = ("--dtype", "float32", "--max-new-tokens", "6", "--pixels", str(56 * 56), "--frames", "4",
        "--template", "plain", "--workers", "0")  # fmt: skip


def video(file: Path, frames: int = 12) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    brightness = np.arange(frames, dtype=np.uint8) * 8 + 20
    write_mp4(file, np.broadcast_to(brightness[:, None, None, None], (frames, 56, 56, 3)).copy(), world.FPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and VSI-Bench's rows with videos: 4 of 5 are there, one of them torn."""
    root = tmp_path_factory.mktemp("eval")
    processor = tiny.build_processor()
    save_model(tiny.build_model(processor, seed=0), processor, root / "model")
    shutil.copytree(ROWS / "vsibench", root / "data/vsibench")
    for name in ("arkitscenes/41060001", "scannet/scene0001_00", "scannetpp/a1b2c3"):
        video(root / f"data/vsibench/{name}.mp4")
    shutil.copytree(ROWS / "mvbench", root / "data/mvbench")
    video(root / "data/mvbench/video/star/Charades_v1_480/ZZ001.mp4", 4 * world.FPS)
    pictures = root / "data/mvbench/video/tvqa/frames_fps3_hq/show_s01e01_clip_01"
    pictures.mkdir(parents=True)
    for i in range(1, 10):
        Image.new("RGB", (56, 56), (25 * i, 0, 0)).save(pictures / f"{i:05d}.jpg")
    torn = root / "data/mvbench/video/perception/videos/video_0001.mp4"
    video(torn)
    torn.write_bytes(torn.read_bytes()[:300])
    return root


def settings(folder: Path, out: Path, *more: object, bench: str = "vsibench") -> EvalSettings:
    return settings_of(
        [str(folder / "model"), "--bench", bench, "--data", str(folder / "data"), "--out", str(out), *TINY,
         *map(str, more)]
    )  # fmt: skip


def run(given: EvalSettings) -> tuple[Any, list[Answer]]:
    (result,) = evaluate(given, Console(file=io.StringIO()))
    return result, list(read_answers(given.out).values())


def test_an_answer_is_recorded_with_what_the_analysis_needs(folder: Path, tmp_path: Path) -> None:
    result, answers = run(settings(folder, tmp_path / "out"))
    assert [a.id for a in answers if a.usable] == [str(i) for i in range(9)]
    assert (result.questions, len(result.unusable), result.tasks[0].questions) == (10, 1, 1)
    lost = next(a for a in answers if not a.usable)
    assert (lost.id, lost.reason, lost.scores) == ("9", "bad_media", {"video_r1": 0.0, "official": 0.0})
    assert "41060002.mp4" in lost.detail and lost.question.startswith("In which order")
    one = answers[0]
    assert (one.bench, one.task, one.video) == ("vsibench", "object_counting", "arkitscenes/41060001.mp4")
    assert one.solution == "<answer>4</answer>" and one.tokens == 6 and one.truncated
    assert one.sequence_logp_mean is not None and one.sequence_logp_mean < 0


def test_nothing_is_asked_twice_and_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    given = settings(folder, tmp_path / "out", "--limit", 3)
    first, answers = run(given)
    before = (given.out / "answers.jsonl").read_bytes()
    again, _ = run(given)
    assert again == first and (given.out / "answers.jsonl").read_bytes() == before
    more, found = run(replace(given, limit=5))
    assert found[:3] == answers and len(found) == 5 and more.questions == 5
    with pytest.raises(UserError, match="frames was 4, is 8"):
        run(replace(given, frames=8))
    with pytest.raises(UserError, match="data/vsibench"):
        other = tmp_path / "data"
        shutil.copytree(folder / "data", other)
        with (other / "vsibench/test.jsonl").open("a") as file:
            file.write("\n")
        run(replace(given, data=other))


def test_answers_of_an_edited_template_or_of_weights_trained_on_are_not_mixed(
    folder: Path, tmp_path: Path
) -> None:
    model, template = tmp_path / "model", tmp_path / "t.yaml"
    shutil.copytree(folder / "model", model)
    template.write_text("text: '{question}{options}'")
    given = replace(
        settings(folder, tmp_path / "out", "--limit", 1), model=str(model), template=str(template)
    )
    run(given)
    template.write_text("text: 'Look. {question}{options}'")
    with pytest.raises(UserError, match="template_text was"):
        run(given)
    template.write_text("text: '{question}{options}'  # the same")
    run(given)
    processor = tiny.build_processor()
    save_model(tiny.build_model(processor, seed=1), processor, model)
    with pytest.raises(UserError, match="model_files was"):
        run(given)


def test_the_stamp_of_a_large_file_is_of_pieces_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    whole = bytearray(WHOLE + 7)

    def stamped(place: int) -> str:
        changed = whole.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        return model_stamp(str(tmp_path))

    file.write_bytes(whole)
    plain = model_stamp(str(tmp_path))
    stamps = {stamped(place) for place in (0, len(whole) // 2, len(whole) - 1)}
    assert len(stamps) == 3 and plain not in stamps
    file.write_bytes(whole + b"x")
    assert model_stamp(str(tmp_path)) not in {plain, *stamps}
    assert model_stamp("Some/Model") == ""


def test_answers_are_scored_by_the_rules_of_today(folder: Path, tmp_path: Path) -> None:
    """Those of an earlier version too: its scores and ours would be mixed in one mean."""
    given = settings(folder, tmp_path / "out", "--limit", 2)
    run(given)
    file = given.out / "answers.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0] |= {"text": "<answer>4</answer>", "vote": "", "reason": "unparsable"}
    lines[1] |= {"scores": {"official": 1.0, "video_r1": 1.0}}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result, _ = run(given)
    assert {k: v.mean for k, v in result.sample_mean.items()} == {"video_r1": 0.5, "official": 0.5}
    assert result.answered >= 0.5


def test_a_process_without_a_question_waits_for_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(folder, tmp_path / "out", "--limit", 1)
    wanted, _ = run(given)
    file = given.out / "answers.jsonl"
    of_the_first = file.read_bytes()
    file.unlink()
    met = list[Any]()

    def gather(value: Any) -> list[Any]:
        met.append(value)
        if len(met) == 3:  # after the answers
            file.write_bytes(of_the_first)
        return [value, value]

    for name, stand_in in (("rank", lambda: 1), ("size", lambda: 2), ("gather", gather)):
        monkeypatch.setattr(f"raise_trainer.ranks.{name}", stand_in)
    found, _ = run(given)
    assert found == wanted and not (given.out / "answers-1.jsonl").exists()


def test_answers_that_leave_no_room_for_a_prompt_are_refused(folder: Path, tmp_path: Path) -> None:
    """They were asked nothing, and every question scored 0 from then on."""
    given = settings(folder, tmp_path / "out", "--limit", 1)
    with pytest.raises(UserError, match=r"--max-new-tokens 1000000: the model's context is \d+ tokens"):
        run(replace(given, max_new_tokens=1_000_000))
    assert not read_answers(given.out)


def test_more_samples_add_to_those_that_are_there(folder: Path, tmp_path: Path) -> None:
    few = settings(folder, tmp_path / "few", "--limit", 3, "--samples", 2, "--temperature", 1)
    run(few)
    _, grown = run(replace(few, samples=3, batch=4))
    _, at_once = run(replace(few, out=tmp_path / "once", samples=3, batch=100))
    text = {a.key: a.text for a in at_once}
    assert {a.key: a.text for a in grown} == text and len(text) == 9
    assert len({a.text for a in at_once if a.id == "0"}) == 3
    assert [a.sample for a in grown] == [0, 1] * 3 + [2] * 3


def test_what_could_not_be_asked_is_asked_again_when_told(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder / "data/vsibench", data)
    given = replace(settings(folder, tmp_path / "out"), data=data)
    assert len(run(given)[0].unusable) == 1
    video(data / "arkitscenes/41060002.mp4")
    assert len(run(given)[0].unusable) == 1
    result, answers = run(replace(given, retry=True))
    assert result.unusable == [] and len(answers) == 10


def test_parts_of_videos_folders_of_pictures_and_torn_files(folder: Path, tmp_path: Path) -> None:
    result, answers = run(settings(folder, tmp_path / "out", bench="mvbench"))
    reasons = {a.id: a.reason for a in answers}
    assert reasons["object_shuffle/0"] == reasons["object_shuffle/1"] == "bad_media"
    assert {a.id for a in answers if a.usable} == {"action_sequence/0", "episodic_reasoning/0"}
    assert len(result.missing) == 17 and result.questions == 4


def test_figures_of_the_answer_span_are_of_the_sampled_tokens() -> None:
    from raise_trainer.benchmarks.load import load
    from raise_trainer.benchmarks.questions import Question
    from raise_trainer.benchmarks.run import _answer
    from raise_trainer.models import Policy

    tokenizer = tiny.build_tokenizer()
    ids = tokenizer("<think>x</think><answer>4 2</answer><|im_end|>", add_special_tokens=False)["input_ids"]
    p = torch.linspace(0.1, 0.9, len(ids), dtype=torch.float64)
    (found,) = rc.find_answer_spans([ids], tokenizer)
    assert found.stop - found.start >= 2
    question = load("vsibench", ROWS).items[0]
    assert isinstance(question, Question)
    policy = Policy(None, None, tokenizer, [tokenizer.eos_token_id], [])
    answer = _answer(question, 0, ids, p.log(), policy)
    assert (answer.prediction, answer.truncated, answer.tokens) == ("4 2", False, len(ids))
    assert answer.text == "<think>x</think><answer>4 2</answer>" and answer.scores["official"] == 1.0
    span = p[found.start : found.stop]
    for got, wanted in (
        (answer.answer_p_mean, span.mean()),
        (answer.answer_p_min, span.min()),
        (answer.answer_logp_mean, span.log().mean()),
        (answer.sequence_logp_mean, p.log().mean()),
    ):
        assert got is not None
        assert_as_exact_as_fp32(got, float(wanted), name="answer span")
    assert answer.answer_logp == span.log().tolist()
    bare = _answer(question, 0, ids[:2], p.log()[:2], policy)
    assert (
        bare.answer_p_min is None and bare.answer_logp is None and bare.truncated and bare.reason == "missing"
    )


def test_a_clip_is_those_frames_of_the_file(folder: Path) -> None:
    path = folder / "data/mvbench/video/star/Charades_v1_480/ZZ001.mp4"
    sampling = Sampling(frames=64)
    whole = decode(ClipRequest(path, sampling))
    first, last = world.FPS // 2, round(1.5 * world.FPS)
    part = decode_clip(ClipRequest(path, Sampling(frames=4), clip=Clip(0.5, 1.5)))
    assert (part.total, part.fps) == (last - first + 1, whole.fps)
    assert part.indices[0] == 0 and part.indices[-1] == part.total - 1
    for i, frame in zip(part.indices, part.pixels, strict=True):
        assert np.array_equal(frame, whole.pixels[whole.indices.index(first + i)])
    to_the_end = decode_clip(ClipRequest(path, sampling, clip=Clip(1.0, 1e9)))
    assert to_the_end.total == whole.total - world.FPS
    with pytest.raises(BadMedia, match="1 of its"):
        decode_clip(ClipRequest(path, sampling, clip=Clip(1.0, 1.0)))
    with pytest.raises(BadMedia, match="0 of its"):
        decode_clip(ClipRequest(path, sampling, clip=Clip(100.0, 101.0)))


def test_a_file_cut_short_shows_the_clips_that_are_whole_and_refuses_the_others(tmp_path: Path) -> None:
    path = cases.write(tmp_path / "a.mkv", cases.pictures())  # 2 s
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    whole = decode_clip(ClipRequest(path, Sampling(frames=4), clip=Clip(0.0, 0.5)))
    assert (whole.indices[0], whole.total) == (0, 16)
    for end in (1.9, math.inf):
        with pytest.raises(BadMedia, match=r"cut short at 1\.\d of 2\.0 s, before the clip's end"):
            decode_clip(ClipRequest(path, Sampling(frames=4), clip=Clip(0.5, end)))


def test_pictures_of_a_folder_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for i in (10, 9, 2, 1):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").touch()
    found = decode_clip(ClipRequest(tmp_path, Sampling(frames=4), clip=Clip(rate=3.0)))
    assert found.pixels[:, 0, 0, 0].tolist() == [20, 40, 180, 200]
    assert (found.total, found.fps) == (4, 3.0)
    with pytest.raises(BadMedia, match="without a rate"):
        decode_clip(ClipRequest(tmp_path, Sampling(frames=4)))
    Image.new("RGB", (9, 9)).save(tmp_path / "11.png")
    with pytest.raises(BadMedia, match="several sizes"):
        decode_clip(ClipRequest(tmp_path, Sampling(frames=4), clip=Clip(rate=3.0)))


def command(folder: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "raise_trainer.cli", "eval", str(folder / "model"), "--bench", "vsibench",
        "--data", str(folder / "data"), "--out", str(out), *TINY, "--batch", "2",
        "--samples", "2", "--temperature", "1",
    ]  # fmt: skip


def test_killed_in_the_middle_and_run_again(folder: Path, tmp_path: Path) -> None:
    """SIGKILL once some answers are written, and again the file is torn: the same answers, none twice."""
    path = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "trainer"))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(folder, out), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    file, until = out / "answers.jsonl", time.monotonic() + 300
    while not (file.is_file() and file.stat().st_size) and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = file.read_bytes().splitlines(keepends=True)
    assert 0 < len(kept) < 20
    torn = kept[-1][: len(kept[-1]) // 2]
    file.write_bytes(b"".join(kept[:-1]) + torn)
    given = settings(folder, out, "--batch", 2, "--samples", 2, "--temperature", 1)
    result, answers = run(given)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    keys = [(line["bench"], line["id"], line["sample"]) for line in lines]
    assert len(keys) == len(set(keys)) == 20
    assert file.read_bytes().startswith(b"".join(kept[:-1]))
    whole, wanted = run(replace(given, out=tmp_path / "whole"))
    assert {a.key: a.text for a in answers} == {a.key: a.text for a in wanted}
    assert result.sample_mean == whole.sample_mean and result.votes == whole.votes


def test_the_command_prints_tables_and_writes_the_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(folder, tmp_path / "out")[3:]
    monkeypatch.setattr(sys, "argv", ["raise-core", *arguments[:-4], "--limit", "2", "--scorer", "official"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "2 questions, 2 answers to take" in said and "all tasks (macro mean)" in said
    assert "video_r1" not in said
    made = json.loads((tmp_path / "out/results.json").read_text())
    assert made["results"][0]["questions"] == 2 and (tmp_path / "out/results.html").is_file()


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings_of(["a/b/", "--bench", "all", "--data", "d", "--frames", "32"])
    assert (given.out, len(given.bench), given.frames) == (Path("runs/eval-b-32"), 6, 32)
    assert settings_of(["m", "--bench", "mmvu", "mmvu", "--data", "d"]).bench == ("mmvu",)
    monkeypatch.chdir(tmp_path)
    outs = set[Path]()
    for model in (
        "runs/x/checkpoints/save-1/model",
        "runs/x/checkpoints/save-2/model",
        "runs/y/model",
        "model",
    ):
        (tmp_path / model).mkdir(parents=True, exist_ok=True)
        outs.add(settings_of([model, "--bench", "mmvu", "--data", "d"]).out)
    assert outs == {Path("runs") / f"eval-{name}-16" for name in ("x-save-1", "x-save-2", "y", "model")}
    with pytest.raises(SystemExit):
        settings_of(["m", "--bench", "other", "--data", "d"])
