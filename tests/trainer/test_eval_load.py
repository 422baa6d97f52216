"""Published files and Video-R1's to questions: what is read, and that no row disappears."""

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from raise_trainer.benchmarks.clips import Clip
from raise_trainer.benchmarks.command import settings_of
from raise_trainer.benchmarks.extraction import AnswerReason
from raise_trainer.benchmarks.load import BENCHMARKS, load
from raise_trainer.benchmarks.questions import Question, Refused
from raise_trainer.benchmarks.settings import NAMES
from raise_trainer.errors import UserError

ROWS = Path(__file__).with_name("benchmark_rows")
PUBLISHED = ROWS / "vsibench" / "test.jsonl"


def write(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_names_of_the_command_are_the_benchmarks() -> None:
    assert tuple(BENCHMARKS) == NAMES


def test_vsi_bench() -> None:
    found = load("vsibench", ROWS)
    assert (found.source, len(found.items), found.missing) == ("published", 10, ())
    first, last = found.items[0], found.items[-1]
    assert isinstance(first, Question) and isinstance(last, Question)
    assert (first.task, first.rule, first.problem_type) == ("object_counting", "number", "regression")
    assert first.path == (ROWS / "vsibench/arkitscenes/41060001.mp4").resolve()
    assert first.video == "arkitscenes/41060001.mp4"
    assert (last.number, last.rule, last.solution) == (9, "choice", "<answer>A</answer>")
    assert last.options[0] == "A. lamp, bed, sofa"
    group = found.benchmark.group
    assert len({group(item.task) for item in found.items}) == 8
    assert group("object_rel_direction_hard") == group("object_rel_direction_easy")


def test_video_mmmu_has_three_levels_in_folders_by_discipline() -> None:
    items = load("videommmu", ROWS).items
    assert [item.task for item in items] == ["perception", "comprehension", *["adaptation"] * 3]
    assert all(isinstance(item, Question) for item in items)
    assert [item.video for item in items] == [
        "Art/dev_Art_Theory_1.mp4", "Science/new_Physics_2.mp4", "Science/validation_Math_3.mp4",
        "Medicine/validation_Public_Health_4.mp4", "Business/validation_Economics_5.mp4",
    ]  # fmt: skip
    perception, comprehension, numeric, words, choice = (i for i in items if isinstance(i, Question))
    assert "quiz" in perception.problem and "quiz" in comprehension.problem
    assert "at the end of the video" in choice.problem
    assert (numeric.rule, words.rule, choice.rule) == ("open", "open", "choice")
    assert choice.options[4] == "E. Not shown"


def test_mmvu_keeps_its_two_kinds_of_question_apart(tmp_path: Path) -> None:
    items = load("mmvu", ROWS).items
    assert [item.task for item in items] == ["open-ended", "multiple-choice", "open-ended"]
    assert items[1].video == items[2].video == "Chemistry/7.mp4"
    shutil.copytree(ROWS / "mmvu", tmp_path / "mmvu")
    (tmp_path / "mmvu/videos").mkdir()
    assert load("mmvu", tmp_path).items[1].video == "videos/Chemistry/7.mp4"


def test_mvbench_shows_the_part_that_a_row_names_of_a_whole_video(tmp_path: Path) -> None:
    shutil.copytree(ROWS / "mvbench", tmp_path / "mvbench")
    found = load("mvbench", tmp_path)
    assert len(found.items) == 4 and len(found.missing) == 17
    by_id = {item.id: item for item in found.items if isinstance(item, Question)}
    segment = by_id["action_sequence/0"]
    assert (segment.video, segment.clip) == ("video/star/Charades_segment/ZZ001.mp4", None)
    assert segment.solution == "<answer>C</answer>"
    whole = tmp_path / "mvbench/video/star/Charades_v1_480/ZZ001.mp4"
    pictures = tmp_path / "mvbench/tvqa/frames_fps3_hq/show_s01e01_clip_01"
    for place in (whole, pictures):
        place.mkdir(parents=True)
    by_id = {i.id: i for i in load("mvbench", tmp_path).items if isinstance(i, Question)}
    assert by_id["action_sequence/0"].clip == Clip(0.5, 1.5, 3.0)
    assert by_id["action_sequence/0"].path == whole
    assert by_id["episodic_reasoning/0"].clip == Clip(0.0, 2.0, 3.0)
    assert by_id["episodic_reasoning/0"].video == "tvqa/frames_fps3_hq/show_s01e01_clip_01"
    assert by_id["object_shuffle/1"].clip is None and by_id["object_shuffle/1"].options[1] == "B. A dog runs"


def test_temp_compass_takes_the_options_out_of_the_question() -> None:
    items = [item for item in load("tempcompass", ROWS).items if isinstance(item, Question)]
    assert [item.rule for item in items] == ["choice", "yes_no", "yes_no", "caption", "caption"]
    assert items[0].task == "multi-choice, action"
    assert (items[0].problem, items[0].options) == (
        "What is happening in the video?", ("A. a ball rolls", "B. a ball flies"),
    )  # fmt: skip
    assert items[1].problem.endswith("Answer yes or no.") and items[1].r1_kind == "multiple choice"
    assert items[3].solution == "<answer>B</answer>" and items[4].solution == "<answer>1</answer>"


def test_video_mme_by_length() -> None:
    items = load("videomme", ROWS).items
    assert [item.task for item in items] == ["short", "short", "medium", "long"]
    assert items[0].video == items[1].video == "data/aAbBcC.mp4"


def test_a_clone_of_video_mme_has_a_folder_of_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dDeEfF.mkv").touch()
    (tmp_path / "videomme").mkdir()
    shutil.copy(ROWS / "videomme/test.jsonl", tmp_path / "videomme")
    third = load("videomme", tmp_path).items[2]
    assert isinstance(third, Question) and third.path == tmp_path / "data/dDeEfF.mkv"
    (tmp_path / "data").rename(tmp_path / "videomme/data")
    third = load("videomme", tmp_path).items[2]
    assert isinstance(third, Question) and third.path == tmp_path / "videomme/data/dDeEfF.mkv"


def test_paths_of_video_r1_rows_begin_where_their_file_is(tmp_path: Path) -> None:
    (tmp_path / "vsibench").mkdir()
    shutil.copy(ROWS / "video_r1/eval_vsibench.json", tmp_path)
    first = load("vsibench", tmp_path).items[0]
    assert isinstance(first, Question) and first.path == tmp_path / "arkitscenes/41060001.mp4"
    (tmp_path / "eval_vsibench.json").rename(tmp_path / "vsibench/eval_vsibench.json")
    first = load("vsibench", tmp_path).items[0]
    assert isinstance(first, Question) and first.path == tmp_path / "vsibench/arkitscenes/41060001.mp4"


def test_video_r1_rows_are_the_trainers_own() -> None:
    found = load("vsibench", ROWS / "video_r1")
    assert (found.source, len(found.items)) == ("video_r1", 2)
    assert [item.rule for item in found.items if isinstance(item, Question)] == ["number", "choice"]
    assert found.items[0].video == "./arkitscenes/41060001.mp4"
    rules = [item.rule for item in load("mmvu", ROWS / "video_r1").items if isinstance(item, Question)]
    assert rules == ["choice", "open", "open", "open"]


def test_a_number_of_vsi_bench_is_scored_by_its_error_whatever_video_r1_calls_it(tmp_path: Path) -> None:
    row = json.loads((ROWS / "video_r1/eval_vsibench.json").read_text())[0]
    row |= {
        "problem_type": "numerical",
        "question_type": "object_counting",
        "path": "/a/b.mp4",
        "options": None,
    }
    del row["problem_id"]
    write(tmp_path / "eval_vsibench.jsonl", [row | {"id": "vsi_7"}])
    (item,) = load("vsibench", tmp_path).items
    assert isinstance(item, Question)
    assert (item.id, item.task, item.rule, item.r1_kind) == (
        "vsi_7",
        "object_counting",
        "number",
        "numerical",
    )
    assert item.path == tmp_path / "a/b.mp4"


def test_mvbench_times_that_are_no_times(tmp_path: Path) -> None:
    (tmp_path / "video/star/Charades_v1_480/ZZ001.mp4").mkdir(parents=True)
    row = json.loads((ROWS / "mvbench/json/action_sequence.json").read_text())[0]
    bad = [
        {"start": 3, "end": 1},
        {"start": math.nan},
        {"end": "2"},
        {"fps": "3"},
        {"start": None, "fps": -1},
    ]
    write(tmp_path / "action_sequence.jsonl", [*(row | change for change in bad), row | {"start": None}])
    *refused, whole = load("mvbench", tmp_path).items
    reasons = [item.reason for item in refused if isinstance(item, Refused)]
    assert ["start <= end" in r for r in reasons] == [True, True, True, False, False]
    assert ["above 0" in r for r in reasons] == [False, False, False, True, True]
    assert isinstance(whole, Question) and whole.clip == Clip(0.0, math.inf, 3.0)


def test_fields_that_are_not_the_schemas_are_passed_over(tmp_path: Path) -> None:
    """As in a file that Video-R1's evaluation wrote: its scores, chains and outputs."""
    row = json.loads((ROWS / "video_r1/eval_vsibench.json").read_text())[0]
    more = {"reward": 1.0, "correct": True, "process": None, "answer": 4, "steps": 3, "data_source": None}
    write(tmp_path / "eval_vsibench.jsonl", [row | more])
    (item,) = load("vsibench", tmp_path).items
    assert isinstance(item, Question) and (item.reward, item.process) == ("", "")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected one of vsibench, videommmu"):
        load("vsi", ROWS)
    with pytest.raises(UserError, match=r"no annotation file in .*test\.json\[l\].*eval_vsibench\.json"):
        load("vsibench", tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        load("vsibench", tmp_path / "none")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"no row in .*test\.jsonl"):
        load("vsibench", tmp_path)


def test_both_forms_in_one_folder_need_a_word(tmp_path: Path) -> None:
    shutil.copy(PUBLISHED, tmp_path)
    shutil.copy(ROWS / "video_r1/eval_vsibench.json", tmp_path)
    with pytest.raises(UserError, match="--source"):
        load("vsibench", tmp_path)
    assert len(load("vsibench", tmp_path, source="published").items) == 10
    assert len(load("vsibench", tmp_path, source="video_r1").items) == 2
    (tmp_path / "vsibench").mkdir()
    (tmp_path / "test.jsonl").rename(tmp_path / "vsibench/test.jsonl")
    with pytest.raises(UserError, match="--source"):
        load("vsibench", tmp_path)
    assert len(load("vsibench", tmp_path, source="published").items) == 10
    found = load("vsibench", tmp_path, source="video_r1").items[0]
    assert isinstance(found, Question) and found.path == tmp_path / "arkitscenes/41060001.mp4"


def test_the_fingerprint_is_of_the_bytes(tmp_path: Path) -> None:
    copy = Path(shutil.copy(PUBLISHED, tmp_path))
    assert load("vsibench", tmp_path).fingerprint == load("vsibench", ROWS).fingerprint
    copy.write_bytes(copy.read_bytes() + b"\n")
    assert load("vsibench", tmp_path).fingerprint != load("vsibench", ROWS).fingerprint


class FakeTable:
    """A parquet file as pyarrow shows it; the file holds JSON lines."""

    def __init__(self, file: Path) -> None:
        self.rows = [json.loads(line) for line in file.read_text().splitlines()]
        if not self.rows:
            raise OSError("no footer\nin it")

    def __enter__(self) -> "FakeTable":
        return self

    def __exit__(self, *_: object) -> None:
        self.rows = []

    def iter_batches(self, batch_size: int) -> Iterator["FakeTable"]:
        yield self

    def to_pylist(self) -> list[Any]:
        return self.rows


def test_parquet_shards_are_read_in_order_where_pyarrow_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    fake.ArrowException = KeyError  # type: ignore[attr-defined]
    parquet.ParquetFile = FakeTable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", fake)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    rows = [json.loads(line) for line in PUBLISHED.read_text().splitlines()]
    write(tmp_path / "test-00001-of-00002.parquet", rows[6:])
    write(tmp_path / "test-00000-of-00002.parquet", rows[:6])
    found = load("vsibench", tmp_path)
    assert [i.id for i in found.items] == [str(i) for i in range(10)]
    (tmp_path / "test-00001-of-00002.parquet").write_text("")
    with pytest.raises(UserError, match=r"cannot be read \(no footer\)"):
        load("vsibench", tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(tmp_path / "test.parquet", [])
    with pytest.raises(UserError, match="pip install pyarrow"):
        load("vsibench", tmp_path)


def test_the_page_names_every_benchmark_reason_and_option() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/evaluate.md").read_text()
    for name in NAMES:
        assert f"| `{name}` |" in text
    for reason in (*get_args(get_args(AnswerReason)[0]), *get_args(get_args(AnswerReason)[1])):
        assert f"`{reason}`" in text
    commands = re.findall(r"(?:raise-core|cli) (eval .*)", text)
    assert len(commands) == 3
    for command in commands:
        assert settings_of(command.split()[1:]).model == "MODEL"
