"""Bad media are listed with reasons, not tried again, and stop the run when they are too many."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from raise_trainer.errors import BadMedia, UserError
from raise_trainer.media.quarantine import GRACE, Quarantine

CLIP = Path("/data/a.mp4")


def entries(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "quarantine.jsonl"


def test_what_is_listed(file: Path) -> None:
    bad = Quarantine(file, max_share=None)
    assert bad.reason(CLIP) is None and not file.exists()
    bad.add(7, CLIP, BadMedia("a.mp4: empty"))
    bad.add("8", CLIP, BadMedia("a.mp4: another story"))
    assert bad.reason(CLIP) == "a.mp4: empty" and bad.reason(Path("/data/b.mp4")) is None
    first, second = entries(file)
    assert (first["id"], first["path"], first["reason"]) == (7, str(CLIP), "a.mp4: empty")
    assert second["id"] == "8" and second["reason"] == "a.mp4: empty"
    assert datetime.fromisoformat(first["time"]).tzinfo is not None


def test_a_row_counts_once_in_all_epochs(file: Path) -> None:
    bad = Quarantine(file, max_count=1)
    for _ in range(5):
        bad.saw(range(10))
        bad.add(3, CLIP, BadMedia("x"))
    assert len(bad) == 1 and len(entries(file)) == 1
    with pytest.raises(UserError, match="2 of 10 rows seen could not be used") as error:
        bad.add(4, CLIP, BadMedia("x"))
    assert str(file) in str(error.value) and "budget of 1 rows" in str(error.value)


def test_the_share_is_of_the_rows_seen(file: Path) -> None:
    bad = Quarantine(file, max_share=0.1)
    bad.saw(range(1000))
    for row in range(100):
        bad.add(row, Path(f"/data/{row}.mp4"), BadMedia("x"))
    with pytest.raises(UserError, match=r"101 of 1000 rows .* \(10.1%\), over the budget of 10.0%"):
        bad.add(100, CLIP, BadMedia("x"))
    assert len(entries(file)) == 101  # the last is listed before the run stops


def test_a_wrong_data_root_stops_the_run_soon(file: Path) -> None:
    bad = Quarantine(file)
    with pytest.raises(UserError, match=r"budget of 5\.0%"):
        for row in range(1000):
            bad.saw([row])
            bad.add(row, Path(f"/data/{row}.mp4"), BadMedia("No such file"))
    assert len(bad) == GRACE + 1


def test_fail_stops_at_the_first_and_still_lists_it(file: Path) -> None:
    bad = Quarantine(file, on_bad_media="fail")
    with pytest.raises(BadMedia, match=r"row 7: a\.mp4: empty"):
        bad.add(7, CLIP, BadMedia("a.mp4: empty"))
    assert len(entries(file)) == 1


def test_carried_over_from_another_run(file: Path, tmp_path: Path) -> None:
    Quarantine(file).add(7, CLIP, BadMedia("a.mp4: empty"))
    later = Quarantine(tmp_path / "new.jsonl", carry_over=file)
    assert later.reason(CLIP) == "a.mp4: empty" and len(later) == 0
    later.add(7, CLIP, BadMedia("now for another reason"))
    assert entries(tmp_path / "new.jsonl")[0]["reason"] == "a.mp4: empty"
    with pytest.raises(UserError, match="no such quarantine list"):
        Quarantine(file, carry_over=tmp_path / "none.jsonl")


def test_a_run_that_goes_on_appends_and_mends_a_torn_line(file: Path) -> None:
    Quarantine(file).add(7, CLIP, BadMedia("a.mp4: empty"))
    with file.open("a", encoding="utf-8") as torn:
        torn.write('{"id": 8, "path": "/da')
    again = Quarantine(file)
    assert again.reason(CLIP) == "a.mp4: empty"
    again.add(7, CLIP, BadMedia("x"))
    again.add(9, CLIP, BadMedia("x"))
    assert [entry["id"] for entry in entries(file)] == [7, 9]


def test_a_list_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="line 1 is no quarantine entry"):
        Quarantine(tmp_path / "b.jsonl", carry_over=tmp_path / "a.jsonl")


def test_names_that_are_not_unicode(file: Path) -> None:
    odd = Path("/data/\udcff.mp4")
    Quarantine(file).add(1, odd, BadMedia("x"))
    assert Quarantine(file).reason(odd) == "x"
