"""Rows of benchmarks that cannot be asked: refused by name, in their task, and none stops an evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest

from raise_trainer.benchmarks.load import load
from raise_trainer.benchmarks.questions import Question, Refused

ROWS = Path(__file__).with_name("benchmark_rows")
PUBLISHED = ROWS / "vsibench" / "test.jsonl"


def write(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def first_row(file: Path) -> dict[str, Any]:
    text = file.read_text()
    found = json.loads(text)[0] if text.startswith("[") else json.loads(text.splitlines()[0])
    return dict(found)


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("no key", {"question": None}, "question"),
    ("no number", {"ground_truth": "many"}, "cannot be read as regression"),
    ("out of the folder", {"dataset": "../.."}, "leaves the data root"),
    ("letter of no option", {"options": ["A. x", "B. y"], "ground_truth": "C"}, "none of the options"),
    ("options that are none", {"options": "A or B"}, "list of non-empty strings"),
]


@pytest.mark.parametrize(("changes", "reason"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_row_that_cannot_be_used_is_refused_by_name_and_counts(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    good = json.loads(PUBLISHED.read_text().splitlines()[0])
    write(tmp_path / "test.jsonl", [good, good | {"id": 77} | changes])
    first, second = load("vsibench", tmp_path).items
    assert isinstance(first, Question) and isinstance(second, Refused)
    assert (second.id, second.number, second.task) == ("77", 1, "object_counting")
    assert reason in second.reason


def test_lines_that_are_no_rows_and_repeated_ids_count_too(tmp_path: Path) -> None:
    good = PUBLISHED.read_text().splitlines()[0]
    (tmp_path / "test.jsonl").write_text(f"{good}\n[1]\n{{broken\n{good}\n")
    items = load("vsibench", tmp_path).items
    assert [item.id for item in items] == ["0", "row 1", "row 2", "0#2"]
    assert [type(item) for item in items] == [Question, Refused, Refused, Question]
    assert [item.number for item in items] == [0, 1, 2, 3]
    assert len(load("vsibench", tmp_path, limit=2).items) == 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("x x x", "x x#2 x#3"),
        ("x x x#2 x", "x x#2 x#2#2 x#3"),
        ("x x#2 x x", "x x#2 x#3 x#4"),
    ],
)
def test_no_two_rows_have_one_id(given: str, wanted: str, tmp_path: Path) -> None:
    row = first_row(ROWS / "video_r1/eval_vsibench.json")
    write(tmp_path / "eval_vsibench.jsonl", [row | {"problem_id": name} for name in given.split()])
    assert [item.id for item in load("vsibench", tmp_path).items] == wanted.split()


@pytest.mark.parametrize(
    ("name", "changes", "task"),
    [
        ("tempcompass/yes_no", {"answer": "perhaps"}, "yes_no, action"),
        ("tempcompass/yes_no", {"dim": None}, "yes_no"),
        ("videommmu/Perception", {"id": "dev_Alchemy_1"}, "perception"),
        ("mmvu/validation", {"answer": None}, "open-ended"),
        ("videomme/test", {"options": "A"}, "short"),
        ("video_r1/eval_vsibench", {"problem_type": "?"}, "vsibench"),
        ("video_r1/eval_vsibench", {"problem_type": "?", "task": " counting "}, "counting"),
        ("vsibench/test", {"question": None, "question_type": 3}, "unreadable rows"),
    ],
)
def test_a_row_that_is_refused_counts_in_its_task(
    name: str, changes: dict[str, Any], task: str, tmp_path: Path
) -> None:
    """A line of its own in the macro mean would weigh as much as all questions of a task."""
    bench, _, stem = name.partition("/")
    (file,) = (f for f in (ROWS / bench).rglob("*.json*") if f.stem == stem)
    row = first_row(file)
    write(tmp_path / f"{stem}.jsonl", [row | changes])
    (item,) = load("vsibench" if bench == "video_r1" else bench, tmp_path).items
    assert isinstance(item, Refused) and item.task == task


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mvbench/json/object_shuffle", {"answer": "Nowhere."}, "none of the candidates"),
        ("mvbench/json/object_shuffle", {"candidates": [str(i) for i in range(27)]}, "at most 26"),
        ("tempcompass/yes_no", {"answer": "perhaps"}, "expected yes or no"),
        ("tempcompass/multi-choice", {"question": "What?\nno option"}, "a line with the question"),
        ("tempcompass/multi-choice", {"answer": "C. none"}, "none of the options"),
        ("videommmu/Perception", {"id": "dev_Alchemy_1"}, "none of the 30"),
        ("mmvu/validation", {"question_type": "multiple-choice", "choices": "A"}, "letters with texts"),
    ],
)
def test_each_loader_names_what_is_wrong(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    bench, _, stem = name.partition("/")
    (file,) = (f for f in (ROWS / bench).rglob("*.json*") if str(f.with_suffix("")).endswith(stem))
    row = first_row(file)
    write(tmp_path / bench / file.relative_to(ROWS / bench).with_suffix(".jsonl"), [row | changes])
    (item,) = load(bench, tmp_path).items
    assert isinstance(item, Refused) and reason in item.reason


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("video_r1/eval_vsibench.json", {"problem_type": ["multiple choice"]}, "problem_type"),
        ("video_r1/eval_vsibench.json", {"problem": "how many \ud83d?"}, "surrogate"),
        ("video_r1/eval_vsibench.json", {"options": ["A. \udc00"]}, "surrogate"),
        ("vsibench/test.jsonl", {"id": "\ud800", "question_type": "\ud800"}, "surrogate"),
        ("mvbench/json/action_sequence.json", {"\ud800": 1}, "surrogate"),
    ],
)
def test_no_row_stops_an_evaluation(name: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    row = first_row(ROWS / name)
    file = tmp_path / Path(name).with_suffix(".jsonl").name
    write(file, [row | changes, row])
    bench = Path(name).stem.removeprefix("eval_") if "video_r1" in name else name.partition("/")[0]
    first, second = load(bench, tmp_path).items
    assert isinstance(first, Refused) and reason in first.reason and isinstance(second, Question)
    json.dumps([first.id, first.task, first.video, first.reason], ensure_ascii=False).encode()


@pytest.mark.parametrize("name", ["mvbench/json/action_sequence.json", "videomme/test.jsonl"])
def test_a_video_name_that_the_file_system_refuses_is_a_video_that_is_not_there(
    name: str, tmp_path: Path
) -> None:
    row = first_row(ROWS / name)
    write(
        tmp_path / Path(name).with_suffix(".jsonl").name, [row | {"video": "v" * 300, "videoID": "v" * 300}]
    )
    (item,) = load(name.partition("/")[0], tmp_path).items
    assert isinstance(item, Question) and item.video.count("v") >= 300
