"""decord, torchcodec and PyAV give the same frames of real files, and refuse the same broken ones."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raise_trainer.errors import BadMedia, UserError
from raise_trainer.media import decoders
from raise_trainer.media.decoders import DECODERS, Opened, choose
from raise_trainer.media.frames import Frames
from raise_trainer.media.sampling import Sampling
from raise_trainer.media.video import decode_video
from tests.budget import assert_at_most
from tests.trainer import media_cases as cases

NAMES = list(DECODERS)
# a container, and the decoders that read it right
CONTAINERS = {
    "mp4": NAMES,
    "mov": NAMES,
    "mkv": NAMES,
    "avi": ["torchcodec", "pyav"],
    "ts": ["pyav"],
}
READ = [(kind, name) for kind, names in CONTAINERS.items() for name in names]
SAMPLINGS = [
    Sampling(frames=16),
    Sampling(frames=2),
    Sampling(frames=60),
    Sampling(fps=7.5),
    Sampling(fps=90),
]


def need(name: str) -> None:
    if DECODERS[name].missing:
        pytest.skip(f"{name} {DECODERS[name].missing}")


def same_pictures(got: np.ndarray, want: np.ndarray) -> None:
    """H.264 decodes exactly; the conversion to RGB may round otherwise. The next frame is 4 levels off."""
    assert got.shape == want.shape
    assert_at_most(torch.tensor(float(np.abs(got.astype(int) - want).max())), 2, name="levels of 255")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every container, one turned; AVI is without B-frames, having no place for their times."""
    folder = tmp_path_factory.mktemp("videos")
    for kind in CONTAINERS:
        cases.write(folder / f"a.{kind}", cases.pictures(), b_frames=0 if kind == "avi" else 3)
    cases.turn(cases.write(folder / "turned.mp4", cases.pictures()))
    cases.write(folder / "odd.mp4", cases.pictures(30, 94, 130))
    return folder


@pytest.mark.parametrize("kind, name", READ)
def test_the_frames_asked_for(videos: Path, kind: str, name: str) -> None:
    """The same pictures as plain decoding from the start, which seeks nowhere."""
    need(name)
    path = videos / f"a.{kind}"
    every = cases.every_frame(path)
    for sampling in SAMPLINGS:
        read = decode_video(path, sampling, name)
        assert (read.total, read.fps) == (cases.TOTAL, cases.FPS)
        assert read.indices == sampling.indices(cases.TOTAL, cases.FPS)
        assert read.pixels.dtype == np.uint8 and read.pixels.flags["C_CONTIGUOUS"]
        same_pictures(read.pixels, every[list(read.indices)])


@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes_and_files_turned_by_the_camera(videos: Path, name: str) -> None:
    need(name)
    odd = decode_video(videos / "odd.mp4", Sampling(frames=4), name)
    assert odd.pixels.shape == (4, 94, 130, 3)
    turned = decode_video(videos / "turned.mp4", Sampling(frames=4), name)
    upright = cases.every_frame(videos / "turned.mp4")[list(turned.indices)]
    same_pictures(turned.pixels, np.rot90(upright, 3, (1, 2)))


@pytest.mark.parametrize("kind, name", [(k, n) for k in CONTAINERS for n in NAMES if (k, n) not in READ])
def test_a_container_read_wrongly_is_refused_and_auto_passes_over_it(
    videos: Path, kind: str, name: str
) -> None:
    need(name)
    path = videos / f"a.{kind}"
    with pytest.raises(BadMedia, match=f"{name} does not read .* decoder=auto"):
        decode_video(path, Sampling(frames=8), name)
    read = decode_video(path, Sampling(frames=8), "auto")
    same_pictures(read.pixels, cases.every_frame(path)[list(read.indices)])


@pytest.mark.parametrize("kind", ["avi", "ts"])
def test_decord_still_reads_these_wrongly(videos: Path, kind: str) -> None:
    """Why `wrong_in` is there. When this fails, decord was mended and may be asked again."""
    path = videos / f"a.{kind}"
    indices = Sampling(frames=16).indices(cases.TOTAL, cases.FPS)
    with DECODERS["decord"].open(path) as video:
        assert not np.array_equal(video.pixels(indices), cases.every_frame(path)[list(indices)])


def spoil(kind: str, folder: Path) -> Path:
    path = folder / f"a {kind}"
    if kind == "cut short":
        path = path.with_suffix(".mp4")
        data = cases.write(path, cases.pictures()).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "cut, index first":
        path = path.with_suffix(".mp4")
        data = cases.write(path, cases.pictures(), first=True).read_bytes()
        path.write_bytes(data[:-10])
    elif kind in ("cut mkv", "cut avi"):
        path = path.with_suffix("." + kind[-3:])
        data = cases.write(path, cases.pictures(), b_frames=0 if kind == "cut avi" else 3).read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
    elif kind == "zeros at the end":
        path = path.with_suffix(".mp4")
        data = cases.write(path, cases.pictures(), first=True).read_bytes()
        path.write_bytes(data[:-8000] + bytes(8000))
    elif kind == "one frame":
        cases.write(path.with_suffix(".mp4"), cases.pictures(1))
        path = path.with_suffix(".mp4")
    elif kind == "sound only":
        path = path.with_suffix(".wav")
        size = 8000
        head = b"RIFF" + (36 + size).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
        head += bytes([1, 0, 1, 0]) + (8000).to_bytes(4, "little") * 2 + bytes([1, 0, 8, 0])
        path.write_bytes(head + b"data" + size.to_bytes(4, "little") + bytes(size))
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no video\n" * 50)
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(20_000))
    elif kind == "too narrow":
        path = cases.write(path.with_suffix(".mp4"), cases.pictures(4, 2, 600))
    else:
        assert kind == "missing"
    return path


BROKEN = {
    "missing": "No such file",
    "folder": "Is a directory",
    "empty": "empty",
    "text": "cannot be decoded",
    "noise": "cannot be decoded",
    "sound only": "no video stream",
    "cut short": "cannot be decoded",
    "cut, index first": "cut short at",
    "cut mkv": "cut short at",
    "cut avi": "cut short at",
    "zeros at the end": "cannot be decoded",
    "one frame": "1 frame",
    "too narrow": "600x2 pixels",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_with_the_reason(tmp_path: Path, kind: str, name: str) -> None:
    need(name)
    path = spoil(kind, tmp_path)
    name = "auto" if kind == "cut avi" else name
    with pytest.raises(BadMedia) as error:
        decode_video(path, Sampling(frames=8), name)
    message = str(error.value)
    assert message.startswith(str(path)) and BROKEN[kind] in message and "\n" not in message
    assert "github" not in message and ".cpp" not in message


def test_a_name_with_a_nul_is_bad_media() -> None:
    with pytest.raises(BadMedia, match="is no path"):
        decode_video(Path("a\0b.mp4"), Sampling(frames=8))


def test_pyav_tells_of_damage_inside_the_pictures(tmp_path: Path) -> None:
    path = cases.write(tmp_path / "a.mp4", cases.pictures(), first=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(BadMedia, match=r"damaged picture at|cannot be decoded"):
        decode_video(path, Sampling(frames=60), "pyav")


def stub(opened: Opened) -> decoders.Decoder:
    @contextmanager
    def opening(path: Path):
        yield opened

    return replace(DECODERS["pyav"], open=opening)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"fps": 0.0}, "no frame rate"),
        ({"fps": float("nan")}, "no frame rate"),
        ({"total": 0}, "0 frame"),
        ({"pixels": lambda indices: np.zeros((len(indices) - 1, 8, 8, 3), np.uint8)}, "7 of 8 frames"),
    ],
)
def test_what_a_decoder_tells_is_checked(
    videos: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], reason: str
) -> None:
    sound = Opened(60, 30.0, 2.0, lambda indices: np.zeros((len(indices), 8, 8, 3), np.uint8))
    monkeypatch.setitem(DECODERS, "pyav", stub(sound))
    assert len(decode_video(videos / "a.mp4", Sampling(frames=8), "pyav").pixels) == 8
    monkeypatch.setitem(DECODERS, "pyav", stub(replace(sound, **change)))
    with pytest.raises(BadMedia, match=reason):
        decode_video(videos / "a.mp4", Sampling(frames=8), "pyav")


def test_a_missing_decoder_is_the_users_error_not_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path("a.mp4")
    with pytest.raises(UserError, match="expected one of auto, decord, torchcodec, pyav"):
        choose("opencv", "mp4", path)
    absent = replace(DECODERS["decord"], module="no_such_module")
    monkeypatch.setitem(DECODERS, "decord", absent)
    with pytest.raises(UserError, match="pip install no_such_module"):
        choose("decord", "mp4", path)
    assert choose("auto", "mp4", path) in (DECODERS["torchcodec"], DECODERS["pyav"])
    for name in DECODERS:
        monkeypatch.setitem(DECODERS, name, absent)
    with pytest.raises(UserError, match="no decoder here reads mp4"):
        choose("auto", "mp4", path)


def test_a_decoder_whose_libraries_do_not_load_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_there.py").write_text("ffmpeg_major_version = None\n")
    (tmp_path / "broken_build.py").write_text("raise OSError('libavutil.so.60: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    half = replace(DECODERS["torchcodec"], module="half_there")
    assert "shared libraries of FFmpeg" in half.missing
    assert "libavutil.so.60" in replace(half, module="broken_build").missing


def test_tensors_with_their_times(videos: Path) -> None:
    frames = Frames.of(decode_video(videos / "a.mp4", Sampling(fps=10)))
    assert frames.pixels.shape == (20, cases.HEIGHT, cases.WIDTH, 3)
    assert frames.seconds_per_patch == 2 / (20 / 60 * 30)
    assert frames.timestamps[0] == 0 and frames.timestamps[-1] == 59 / 30
