"""The frame cache gives back what was stored, forgets what changed, mends what broke and stays small."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raise_trainer.media.cache import FrameCache
from raise_trainer.media.sampling import Sampling
from raise_trainer.media.video import Decoded, Request


def decoded(value: int = 1, frames: int = 4) -> Decoded:
    pixels = np.random.default_rng(value).integers(0, 255, (frames, 16, 16, 3), dtype=np.uint8)
    return Decoded(pixels, tuple(range(frames)), 29.97, 100)


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"video")
    return Request(path, Sampling(frames=4))


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache", max_bytes=1_000_000)


def stored(cache: FrameCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def name(cache: FrameCache, request: Request) -> Path:
    file = cache.file(request)
    assert file is not None
    return file


def test_what_is_stored_comes_back(cache: FrameCache, request_: Request) -> None:
    file, want = name(cache, request_), decoded()
    assert cache.get(file) is None
    cache.put(file, want)
    for reader in (cache, FrameCache(cache.folder, max_bytes=1_000_000)):
        got = reader.get(file)
        assert got is not None and np.array_equal(got.pixels, want.pixels) and got.pixels.dtype == np.uint8
        assert (got.indices, got.fps, got.total) == (want.indices, want.fps, want.total)
    assert (cache.hits, cache.misses) == (1, 1)
    assert stored(cache) == [file]


def test_the_name_holds_all_that_the_frames_depend_on(cache: FrameCache, request_: Request) -> None:
    names = [name(cache, request_)]
    for change in (
        {"sampling": Sampling(frames=8)},
        {"sampling": Sampling(frames=4, min_pixels=10, max_pixels=20)},
        {"kind": "image"},
        {"decoder": "pyav"},
    ):
        names.append(name(cache, replace(request_, **change)))
    other = request_.path.with_name("b.mp4")
    other.write_bytes(b"video")
    names.append(name(cache, replace(request_, path=other)))
    stat = request_.path.stat()
    os.utime(request_.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    names.append(name(cache, request_))
    request_.path.write_bytes(b"videos")
    os.utime(request_.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    names.append(name(cache, request_))
    assert len(set(names)) == len(names)


def test_one_name_for_a_path_however_it_is_written(
    cache: FrameCache, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(request_.path.parent)
    assert name(cache, replace(request_, path=Path("a.mp4"))) == name(cache, request_)


@pytest.mark.parametrize("path", ["gone.mp4", "a\0b.mp4"])
def test_no_name_without_a_file(cache: FrameCache, request_: Request, path: str) -> None:
    assert cache.file(replace(request_, path=Path(path))) is None


@pytest.mark.parametrize("damage", ["cut", "a bit", "text", "empty"])
def test_a_damaged_file_is_a_miss_and_goes(
    cache: FrameCache, request_: Request, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = name(cache, request_)
    cache.put(file, decoded())
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(
        {"cut": bytes(data[:-50]), "a bit": bytes(data), "text": b"x" * 99, "empty": b""}[damage]
    )
    assert cache.get(file) is None and not file.exists()
    assert "is damaged" in caplog.text
    cache.put(file, decoded())
    assert cache.get(file) is not None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    size = decoded().pixels.nbytes
    cache = FrameCache(tmp_path / "cache", max_bytes=20 * size)
    files = []
    for i in range(100):
        path = tmp_path / f"{i}.mp4"
        path.write_bytes(b"v")
        files.append(name(cache, Request(path, Sampling(frames=4))))
        cache.put(files[-1], decoded(i))
        os.utime(files[-1], (i, i))
        assert cache.get(files[0]) is not None  # used all the time, so it is not old
        assert sum(file.stat().st_size for file in stored(cache)) <= cache.max_bytes
    left = [i for i, file in enumerate(files) if file.exists()]
    assert left[0] == 0 and left[1:] == list(range(left[1], 100)) and len(left) >= 10


def test_more_than_fits_is_not_stored(tmp_path: Path, request_: Request) -> None:
    cache = FrameCache(tmp_path / "cache", max_bytes=100)
    cache.put(name(cache, request_), decoded())
    assert not stored(cache)


def test_a_smaller_limit_holds_from_the_start(cache: FrameCache, request_: Request) -> None:
    cache.put(name(cache, request_), decoded())
    FrameCache(cache.folder, max_bytes=100)
    assert not stored(cache)


def test_what_a_killed_process_left_goes_when_it_is_old(cache: FrameCache, request_: Request) -> None:
    file = name(cache, request_)
    file.parent.mkdir()
    old, new = file.with_name(".old"), file.with_name(".new")
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    FrameCache(cache.folder, max_bytes=1_000_000)
    assert stored(cache) == [new]


def test_a_disk_that_cannot_be_written_stops_nothing(
    cache: FrameCache, request_: Request, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(3):
        cache.put(name(cache, request_), decoded())
    assert not stored(cache) and caplog.text.count("No space left on device") == 1
