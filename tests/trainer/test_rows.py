"""Video, image and text rows; routes; what is refused, with the row's id."""

from pathlib import Path
from typing import Any

import pytest

from raise_trainer.errors import BadRow
from raise_trainer.rows import PROBLEM_TYPES, Row, parse_row

VIDEO: dict[str, Any] = {
    "problem_id": 7,
    "problem": "What colour is it?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. red", "B. green"],
    "solution": "<answer>B</answer>",
    "path": "./clips/a.mp4",
}
TEXT = {**VIDEO, "data_type": "text", "path": None}
SOLUTIONS = {"multiple choice": "B", "numerical": "3", "regression": "0.5", "OCR": "a b", "free-form": "red"}


def parse(raw: Any, reward: str = "") -> Row:
    return parse_row(3, raw, Path("/data"), reward)


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_each_kind_has_a_route_that_row_and_data_set_may_change(kind: str) -> None:
    raw = {**TEXT, "problem_type": kind, "solution": f"<answer>{SOLUTIONS[kind]}</answer>"}
    usual = "scre" if kind in ("multiple choice", "numerical") else "igsr"
    other = "igsr" if usual == "scre" else "scre"
    assert parse(raw).route == usual and parse(raw).strict == (usual == "scre")
    assert parse(raw, reward=other).route == other
    assert parse({**raw, "reward": usual}, reward=other).route == usual  # the row's word is the last
    assert parse({**raw, "reward": other}).route == other
    assert parse({**raw, "reward": ""}, reward=other).route == other


def test_media_rows_have_paths_and_text_rows_have_none() -> None:
    assert parse(VIDEO).path == Path("/data/clips/a.mp4")
    assert parse({**VIDEO, "data_type": "image", "path": "b.png"}).path == Path("/data/b.png")
    for path in ({}, {"path": ""}, {"path": None}):
        raw = {k: v for k, v in TEXT.items() if k != "path"} | path
        assert parse(raw).path is None


def test_a_row_without_id_is_named_by_its_number() -> None:
    row = parse({k: v for k, v in VIDEO.items() if k != "problem_id"})
    assert row.problem_id == 3


BAD: dict[str, Any] = {
    "a text row with a `path`": {**TEXT, "path": "a.mp4"},
    "no `path`": {**VIDEO, "data_type": "image", "path": None},
    "data_type 'audio', expected one of video, image, text": {**VIDEO, "data_type": "audio"},
    "reward 'best', expected one of scre, igsr": {**VIDEO, "reward": "best"},
    "`reward` is int": {**VIDEO, "reward": 1},
    "without `options`": {**VIDEO, "options": None},
    r"solution 'C' is none of the options \(A, B\)": {**VIDEO, "solution": "<answer>C</answer>"},
    "`process` is list": {**VIDEO, "process": ["a"]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_named(message: str) -> None:
    with pytest.raises(BadRow, match=f"row 7: .*{message}"):
        parse(BAD[message])


@pytest.mark.parametrize("row_id", [None, 1.5, True, ["a"]])
def test_an_id_is_a_number_or_a_text(row_id: object) -> None:
    with pytest.raises(BadRow, match="row 3: `problem_id` is"):
        parse({**VIDEO, "problem_id": row_id})


def test_options_without_letters_are_not_compared_by_letter() -> None:
    row = parse({**VIDEO, "options": ["red", "green"], "solution": "<answer>green</answer>"})
    assert row.text_score("<answer>Green</answer>") == 1.0
    assert row.text_score("<answer>red</answer>") == 0.0
