"""The decoder bench runs, records what it was made with, and fails when decoders disagree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import decoders
from raise_trainer.media.decoders import DECODERS
from raise_trainer.media.sampling import Sampling
from raise_trainer.media.video import Decoded, decode_video


def test_quick_measures_every_decoder_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.jsonl"
    assert decoders.main(["--quick", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    here = [name for name, decoder in DECODERS.items() if not decoder.missing]
    assert {(r["decoder"], r["sampling"]) for r in records} == {
        (n, s) for n in here for s in decoders.SAMPLINGS
    }
    for record in records:
        assert record["frames"] == (16 if record["sampling"] == "16 frames" else 4)
        assert record["open_s"] > 0 and record["read_s"] > 0 and record["import_s"] > 0
        assert record["versions"]["av"] and record["commit"] and record["levels_off"] <= 2
    printed = capsys.readouterr().out
    assert all(f"{name} frames/s" in printed for name in here)
    assert all(f"{name} {d.missing}" in printed for name, d in DECODERS.items() if d.missing)


def test_other_frames_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(path: Path, sampling: Sampling, name: str) -> Decoded:
        read = decode_video(path, sampling, name)
        return replace(read, pixels=read.pixels + 3) if name == "pyav" else read

    monkeypatch.setattr(decoders, "decode_video", shifted)
    assert decoders.main(["--quick"]) == 1
