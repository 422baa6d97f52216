"""mp4 files written and read back; broken ones are refused with their path and the reason."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from raise_trainer import world
from raise_trainer.clips import read_frames, write_mp4
from raise_trainer.errors import BadMedia
from tests.budget import assert_at_most


@pytest.fixture
def mp4(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_mp4(path, world.render(world.draw_scene(random.Random(0), "move")), world.FPS)
    return path


def test_written_frames_come_back(mp4: Path) -> None:
    frames = world.render(world.draw_scene(random.Random(0), "move"))
    read = read_frames(mp4, world.FRAMES)
    assert read.fps == world.FPS and read.total == world.FRAMES and read.indices == tuple(range(world.FRAMES))
    # H.264 with halved colour resolution: the picture is close on average, not equal.
    levels = torch.from_numpy(np.abs(read.pixels.numpy().astype(float) - frames))
    assert_at_most(levels.mean(), 6.0, name="levels of 255")


def test_the_file_is_h264_and_the_same_every_time(tmp_path: Path) -> None:
    rng, path, junk = random.Random(0), tmp_path / "again.mp4", np.random.default_rng(0)
    for _ in range(10):
        frames, written = world.render(world.draw_scene(rng, "move")), set()
        for _ in range(5):
            for size in junk.integers(2_000, 40_000, 200):  # memory that is not zero where it is not set
                junk.integers(0, 255, size, dtype=np.uint8)
            write_mp4(path, frames, world.FPS)
            written.add(path.read_bytes())
        assert len(written) == 1 and b"avc1" in written.pop()


@pytest.mark.parametrize("count, kept", [(8, 8), (5, 4), (2, 2), (100, 8)])
def test_an_even_number_of_frames_over_the_whole_video(mp4: Path, count: int, kept: int) -> None:
    read = read_frames(mp4, count)
    assert len(read.indices) == len(read.pixels) == kept
    assert read.indices[0] == 0 and read.indices[-1] == world.FRAMES - 1
    everything = read_frames(mp4, world.FRAMES).pixels
    assert torch.equal(read.pixels, everything[list(read.indices)])


def spoil(kind: str, path: Path) -> None:
    good = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "cut short":
        path.write_bytes(good[: len(good) // 3])
    else:
        path.write_text("this is no video\n" * 50)


@pytest.mark.parametrize("kind", ["missing", "empty", "cut short", "folder", "text"])
def test_a_broken_file_is_named(mp4: Path, kind: str) -> None:
    spoil(kind, mp4)
    with pytest.raises(BadMedia) as error:
        read_frames(mp4, 8)
    assert str(mp4) in str(error.value) and "\n" not in str(error.value)


def test_a_still_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "still.mp4"
    write_mp4(path, np.zeros((1, 56, 56, 3), np.uint8), 4)
    with pytest.raises(BadMedia, match="1 frame"):
        read_frames(path, 8)
