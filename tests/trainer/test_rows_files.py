"""Rows by byte offset: the same rows as `json` reads, in bounded memory, and what is no JSON is named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raise_trainer import row_files
from raise_trainer.errors import BadRow, UserError
from raise_trainer.row_files import RowFile, RowSource
from raise_trainer.train_config import DataFile

ROW: dict[str, Any] = {
    "problem": "What is it?",
    "data_type": "text",
    "problem_type": "free-form",
    "solution": "<answer>a ball</answer>",
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def write(file: Path, text: str | bytes) -> RowFile:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return RowFile(file, file.parent)


def values(file: RowFile) -> list[Any]:
    return [file.raw(i) for i in range(len(file))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(
    items=st.lists(JSON, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_a_list_is_read_as_json_reads_it_however_it_is_cut_into_chunks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    items: list[Any],
    chunk: int,
    indent: int | None,
    ascii_only: bool,
    bom: bool,
) -> None:
    monkeypatch.setattr(row_files, "CHUNK", chunk + 3)  # the mark is read whole
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    found = write(tmp_path / "list.json", (b"\xef\xbb\xbf" if bom else b"") + text.encode())
    assert values(found) == items


@pytest.mark.parametrize("chunk", range(4, 12))
def test_a_number_is_read_whole_wherever_it_is_cut(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "CHUNK", chunk)
    items = [-0.0, 12.5, 1e300, -2.5e-7, 3]
    text = "[-0.0,12.5,1e+300,-2.5E-7,3]"
    assert values(write(tmp_path / "list.json", text)) == items
    for wrong in ("[1.]", "[1.x]", "[2e+]", "[1e"):
        with pytest.raises(UserError, match="not JSON"):
            write(tmp_path / "wrong.json", wrong)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    items=st.lists(st.dictionaries(st.text(), JSON), max_size=6),
    chunk=st.integers(1, 40),
    end=st.sampled_from(["", "\n", "\r\n", "\n \n\n"]),
)
def test_lines_are_read_as_json_reads_them_however_they_are_cut_into_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: list[Any], chunk: int, end: str
) -> None:
    monkeypatch.setattr(row_files, "CHUNK", chunk)
    joint = end if "\n" in end else "\n"
    text = joint.join(json.dumps(item, ensure_ascii=False) for item in items) + end
    assert values(write(tmp_path / "rows.jsonl", text)) == items


@pytest.mark.parametrize(
    "text, message",
    [
        ("[{", r"row 0, byte 2"),
        ("[1, 2", r"row 1, byte 5: expected a comma or the closing bracket"),
        ("[1 2]", r"row 0, byte 3: expected a comma"),
        ("[1,]", r"row 1, byte 3: Expecting value"),
        ("[1] 2", r"row 0, byte 4: more after the closing bracket"),
        ('["é", tru]', r"row 1, byte 7: Expecting value"),
        ("[" + "[" * 200_000, "a number or a nesting too large"),
        ("[" + "1" * 5000 + "]", "a number or a nesting too large"),
    ],
)
def test_what_is_no_list_of_json_is_named_with_its_byte(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"not JSON .*{message}"):
        write(tmp_path / "list.json", text)


def test_a_missing_quotation_mark_does_not_read_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "CHUNK", 16)
    monkeypatch.setattr(row_files, "LONGEST_ROW", 64)
    file = tmp_path / "list.json"
    file.write_text('[{"a": "never ends' + " x" * 10_000)
    with pytest.raises(UserError, match="row 0, byte 7: Unterminated string"):
        RowFile(file, tmp_path)


@pytest.mark.parametrize("line", [b'{"a": "\xff"}', b"{broken", b"1" * 5000])
def test_a_line_that_is_no_json_is_one_bad_row(tmp_path: Path, line: bytes) -> None:
    good = json.dumps(ROW).encode()
    file = write(tmp_path / "rows.jsonl", b"\n".join([good, b"  ", line, good]))
    assert len(file) == 3 and file[0].problem_id == 0 and file[2].problem_id == 2
    with pytest.raises(BadRow, match="row 1: not"):
        file[1]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_row_beyond_the_file_is_an_index_error(tmp_path: Path, index: int) -> None:
    file = write(tmp_path / "rows.json", json.dumps([ROW, ROW]))
    with pytest.raises(IndexError, match=f"row {index} of 2"):
        file[index]
    with pytest.raises(IndexError, match=f"row {index} of 2"):
        RowSource([file])[index]


def test_a_file_that_changes_or_goes_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.json", json.dumps([ROW]))
    assert file[0].problem == ROW["problem"]
    file.file.write_text(json.dumps([ROW, ROW]))
    with pytest.raises(UserError, match="has changed since"):
        file[0]
    file.file.unlink()
    with pytest.raises(UserError, match="No such file"):
        file[0]


# --- several files ----------------------------------------------------------------------------------------


def test_files_are_one_sequence_with_their_own_roots_and_routes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    video = {**ROW, "data_type": "video", "path": "v.mp4"}
    for name, rows in {"a.json": [ROW, video], "empty.json": [], "b/b.json": [video]}.items():
        (tmp_path / name).write_text(json.dumps(rows))
    files = [
        DataFile(path=tmp_path / "a.json"),
        DataFile(path=tmp_path / "empty.json"),
        DataFile(path=tmp_path / "b/b.json", reward="scre"),
    ]
    source = RowSource.open(files)
    assert len(source) == 3 and [source.where(i)[1] for i in range(3)] == [0, 1, 0]
    assert [source[i].path for i in range(3)] == [None, tmp_path / "v.mp4", tmp_path / "b/v.mp4"]
    assert [source[i].route for i in range(3)] == ["igsr", "igsr", "scre"]
    elsewhere = RowSource.open([DataFile(path=tmp_path / "b/b.json", root=tmp_path)])
    assert elsewhere[0].path == tmp_path / "v.mp4"


def test_no_row_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.json: no row"):
        RowSource([write(tmp_path / "rows.json", "[]")])
    with pytest.raises(UserError, match="no file: no row"):
        RowSource([])


def test_the_fingerprint_is_of_the_bytes_the_order_and_the_routes(tmp_path: Path) -> None:
    a, b = json.dumps([ROW]), json.dumps([ROW, ROW])
    one, two = write(tmp_path / "a.json", a), write(tmp_path / "b.json", b)
    moved = write(tmp_path / "c.json", a)
    assert RowSource([one, two]).fingerprint == RowSource([moved, two]).fingerprint
    routed = RowFile(one.file, tmp_path, reward="scre")
    touched = write(tmp_path / "d.json", a.replace("What", "Wha"))
    others = [[two, one], [one], [routed, two], [touched, two]]
    prints = {RowSource(files).fingerprint for files in others} | {RowSource([one, two]).fingerprint}
    assert len(prints) == 5


# --- a large file -----------------------------------------------------------------------------------------

ROWS = int(
    os.environ.get("RAISE_TEST_ROWS", "26000")
)  # RAISE_TEST_ROWS=260000: Video-R1's whole training file

INDEX = """
import json, sys, time
from pathlib import Path
from raise_trainer.row_files import RowFile
def mib(name):
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: importing took more than indexing does
before, start = mib("VmRSS"), time.perf_counter()
file = RowFile(Path(sys.argv[1]), Path("/"))
seconds = time.perf_counter() - start
assert file[len(file) - 1].problem_id == len(file) - 1
print(json.dumps([len(file), seconds, mib("VmHWM") - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
@pytest.mark.parametrize("lines", [False, True])
def test_a_file_of_video_r1_size_is_indexed_in_under_32_mib(tmp_path: Path, lines: bool) -> None:
    """Prints what it measured. Beyond 16 bytes a row the bound does not depend on their number."""
    file = tmp_path / "rows.json"
    with file.open("w") as out:
        out.write("" if lines else "[")
        for i in range(ROWS):
            row = {**ROW, "problem_id": i, "problem": f"Was ist é {i}? " + "word " * 100}
            out.write(("" if i == 0 else "\n" if lines else ",\n") + json.dumps(row, ensure_ascii=False))
        out.write("" if lines else "]")
    done = subprocess.run(
        [sys.executable, "-c", INDEX, str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    rows, seconds, mib = json.loads(done.stdout)
    megabytes = file.stat().st_size / 1e6
    print(f"{rows} rows, {megabytes:.0f} MB: {seconds:.2f} s, {mib:.1f} MiB more")
    assert rows == ROWS and mib < 32
