"""What a killed process wrote of a last line is cut off."""

from pathlib import Path

import pytest

from raise_trainer.json_lines import CHUNK, append_json_lines, drop_torn_line, read_json_lines
from raise_trainer.logbook import Logbook


@pytest.mark.parametrize(
    "text, kept",
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}\n\n', b'{"a": 1}\n\n'),
        (b'{"a": 1}\n{"b', b'{"a": 1}\n'),
        (b'{"a', b""),
        (b"{}\n" + b"x" * (CHUNK - 1), b"{}\n"),
        (b"{}\n" + b"x" * CHUNK, b"{}\n"),
        (b"{}\n" + b"x" * (3 * CHUNK), b"{}\n"),
        (b"x" * (2 * CHUNK + 1), b""),
    ],
    ids=["empty", "whole", "blank", "torn", "first", "a chunk", "a chunk and one", "chunks", "no line"],
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, text: bytes, kept: bytes) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(text)
    drop_torn_line(file)
    assert file.read_bytes() == kept
    drop_torn_line(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_a_run_that_goes_on_writes_times_after_a_whole_line(tmp_path: Path) -> None:
    log = Logbook(tmp_path)
    log.time("step", step=0, rollout=0.12345, peak_gib=0.123456789)
    with (tmp_path / "timings.jsonl").open("a") as file:
        file.write('{"stage": "st')
    Logbook(tmp_path).time("step", step=1, rollout=1.0)
    found = [record for _, record in read_json_lines(tmp_path / "timings.jsonl")]
    assert found == [
        {"stage": "step", "step": 0, "rollout": 0.123, "peak_gib": 0.123457},
        {"stage": "step", "step": 1, "rollout": 1.0},
    ]
    append_json_lines(tmp_path / "timings.jsonl", [{"torn": False}])
    Logbook(tmp_path, silent=True)
    assert len((tmp_path / "timings.jsonl").read_text().splitlines()) == 3
