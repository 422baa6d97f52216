"""Rows are checked one by one: a bad one is refused with its id or counted, never replaced."""

import json
from pathlib import Path
from typing import Any

import pytest

from raise_trainer.data import Refused, Row, keep_good, load_rows
from raise_trainer.errors import BadRow, UserError

GOOD: dict[str, Any] = {
    "problem_id": 7,
    "problem": "What colour is the shape?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. red", "B. green"],
    "solution": "<answer>B</answer>",
    "path": "./clips/a.mp4",
    "data_source": "demo/colour",
}


def load(
    tmp_path: Path, rows: list[Any], *, on_bad: Any = "fail", lines: bool = False
) -> tuple[list[Row], Refused]:
    file = tmp_path / "rows.json"
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    refused = Refused()
    return load_rows(file, tmp_path, on_bad=on_bad, refused=refused), refused


@pytest.mark.parametrize("lines", [False, True])
def test_a_good_row(tmp_path: Path, lines: bool) -> None:
    (row,), refused = load(tmp_path, [GOOD], lines=lines)
    assert row.path == (tmp_path / "clips/a.mp4").resolve() and row.strict and not refused.items
    assert row.question == "What colour is the shape?\nOptions:\nA. red\nB. green"
    assert row.text_score("<think>x</think><answer>B. green</answer>") == 1.0
    assert row.text_score("<answer>A</answer>") == 0.0


def test_several_references_are_all_used(tmp_path: Path) -> None:
    both = GOOD | {"problem_type": "free-form", "references": ["a red circle", "the circle is red"]}
    (row,), _ = load(tmp_path, [both])
    assert 0.0 < row.text_score("<answer>a red circle</answer>") < 1.0


BAD = {
    "no `solution`": {k: v for k, v in GOOD.items() if k != "solution"},
    "no `problem`": GOOD | {"problem": "  "},
    "problem_type 'essay'": GOOD | {"problem_type": "essay"},
    "data_type 'audio'": GOOD | {"data_type": "audio"},
    "leaves the data root": GOOD | {"path": "../../etc/passwd"},
    "is no path": GOOD | {"path": "a\0b.mp4"},
    "got list": ["not", "a", "row"],
    "`options` is '5'": GOOD | {"options": 5},
    "`references` is 'a red'": GOOD | {"problem_type": "free-form", "references": "a red"},
    "`references` on a numerical row": GOOD | {"problem_type": "numerical", "references": ["a"]},
    "`data_source` is NoneType": GOOD | {"data_source": None},
    "cannot be read as numerical": GOOD | {"problem_type": "numerical", "solution": "three"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_stops_the_run_or_is_counted_with_its_id(tmp_path: Path, message: str) -> None:
    with pytest.raises(BadRow, match=message) as error:
        load(tmp_path, [GOOD, BAD[message]])
    assert "\n" not in str(error.value) and ("row 7" in str(error.value) or "row 1" in str(error.value))
    rows, refused = load(tmp_path, [GOOD, BAD[message], GOOD], on_bad="skip")
    assert len(rows) == 2 and refused.kinds == {"BadRow": 1} and message in refused.items[0]
    assert "1 left out (1 BadRow)" in str(refused)


def test_a_link_out_of_the_data_root_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(BadRow, match="leaves the data root"):
        load(root, [GOOD | {"path": "link.mp4"}])


def test_a_bad_line_is_one_bad_row_and_blank_lines_are_none(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([json.dumps(GOOD), "   ", "{broken", json.dumps(GOOD)]))
    refused = Refused()
    assert len(load_rows(file, tmp_path, on_bad="skip", refused=refused)) == 2
    assert len(refused.items) == 1 and "row 1: not JSON" in refused.items[0]


@pytest.mark.parametrize(
    "content, message",
    [(b"[{", "not JSON"), (b"[]", "no usable row"), (b"\xff\xfe", "not UTF-8"), (None, "No such file")],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "rows.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_rows(file, tmp_path, on_bad="skip", refused=Refused())
    assert str(file) in str(error.value)


def test_other_errors_are_not_swallowed() -> None:
    def broken(_: int) -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        keep_good([1], broken, "skip", Refused())
